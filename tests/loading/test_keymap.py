from pathlib import Path

import pytest
import torch

from mmdlm.loading.keymap import expand, prefix_of, resolve
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
    _, report = resolve(stored, places, {"ours": "a", "tower.*": None}, "m.")
    assert report.ignored == dict.fromkeys(
        ("m.tower.1.w", "tower.0.w"), "known, and no part of this model"
    )
    with pytest.raises(ValueError, match="2 tensors are unexpected"):
        resolve(stored, places, {"ours": "a"}, "m.")


def test_prefix_ends_at_a_dot() -> None:
    assert prefix_of(["model.embed", "x"], "model.embed") == ""
    assert prefix_of(["llm.model.embed"], "model.embed") == "llm."
    assert prefix_of(["supermodel.embed"], "model.embed") == ""
