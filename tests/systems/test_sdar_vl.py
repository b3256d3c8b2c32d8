"""SDAR-VL in LLaVA-OneVision layout: vision equal to transformers, decoding in blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import describe
from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.session import Finished
from mmdlm.layout import Row, Sequence, Turn
from mmdlm.messages import Example, Slot, assistant, conversation
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Packed
from tests.systems.llava_golden import asked, with_tokenizer

SIDE, MASK, EOS, END, IMAGE = 54, 190, 191, 192, 150
TOWER = {
    **{"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 6},
    "vision_use_head": False,
}
TEXT = {
    **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 200},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 5) for j in range(1, 4)]
SIZES = [(60, 40), (33, 97), (201, 64), (54, 54), (130, 170), (7, 5)]
"""Width and height of the images."""


def reference(layer: int) -> LlavaOnevisionForConditionalGeneration:
    """transformers' model with random weights; its language model is not SDAR's."""
    config = LlavaOnevisionConfig(
        vision_config=TOWER,
        text_config={**TEXT, "model_type": "qwen3"},
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        vision_feature_layer=layer,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.copy_(torch.randn(weight.shape) * 0.15 + float("norm" in name and "weight" in name))
    return model


def config_of(model: LlavaOnevisionForConditionalGeneration) -> dict[str, Any]:
    """config.json with SDAR as language model."""
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    text = {**TEXT, **ids, "model_type": "sdar", "block_size": 4, "max_position_embeddings": 4096}
    return json.loads(model.config.to_json_string(use_diff=False)) | {"text_config": text}


def published(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], **pixels: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    given = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | pixels
    size = {"height": SIDE, "width": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size} | given))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def theirs() -> LlavaOnevisionForConditionalGeneration:
    return reference(-1)


@pytest.fixture(scope="module")
def model(
    theirs: LlavaOnevisionForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> MultimodalDLM:
    folder = tmp_path_factory.mktemp("sdar_vl")
    published(folder, theirs.state_dict(), config_of(theirs))
    return mmdlm.load(with_tokenizer(folder, CONTROL), device="cpu")


CONTROL = {
    "<|im_start|>": 170,
    "<|im_end|>": END,
    "<|image_pad|>": IMAGE,
    "<|MASK|>": MASK,
    "<|endoftext|>": EOS,
}


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES
    ]


def processed(groups: list[list[Image.Image]], **pixels: Any) -> dict[str, Any]:
    """transformers' preprocessing; several images of a group are padded, not tiled."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | pixels
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, **half
    )
    return processor(groups, return_tensors="pt")


@pytest.mark.parametrize("layer", [-1, -2])
def test_images_equal_transformers(layer: int, tmp_path: Path) -> None:
    theirs = reference(layer)
    folder = published(tmp_path, theirs.state_dict(), config_of(theirs))
    model = mmdlm.load(folder, device="cpu")
    assert model.system == "sdar_vl"
    for group in ([[image] for image in images()], [images()]):
        inputs = processed(group)
        found = theirs.get_image_features(**inputs, vision_aspect_ratio="anyres_max_4")
        flat = [(image, len(each) > 1) for each in group for image in each]
        items = [model.processor.prepare("image", image, several) for image, several in flat]
        with torch.no_grad():
            tokens = model.encode("image", items)
        for i, item in enumerate(items):
            pixels = inputs["pixel_values"][i][: len(item.tensor)]
            torch.testing.assert_close(item.tensor, pixels, atol=1 / 255, rtol=0)
            assert tokens[i].shape == found.pooler_output[i].shape
            torch.testing.assert_close(tokens[i], found.pooler_output[i], atol=1e-4, rtol=1e-4)


def test_the_mean_of_the_image_processor_is_used(
    theirs: LlavaOnevisionForConditionalGeneration, tmp_path: Path
) -> None:
    mean = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    folder = published(tmp_path / "in", theirs.state_dict(), config_of(theirs), **mean)
    model = mmdlm.load(folder, device="cpu")
    item = model.processor.prepare("image", images()[0])
    inputs = processed([[images()[0]]], **mean)
    torch.testing.assert_close(item.tensor, inputs["pixel_values"][0], atol=4 / 255, rtol=0)
    checkpoint.save_published(model, tmp_path / "out")
    assert describe(mmdlm.load(tmp_path / "out", device="cpu")) == describe(model)
    pixels = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == mean["image_mean"]


SPELLINGS = {
    "transformers 5, modules": {},
    "with the name of the tower's class": {
        "model.vision_tower.": "model.vision_tower.vision_model."
    },
    "transformers 5, files": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "transformers 4": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_loads_and_is_written_back(
    name: str, theirs: LlavaOnevisionForConditionalGeneration, model: MultimodalDLM, tmp_path: Path
) -> None:
    def spelled(tensor: str) -> str:
        for old, new in SPELLINGS[name].items():
            if tensor.startswith(old):
                return new + tensor.removeprefix(old)
        return tensor

    weights = {spelled(tensor): weight for tensor, weight in theirs.state_dict().items()}
    config = config_of(theirs)
    loaded = mmdlm.load(published(tmp_path / "in", weights, config), device="cpu")
    for ours, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[ours], weight), ours
    checkpoint.save_published(loaded, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[tensor], weight) for tensor, weight in weights.items())
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: again[key] for key in config if "dtype" not in key} == {
        key: value for key, value in config.items() if "dtype" not in key
    }


def prompt(model: MultimodalDLM, *picked: int, text: int = 9) -> Sequence:
    """Prompt of these images with text around them."""
    items = [model.processor.prepare("image", images()[i], len(picked) > 1) for i in picked]
    ids = torch.arange(3, 3 + text)
    with torch.no_grad():
        return model.embed([Row((), (Turn((ids[:4], *items, ids[4:]), ids[:0]),))])


@pytest.mark.parametrize("text", [8, 9, 10, 11])
def test_the_rest_of_a_prompt_joins_the_first_block(model: MultimodalDLM, text: int) -> None:
    sequence = prompt(model, 0, text=text)
    length = sequence.tokens.shape[1]
    assert sequence.level[0].tolist() == [i // 4 for i in range(length)]
    plain = mmdlm.decode(model, sequence, 11)
    block = (plain.history.step[0] == -1).logical_not()
    assert bool(block.all())
    first = 4 - length % 4
    order = plain.history.step[0]
    assert int(order[:first].max()) < int(order[first:].min())
    cached = mmdlm.decode(model, sequence, 11, [BlockCache()])
    assert cached.tokens.equal(plain.tokens)
    torch.testing.assert_close(cached.history.confidence, plain.history.confidence)


def test_a_block_sees_what_is_before_it_and_itself(model: MultimodalDLM) -> None:
    """The first step by hand: everything up to the end of the first block, nothing after it."""
    sequence = prompt(model, 0, text=9)
    length = sequence.tokens.shape[1]
    stop = length // 4 * 4 + 4
    x = torch.cat(
        [
            model.spliced(sequence, torch.arange(length)[None]),
            model.backbone.tokens(torch.full((1, stop - length), MASK)),
        ],
        1,
    )
    level = torch.arange(stop) // 4
    seen = level[None, :, None] >= level[None, None]
    with torch.no_grad():
        logits = model.backbone.head(model.backbone(x, torch.arange(stop)[None], mask=seen))
    logits[..., MASK] = -torch.inf
    sure, best = logits[0, length:].softmax(-1).max(-1)
    decoded = mmdlm.decode(model, sequence, 8)
    at = int(sure.argmax())
    assert int(decoded.history.step[0].argmin()) == at
    assert int(decoded.tokens[0, length + at]) == int(best[at])


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_answers_of_one_and_two_images_agree_alone_and_in_a_batch(model: MultimodalDLM) -> None:
    one = asked(images()[0], "What is it?")
    two = asked(images()[1], "and", images()[2], "differ how?")
    both = mmdlm.answer(model, [one, two], length=8, details=True)
    for found, alone in zip(both, (one, two), strict=True):
        assert found.tokens == mmdlm.answer(model, alone, length=8, details=True).tokens
    assert model.spec.stop_ids == (END,)


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_an_image_is_encoded_once_in_a_conversation(
    model: MultimodalDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda kind, items: encoded.append(len(items)) or encode(kind, items)
    )
    turns = asked(images()[0], "What is it?")
    features: dict = {}
    first = mmdlm.generate(model, turns, length=8, features=features, details=True)
    more = [*turns, {"role": "assistant", "content": "It"}, {"role": "user", "content": "Sure?"}]
    second = mmdlm.generate(model, more, length=8, features=features, details=True)
    assert encoded == [1]
    assert second.tokens == mmdlm.generate(model, more, length=8, details=True).tokens

    session, done = mmdlm.Session(model, [BlockCache(), EndOfText()]), {}
    key = session.add(packed(model, turns), keep=True)
    encoded.clear()
    for request in (None, more):
        if request is not None:
            session.extend(key, packed(model, request))
        while session.keys:
            done |= {e.key: e for e in session.step() if isinstance(e, Finished)}
        assert encoded == []
        want = first if request is None else second
        assert done[key].tokens[: len(want.tokens)].tolist() == list(want.tokens)


def packed(model: MultimodalDLM, messages: list[dict[str, Any]]) -> Packed:
    """The conversation with an answer of 8 tokens."""
    slot = assistant(Slot(length=8))
    return model.processor.pack([Example((*conversation(messages), slot))], chat=True)


def test_several_steps_may_be_joined_in_a_block(model: MultimodalDLM) -> None:
    decoded = mmdlm.decode(model, prompt(model, 3), 8, [TopK(4), BlockCache()])
    assert int(decoded.history.step.max()) < 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -3}, "vision_feature_layer is -3, expected -1 or -2"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"vision_aspect_ratio": "wide"}, "vision_aspect_ratio is 'wide'; expected anyres_max_N"),
        ({"vision_config": {**TOWER, "hidden_size": 64}}, r"is \[32\], expected \[64\]"),
        ({"vision_config": {**TOWER, "image_size": 60}}, "images of 54 pixels, but the tower"),
    ],
)
def test_settings_that_are_not_supported(
    changes: dict[str, Any],
    message: str,
    theirs: LlavaOnevisionForConditionalGeneration,
    tmp_path: Path,
) -> None:
    folder = published(tmp_path, theirs.state_dict(), config_of(theirs) | changes)
    with pytest.raises(ValueError, match=message):
        mmdlm.load(folder, device="cpu")


def test_a_missing_projector_and_a_video_are_rejected(
    theirs: LlavaOnevisionForConditionalGeneration, model: MultimodalDLM, tmp_path: Path
) -> None:
    weights = {n: w for n, w in theirs.state_dict().items() if "projector" not in n}
    with pytest.raises(ValueError, match="the checkpoint holds no projector"):
        mmdlm.load(published(tmp_path, weights, config_of(theirs)), device="cpu")
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What?"}]
    with pytest.raises((ValueError, TypeError), match="video"):
        mmdlm.answer(model, [{"role": "user", "content": content}], length=4)
