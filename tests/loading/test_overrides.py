import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdlm
from mmdlm.checkpoint import load, save, save_published
from mmdlm.model import MultimodalDLM

IDS = torch.arange(12)[None]


def test_what_config_does_not_tell_can_be_told(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    told = {
        "mask_id": 7,
        "eos_id": 8,
        "pad_id": 9,
        "stop_ids": [3, 4],
        "shift": True,
        "attention": "block_causal",
        "block_size": 4,
        "template": "plain",
        "context": 64,
    }
    spec = mmdlm.load(folder, **told).spec
    assert {name: getattr(spec, name) for name in told} == told | {"stop_ids": (3, 4)}
    assert spec.transformer == load(folder).spec.transformer


@torch.inference_mode()
def test_shift_and_attention_told_are_used(golden: Path) -> None:
    folder = golden / "backbones" / "llada"
    plain, shifted = load(folder).logits(IDS), load(folder, shift=True).logits(IDS)
    assert torch.equal(shifted[:, 1:], plain[:, :-1])
    causal = load(folder, attention="block_causal", block_size=4)
    expected = load(folder).logits(IDS, attention="block_causal", block_size=4)
    assert torch.equal(causal.logits(IDS), expected)


def test_mask_id_told_stands_in_for_one_that_does_not_fit(
    published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    folder = configure(published(), mask_token_id=126336)
    with pytest.raises(ValueError, match="mask_id is 126336, expected an id below the 160 rows"):
        load(folder)
    assert load(folder, mask_id=5).spec.mask_id == 5
    with pytest.raises(ValueError, match="mask_id is 160"):
        load(folder, mask_id=160)


@torch.inference_mode()
def test_theta_scale_stretches_the_rotary_base(
    golden: Path, tmp_path: Path, published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    scaled = load(golden / "backbones" / "llada", theta_scale=14)
    theta = scaled.spec.transformer.theta
    by_config = load(configure(published(), rope_theta=14 * theta))
    assert torch.equal(scaled.logits(IDS), by_config.logits(IDS))
    assert torch.equal(
        load(golden / "backbones" / "llada", theta=14 * theta).logits(IDS), by_config.logits(IDS)
    )
    save_published(scaled, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 14 * theta
    save(scaled, tmp_path / "own")
    assert torch.equal(load(tmp_path / "own").logits(IDS), by_config.logits(IDS))


def test_own_layout_takes_overrides_too(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    save(multimodal(), tmp_path)
    spec = load(tmp_path, block_size=8, theta_scale=2.0).spec
    assert (spec.block_size, spec.transformer.theta_scale) == (8, 2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_idd": 3}, "load takes no 'mask_idd'; did you mean 'mask_id'"),
        ({"devise": "cpu"}, "load takes no 'devise'; did you mean 'device'"),
        ({"transformer": None}, "load takes no 'transformer'"),
        ({"width": 8}, "load takes no 'width'"),
    ],
)
def test_unknown_override_names_what_is_near(
    golden: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        load(golden / "backbones" / "llada", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shift": "yes"}, "shift='yes', expected True or False"),
        ({"attention": "blocks"}, "attention='blocks', expected one of full, prefix"),
        ({"block_size": 0}, "block_size=0, expected a number of tokens"),
        ({"context": True}, "context=True, expected a number of tokens"),
        ({"theta_scale": 0}, "theta_scale=0, expected a number above 0"),
        ({"theta_scale": "4"}, "theta_scale='4', expected a number above 0"),
        ({"template": "chat"}, "template='chat', expected one of"),
        ({"stop_ids": ["<eos>"]}, "stop_ids=.*, expected token ids"),
        ({"mask_id": -1}, "mask_id is -1"),
        ({"attention": "block_causal"}, "'block_causal' needs block_size="),
    ],
)
def test_override_of_the_wrong_kind_is_explained(
    golden: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(golden / "backbones" / "llada", **given)
