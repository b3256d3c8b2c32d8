from pathlib import Path

import pytest
import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.loading.keymap import dropped, expand, locate, prefix_of, resolve
from mmdlm.loading.shards import Stored


def test_table_stacks_parts_and_experts() -> None:
    keys = {
        "blocks.{i}.qkv": ("l.{i}.q", "l.{i}.k", "l.{i}.v"),
        "blocks.{i}.fused": "l.{i}.query_key_value",
        "blocks.{i}.experts.gate_up": ("l.{i}.e.{e}.gate", "l.{i}.e.{e}.up"),
        "blocks.{i}.experts.down": "l.{i}.e.{e}.down",
        "vision.*": None,
    }
    shapes = {
        "blocks.11.qkv": (8, 3),
        "blocks.11.fused": (5, 3),
        "blocks.11.experts.gate_up": (2, 6, 3),
        "blocks.11.experts.down": (2, 3, 4),
    }
    places = expand(keys, shapes, {".qkv": (4, 2, 2)})
    expected = {
        "l.11.q": ((slice(0, 4),), (4, 3)),
        "l.11.k": ((slice(4, 6),), (2, 3)),
        "l.11.v": ((slice(6, 8),), (2, 3)),
        "l.11.query_key_value": ((), (5, 3)),
        "l.11.e.0.gate": ((0, slice(0, 3)), (3, 3)),
        "l.11.e.0.up": ((0, slice(3, 6)), (3, 3)),
        "l.11.e.1.gate": ((1, slice(0, 3)), (3, 3)),
        "l.11.e.1.up": ((1, slice(3, 6)), (3, 3)),
        "l.11.e.0.down": ((0,), (3, 4)),
        "l.11.e.1.down": ((1,), (3, 4)),
    }
    assert {name: (p.index, p.shape) for name, p in places.items()} == expected
    for place in places.values():
        assert torch.zeros(shapes[place.ours])[place.index].shape == place.shape


def test_table_without_a_name_for_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor for blocks.0.q_norm"):
        expand({"blocks.{i}.k_norm": "k.{i}"}, {"blocks.0.q_norm": (2,)})


def test_known_tensors_of_other_parts_are_dropped_with_the_reason() -> None:
    stored = {n: Stored(Path("f"), (2,), "F32") for n in ("a", "tower.0.w", "m.tower.1.w")}
    places = expand({"ours": "a"}, {"ours": (2,)})
    known = dropped({"backbone": ("m.", {"ours": "a", "tower.*": None}), "x": ("", {"t*": None})})
    assert known == ["m.tower.*", "t*"]
    report = resolve(stored, places, known)
    assert report.ignored == dict.fromkeys(
        ("m.tower.1.w", "tower.0.w"), "known, and not part of this model"
    )
    assert report.held == {name: stored[name] for name in report.ignored}
    with pytest.raises(ValueError, match="1 tensors are unexpected"):
        resolve(stored, places, ["m.tower.*"])
    with pytest.raises(ValueError, match="2 tensors are unexpected"):
        resolve(stored, places)


def test_prefix_ends_at_a_dot() -> None:
    assert prefix_of(["model.embed", "x"], "model.embed") == ""
    assert prefix_of(["llm.model.embed"], "model.embed") == "llm."
    assert prefix_of(["supermodel.embed"], "model.embed") == ""


def test_entries_of_a_tensor_may_have_published_names_of_their_own() -> None:
    places = expand(
        {"positions[0]": "table", "queries[1]": "b", "queries[0]": "a"},
        {
            "positions": (1, 7, 3),
            "queries": (2, 5),
        },
    )
    assert {name: (p.ours, p.index, p.shape) for name, p in places.items()} == {
        "table": ("positions", (0,), (7, 3)),
        "a": ("queries", (0,), (5,)),
        "b": ("queries", (1,), (5,)),
    }
    with pytest.raises(ValueError, match=r"positions is \[2, 7, 3\], but .* fills \[0\]"):
        expand({"positions[0]": "table"}, {"positions": (2, 7, 3)})


def test_two_numbers_of_a_name_are_kept_apart() -> None:
    places = expand(
        {"r.{i}.f.{i}": "m.{i}.ffn.{i}", "b.{i}": "b.{i}.copy.{i}"},
        {
            "r.3.f.1": (2,),
            "b.4": (1,),
        },
    )
    assert list(places) == ["m.3.ffn.1", "b.4.copy.4"]


def test_parts_have_prefixes_and_tables_of_their_own() -> None:
    config = TransformerConfig(width=4, layers=1, heads=2, inner=4, kv_heads=1)
    ours = {"backbone.attn.qkv.weight": (8, 4), "encoders.image.w": (3,), "adapters.image.w": (5,)}
    tables = {
        "backbone": ("llm.", {"attn.qkv.weight": ("q", "k", "v")}),
        "encoders.image": ("tower.", {"w": "weight"}),
        "adapters.image": ("", {"w": "weight"}),
    }
    places = locate(ours, tables, config)
    assert {name: (p.ours, p.shape) for name, p in places.items()} == {
        "llm.q": ("backbone.attn.qkv.weight", (4, 4)),
        "llm.k": ("backbone.attn.qkv.weight", (2, 4)),
        "llm.v": ("backbone.attn.qkv.weight", (2, 4)),
        "tower.weight": ("encoders.image.w", (3,)),
        "weight": ("adapters.image.w", (5,)),
    }
    with pytest.raises(ValueError, match="no table of published names for adapters.image.w"):
        locate(ours, {name: t for name, t in tables.items() if name != "adapters.image"}, config)
    same = tables | {"adapters.image": ("tower.", {"w": "weight"})}
    with pytest.raises(ValueError, match="tower.weight is published for encoders.image.w and"):
        locate(ours, same, config)
