"""DiffusionGemma with images: equal to transformers' own model and processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import mmdlm
from encoders.gemma_vision import GemmaInput
from mmdlm import checkpoint
from mmdlm.blueprint import describe
from mmdlm.decoding.commits.uniform_canvas import UniformCanvas
from mmdlm.layout import Row
from mmdlm.messages import Media, Message, Text
from mmdlm.model import MultimodalDLM
from tests.backbones.test_diffusion_gemma import CANVAS, Draws, folder, oracle, prompt_of

__all__ = ["folder", "oracle"]

BOI, EOI, IMAGE = 61, 62, 60
TOKENS = 12
PICTURES = [
    np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for i, shape in enumerate([(40, 60), (70, 20)])
]


@pytest.fixture(scope="module")
def seeing(folder: Path) -> MultimodalDLM:  # noqa: F811
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": TOKENS}))
    return mmdlm.load(folder, device="cpu")


@pytest.mark.parametrize("shape", [(40, 60), (333, 700), (900, 31), (16, 400), (512, 512)])
@pytest.mark.parametrize("tokens", [70, 280])
def test_pixels_equal_those_of_transformers(shape: tuple[int, int], tokens: int) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = GemmaInput(tokens=tokens)(pixels)
    made = Gemma4ImageProcessorPil(max_soft_tokens=tokens)(
        Image.fromarray(pixels), return_tensors="pt"
    )
    real = (made["image_position_ids"][0] >= 0).all(-1)
    assert int(real.sum()) == len(got.tensor) == got.grid[0] * got.grid[1]
    assert made["image_position_ids"][0][real][-1].tolist() == [got.grid[1] - 1, got.grid[0] - 1]
    expected = made["pixel_values"][0][real]
    torch.testing.assert_close(got.tensor, expected, atol=1 / 255 + 1e-6, rtol=0)


def inputs(model: MultimodalDLM) -> tuple[Tensor, Tensor]:
    """Patches and their places of both images as transformers takes them."""
    items = [model.processor.prepare("image", each) for each in PICTURES]
    most = max(len(item.tensor) for item in items)
    pixels = torch.zeros(2, most, items[0].tensor.shape[1])
    places = torch.full((2, most, 2), -1)
    for i, item in enumerate(items):
        pixels[i, : len(item.tensor)] = item.tensor
        at = torch.arange(len(item.tensor))
        places[i, : len(at)] = torch.stack([at % item.grid[1], at // item.grid[1]], -1)
    return pixels, places


@torch.inference_mode()
def test_features_equal_transformers(oracle: nn.Module, seeing: MultimodalDLM) -> None:  # noqa: F811
    pixels, places = inputs(seeing)
    expected = oracle.model.encoder.get_image_features(pixels, places).pooler_output
    items = [seeing.processor.prepare("image", each) for each in PICTURES]
    together = seeing.encode("image", items)
    torch.testing.assert_close(torch.cat(together), expected, atol=1e-5, rtol=0)
    alone = [seeing.encode("image", [item])[0] for item in items]
    torch.testing.assert_close(torch.cat(alone), expected, atol=1e-5, rtol=0)


def test_ids_after_two_images_equal_transformers_with_the_same_draws(
    oracle: nn.Module,  # noqa: F811
    seeing: MultimodalDLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    pixels, places = inputs(seeing)
    with torch.inference_mode():
        seen = seeing.encode(
            "image", [seeing.processor.prepare("image", each) for each in PICTURES]
        )
    pieces, ids = [], []
    for number, tokens in enumerate(seen):
        text = torch.cat([prompt_of(3, number), torch.tensor([BOI])])
        pieces += [text, tokens, torch.tensor([EOI])]
        ids += [*text.tolist(), *[IMAGE] * len(tokens), EOI]
    pieces.append(prompt_of(4, 9))
    ids = torch.tensor([[*ids, *pieces[-1].tolist()]])
    rows = seeing.arrange([Row(tuple(pieces))])
    draws = Draws(monkeypatch)
    rule = UniformCanvas(4, 1.0, confident=0.0)
    generator = torch.Generator().manual_seed(5)
    got = mmdlm.decode(seeing, rows, 2 * CANVAS, [rule], generator=generator)
    draws.replay(monkeypatch)
    expected = oracle.generate(
        input_ids=ids,
        pixel_values=pixels,
        image_position_ids=places,
        mm_token_type_ids=(ids == IMAGE).long(),
        max_new_tokens=2 * CANVAS,
        max_denoising_steps=4,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=1.0),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=1e-9,
        eos_token_id=None,
    )
    found = getattr(expected, "sequences", expected)[0, ids.shape[1] :]
    assert got.tokens[0, -2 * CANVAS :].tolist() == found.tolist()


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_conversations_with_images_agree_alone_and_in_a_batch(seeing: MultimodalDLM) -> None:
    def asked(*images: int) -> list[Message]:
        parts: list[Any] = [Text(prompt_of(3, 7))]
        for i in images:
            parts += [Text(torch.tensor([BOI])), Media("image", PICTURES[i])]
            parts.append(Text(torch.tensor([EOI])))
        return [Message("raw", (*parts, Text(prompt_of(2, 8))))]

    questions = [asked(0), asked(1, 0), asked(1)]
    chosen = [UniformCanvas(3, 1.0)]
    options = {"length": 12, "strategies": chosen, "details": True, "seed": 3}
    together = mmdlm.answer(seeing, questions, **options)
    for question, found in zip(questions, together, strict=True):
        alone = mmdlm.answer(seeing, question, **options)
        assert (found.tokens, found.step) == (alone.tokens, alone.step)
    assert len({found.tokens for found in together}) > 1


def test_export_equals_the_folder(folder: Path, seeing: MultimodalDLM, tmp_path: Path) -> None:  # noqa: F811
    checkpoint.save_published(seeing, tmp_path)
    was, now = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert now.keys() == was.keys()
    assert all(torch.equal(now[name], was[name]) for name in was)
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path))
    assert {key: after[key] for key in before if "dtype" not in key} == {
        key: value for key, value in before.items() if "dtype" not in key
    }
    assert describe(mmdlm.load(tmp_path, device="cpu")) == describe(seeing)
