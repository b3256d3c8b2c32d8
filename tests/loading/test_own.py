import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdlm.checkpoint import load, save
from mmdlm.loading.shards import SINGLE
from mmdlm.model import MultimodalDLM

FAMILIES = ("llada", "dream")


def test_own_folder_holds_everything(
    tmp_path: Path,
    same: Callable[[nn.Module, nn.Module], bool],
    multimodal: Callable[[], MultimodalDLM],
) -> None:
    model = multimodal()
    save(model, tmp_path, card="# Tiny\n")
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "decoding.yaml",
        SINGLE,
        "statistics.json",
        "tokenizer.json",
    ]
    again = load(tmp_path)
    assert same(again, model)
    assert again.spec == model.spec
    assert again.preset == model.preset
    assert again.robot.to_dict() == model.robot.to_dict()
    assert again.tokenizer.encode("what is this ?") == model.tokenizer.encode("what is this ?")
    assert not again.training
    assert set(again.report.loaded) == set(model.state_dict())
    for kind, encoder in model.encoders.items():
        item = encoder.example(1)
        if kind == "state":
            continue
        with torch.inference_mode():
            [first] = model.encode(kind, [model.processor.prepare(kind, item)])
            [second] = again.encode(kind, [again.processor.prepare(kind, item)])
        assert torch.equal(first, second)


def test_own_folder_saved_again_is_byte_equal(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path / "a", card="card")
    save(load(tmp_path / "a"), tmp_path / "b", card="card")
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_published_model_survives_our_layout(
    golden: Path, tmp_path: Path, family: str, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    model = load(golden / "backbones" / family)
    save(model, tmp_path)
    again = load(tmp_path)
    assert same(again, model)
    assert again.spec == model.spec


def test_own_folder_in_bfloat16_takes_half(
    tmp_path: Path,
    same: Callable[[nn.Module, nn.Module], bool],
    multimodal: Callable[[], MultimodalDLM],
) -> None:
    model = multimodal()
    save(model, tmp_path / "full")
    save(model, tmp_path / "half", dtype="bfloat16")
    full, half = ((tmp_path / n / SINGLE).stat().st_size for n in ("full", "half"))
    assert half < 0.7 * full
    assert load(tmp_path / "half").dtype == torch.float32
    assert same(load(tmp_path / "half", dtype="bfloat16"), model.bfloat16())


def test_saving_again_drops_what_the_model_lost(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    model = multimodal()
    save(model, tmp_path, card="card")
    model.robot, model.tokenizer, model.preset = None, None, {}
    (tmp_path / "vocab.json").write_text("{}")  # another tool's spelling of a tokenizer
    save(model, tmp_path)
    again = load(tmp_path)
    assert (again.robot, again.tokenizer, again.preset) == (None, None, {})
    assert (tmp_path / "README.md").read_text() == "card"


def test_backbone_that_is_not_its_spec_is_not_saved(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    model = multimodal()
    model.backbone.blocks[1].attn.o.lora = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks.1.attn.o.lora.bias, .* merge adapters"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_loading_our_layout_leaves_random_numbers_alone(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path)
    before = torch.random.get_rng_state()
    load(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_own_recipes_never_download(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    model = multimodal()
    model.encoders["image"].arguments["pretrained"] = True
    save(model, tmp_path)
    recipe = json.loads((tmp_path / "config.json").read_text())["encoders"]["image"]
    assert recipe["init_args"]["pretrained"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mmdlm-9"}, "format is 'mmdlm-9', expected 'mmdlm-2'"),
        ({"encoders": ...}, r"lacks \['encoders'\]"),
        ({"spec": {"family": "llada"}}, "TransformerConfig has unknown"),
        (
            {"encoders": {"image": {"class_path": "os.system"}}},
            "outside encoders and adapters; a checkpoint may",
        ),
        ({"encoders": {}}, "every encoder needs an adapter"),
        ({"encoders": {}, "adapters": {}}, "tensors are unexpected"),
    ],
)
def test_own_config_that_is_wrong_is_explained(
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    configure: Callable[..., Path],
    multimodal: Callable[[], MultimodalDLM],
) -> None:
    save(multimodal(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load(configure(tmp_path, **change))


def test_own_spec_with_unknown_entries_is_explained(
    tmp_path: Path, configure: Callable[..., Path], multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())["spec"]
    with pytest.raises(ValueError, match=r"Spec has unknown \['speed'\]"):
        load(configure(tmp_path, spec=spec | {"speed": 1}))


def test_family_override_of_our_layout_is_refused(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path)
    with pytest.raises(ValueError, match="family='llada' has no effect"):
        load(tmp_path, family="llada")


@pytest.mark.parametrize("place", ["encoders", "adapters", "nested"])
def test_own_recipe_that_wants_a_download_is_rejected(
    place: str, tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config["encoders" if place == "nested" else place]["image"]
    if place == "nested":
        part["init_args"] = {"encoder": {"class_path": part["class_path"], "init_args": {}}}
        part = part["init_args"]["encoder"]
    part["init_args"]["pretrained"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: pretrained is True, .* nothing is downloa"):
        load(tmp_path)
