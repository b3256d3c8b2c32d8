"""Lumina-DiMOO from a folder in the published layout: reads, draws and edits images as codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import build, describe
from mmdlm.chat import Template
from mmdlm.decoding.caches.max_logit_cache import MaxLogitCache
from mmdlm.decoding.commits.random_top_k import RandomTopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.state import Streams
from mmdlm.layout import Row
from mmdlm.loading.keymap import locate, shapes
from mmdlm.model import MultimodalDLM
from mmdlm.systems.lumina_dimoo import DRAW, EDIT, SYSTEM, LuminaDiMOO
from tests.systems import letters

VISION = Path(__file__).parents[1] / "golden" / "vision"
GOLDEN = VISION / "lumina_dimoo"
SETTINGS = json.loads((GOLDEN / "config.json").read_text())
TENSORS = load_file(GOLDEN / "tensors.safetensors")
SPECIAL = {
    "newline_token": SETTINGS["newline"],
    "image_token_offset": SETTINGS["text_vocab"],
    "answer_start": SETTINGS["boa"],
    "answer_end": SETTINGS["eoa"],
    "boi": SETTINGS["boi"],
    "eoi": SETTINGS["eoi"],
    "uncondition": 61,
}
CONTROL = {
    **{"<user>": 1, "</user>": 2, "<system>": 53, "</system>": 54},
    **{"<answer>": 56, "</answer>": 57, "<uncondition>": 61, "<|mdm_mask|>": 60},
}
LETTERS = "GYATEmoty.,"  # of the system messages, beyond small letters


def published(folder: Path) -> Path:
    """A folder as Lumina-DiMOO is published: LLaDA's files, and a VQModel in `vqvae`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SETTINGS["llm"] | {
        "architectures": ["LLaDAForMultiModalGeneration"],
        "model_type": "llada",
        "eos_token_id": 63,
        "pad_token_id": 63,
        "special_tokens": SPECIAL,
        **{"read_size": 64, "draw_size": 8, "edit_size": 64},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(GOLDEN / "weights.safetensors"), folder / "model.safetensors")
    letters.write(folder, 64, CONTROL, " .,GYAE")
    sub = folder / "vqvae"
    sub.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (sub / name).write_bytes((VISION / "vqmodel" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def model(folder) -> MultimodalDLM:
    return mmdlm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def bare(folder) -> MultimodalDLM:
    """The model with the golden's prompt, which has no system message."""
    made = mmdlm.load(folder, device="cpu")
    made.drawing = replace(made.drawing, system=None)
    made.template = Template(chat=made.template.chat, last=("image",))
    return made


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def text(model: MultimodalDLM, written: str) -> list[int]:
    """Ids of a prompt's text, control tokens included."""
    return model.tokenizer.encode(written)


def test_every_tensor_is_read(model) -> None:
    assert model.system == "lumina_dimoo"
    assert (model.report.missing, model.report.ignored) == ((), {})
    assert model.drawing.ids == range(64, 80)
    assert 57 in model.spec.stop_ids
    assert model.spec.context == 8192
    torch.testing.assert_close(
        model.logits(TENSORS["prompt"]), TENSORS["logits"], atol=2e-4, rtol=0
    )


def test_published_sizes_are_those_of_the_checkpoint() -> None:
    config = {
        **{"architectures": ["LLaDAForMultiModalGeneration"], "embedding_size": 134656},
        **{"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288},
        **{"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms"},
        **{"rope": True, "weight_tying": False, "max_sequence_length": 4096},
    }
    plan = LuminaDiMOO.read(config, {"vqvae.encoder.conv_in.weight"})
    drawing = plan.outputs["image"]
    assert (drawing["first"], drawing["count"], drawing["stride"]) == (126356, 8192, 16)
    assert (drawing["newline"], drawing["begin"], drawing["end"]) == (
        126084,
        [126349],
        [126350, 126355],
    )
    held = shapes(build(plan))
    assert held["encoders.image.codebook.weight"] == (8192, 64)
    assert set(held) == {
        place.ours for place in locate(held, LuminaDiMOO.keys(plan), plan.spec.transformer).values()
    }


@pytest.mark.parametrize("name", sorted(SETTINGS["gens"]))
def test_draws_the_golden_codes(bare, name) -> None:
    given = SETTINGS["gens"][name]
    steps = given["timesteps"]
    chosen = [
        CFG(given["cfg_scale"]),
        RandomTopK(steps, temperature=given["temperature"], sampler="lumina"),
    ]
    if given.get("use_cache"):
        ratios = (given["cache_ratio"], given["warmup_ratio"], given["refresh_interval"])
        chosen.append(MaxLogitCache(*ratios, steps))
    # The ids 5 to 8 of the golden prompt are the letters c to f.
    drawn = mmdlm.draw(
        bare, "cdef", size=(12, 8), seed=given["seed"], strategies=chosen, details=True
    )
    assert torch.equal(drawn.codes.flatten()[None] + 64, TENSORS[f"t2i.{name}"])
    assert drawn.image.size == (12, 8)
    assert drawn.forwards == steps * (2 if given["cfg_scale"] else 1)


def test_the_prompt_is_the_published_one(model) -> None:
    seen = {}

    def watch(rows, held=None):
        seen.setdefault("rows", []).append([part.tolist() for part in rows[0].parts])
        return type(model).embed(model, rows, held)

    model.embed = watch
    try:
        mmdlm.draw(model, "abc", size=(12, 8), steps=2, seed=0)
    finally:
        del model.embed
    start = f"<system>{DRAW}</system><user>"
    assert seen["rows"][0] == [text(model, f"{start}abc</user><answer>")]
    assert seen["rows"][1] == [text(model, f"{start}<uncondition></user><answer>")]


def test_editing_compares_with_the_prompt_without_text_and_without_image(model) -> None:
    image, chosen = picture(4, (96, 48)), [RandomTopK(4, sampler="lumina")]
    drawn = mmdlm.draw(model, "abc", image=image, steps=4, seed=3, details=True)
    codec = replace(model.encoders["image"].preprocess, size=64)(image)
    (codes,) = model.encode("image", [codec])
    rows, columns = (side // 2 for side in codec.tensor.shape[1:])
    assert drawn.codes.shape == (rows, columns)
    assert codes.tolist()[0] == 58
    assert codes.tolist()[-1] == 59
    assert (codes[1:-1].view(rows, columns + 1)[:, -1] == 55).all()
    start, end = f"<system>{EDIT}</system><user>", text(model, "</user><answer>")

    def sequence(written: str, *more: torch.Tensor):
        parts = (torch.tensor(text(model, start + written)), *more, torch.tensor(end))
        return model.embed([Row(parts)])

    canvas = model.drawing.canvas(torch.full((rows, columns), -1), 60)
    found = decode(
        model,
        sequence("abc", codes),
        len(canvas),
        [CFG(2.5, 4.0), *chosen],
        generator=Streams.exactly([torch.Generator().manual_seed(3)]),
        columns=slice(64, 80),
        canvas=canvas[None],
        alternatives={"text": sequence("<uncondition>", codes), "image": sequence("abc")},
    )
    assert torch.equal(
        model.drawing.decode(found.tokens[0, -len(canvas) :], (rows, columns)), drawn.codes
    )
    assert drawn.forwards == 4 * 3


@pytest.mark.filterwarnings("ignore:.*filled the canvas")
def test_an_image_of_a_question_follows_its_text(model) -> None:
    image = picture(1, (64, 32))
    parts = model.processor.prompt(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}],
            }
        ]
    )
    assert parts[0].tolist() == text(model, f"<system>{SYSTEM}</system><user>what")
    assert parts[1].kind == "image"
    assert parts[2].tolist() == text(model, "</user><answer>")
    images = [image, picture(2), image]
    found = mmdlm.answer(model, ["what", "why", "who"], images=images, length=5)
    for question, image, answer in zip(("what", "why", "who"), images, found, strict=True):
        assert mmdlm.answer(model, question, image, length=5) == answer


def test_images_of_unequal_size_in_one_call(model) -> None:
    texts, images, seeds = ["ab", "cd"], [picture(0, (128, 32)), picture(1)], [5, 6]
    together = mmdlm.draw(model, texts, image=images, seed=seeds, steps=2, details=True)
    for given, image, seed, found in zip(texts, images, seeds, together, strict=True):
        alone = mmdlm.draw(model, given, image=image, seed=seed, steps=2, details=True)
        assert torch.equal(found.codes, alone.codes)
        assert found.image.size == image.size


def test_inpainting_keeps_the_codes_outside_of_the_mask(model) -> None:
    image, mask = picture(0), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    drawn = mmdlm.draw(model, "ab", image=image, mask=mask, seed=1, steps=3, details=True)
    given = model.encoders["image"].encode(model.processor.prepare("image", image).tensor[None])[0]
    assert torch.equal(drawn.codes[:, 16:], given[:, 16:])
    assert bool((drawn.step[:, :16] >= 0).all())
    assert drawn.image.size == (64, 64)


def test_the_cache_computes_less_and_may_be_chosen(model) -> None:
    cache = MaxLogitCache(steps=12, warmup=0.1, interval=6)
    chosen = [CFG(1.0), RandomTopK(12, sampler="lumina")]
    computed: list[int] = []
    run = model.run

    def counted(sequence, rows, *given, **more):
        computed.append(rows.stop - rows.start if isinstance(rows, slice) else rows.shape[1])
        return run(sequence, rows, *given, **more)

    model.run = counted
    try:
        drawn = mmdlm.draw(model, "ab", size=16, seed=0, strategies=[*chosen, cache], details=True)
        cached = sum(computed)
        computed.clear()
        plain = mmdlm.draw(model, "ab", size=16, seed=0, strategies=chosen, details=True)
    finally:
        del model.run
    assert drawn.forwards == plain.forwards == 24
    assert cached < 0.6 * sum(computed)


def test_written_back_it_is_the_same_folder(model, folder, tmp_path) -> None:
    checkpoint.save_published(model, tmp_path / "back")
    files = ("model.safetensors", "vqvae/diffusion_pytorch_model.safetensors")
    for was, now in zip(files, ("model.safetensors", "vqvae/model.safetensors"), strict=True):
        old, new = load_file(folder / was), load_file(tmp_path / "back" / now)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    again = mmdlm.load(tmp_path / "back")
    assert describe(again) == describe(model)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert old.items() <= new.items()


def test_an_end_of_another_tokenizer_is_refused(tmp_path) -> None:
    folder = published(tmp_path / "other")
    letters.write(folder, 64, CONTROL | {"</answer>": 58}, " .,GYAE")
    with pytest.raises(ValueError, match="</answer> has id 58 in the tokenizer, expected 57"):
        mmdlm.load(folder)
