"""LaViDa (Dream backbone) from a folder in the published layout: equal to the reference's run.

The golden folder was made by jacklishufan/LaViDa (see its README.md).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import describe
from mmdlm.decoding import preset
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.time_shift import TimeShift
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.plans.first_token import FirstToken
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM
from tests.objectives.recorded import preset as objective
from tests.systems.letters import spelled
from tests.systems.llava_golden import (
    WRITTEN,
    Golden,
    asked,
    is_answer,
    with_tokenizer,
)

GOLDEN = Golden(
    "lavida_dream",
    {"architectures": ["LlavaDreamForMaskedDiffusion"], "model_type": "llava_dream"},
)
CONFIG, TENSORS, LENGTH, IMAGES = GOLDEN.config, GOLDEN.tensors, GOLDEN.length, GOLDEN.images
RUNS = sorted(CONFIG["gens"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(GOLDEN.published(tmp_path_factory.mktemp("dream")), device="cpu")


def strategies(run: dict[str, Any]) -> list[Strategy]:
    """Arguments of the reference's `diffusion_generate` as strategies."""
    steps = int(run["steps"] * run.get("step_ratio", 1))
    return [
        *([PrefixLM(), FirstToken()] if run.get("prefix_lm") else []),
        Margin() if run["alg"] == "topk_margin" else Entropy(),
        TimeShift(steps, run["schedule_kwargs"]["shift"])
        if "schedule" in run
        else Timesteps(steps),
    ]


def test_features_and_prompt_equal_reference(model: MultimodalDLM) -> None:
    assert (model.system, model.spec.shift) == ("lavida_dream", True)
    adapter = model.adapters["image"]
    for number, image in enumerate(IMAGES):
        item = model.processor.prepare("image", image)
        sequence = GOLDEN.laid_out(model, [number])
        with torch.no_grad():
            features = model.encoders["image"]([item])
            found = {
                "tower_features": features.tokens[:, ::16],
                "projected": adapter.project(features).tokens[:, ::16],
                "pooled": adapter(features).tokens[:, ::4],
                "inputs_embeds": model.spliced(
                    sequence, torch.arange(sequence.tokens.shape[1])[None]
                )[0],
            }
        pixels = TENSORS[f"img{number}.pixel_values"]
        torch.testing.assert_close(item.tensor, pixels, atol=1e-6, rtol=0)
        for part, got in found.items():
            torch.testing.assert_close(got, TENSORS[f"img{number}.{part}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "cached"])
def test_logits_of_a_masked_answer_equal_reference(model: MultimodalDLM, kind: str) -> None:
    for number in range(3):
        sequence = GOLDEN.laid_out(model, [number], length=LENGTH)
        if kind == "cached":  # the prompt does not see the answer
            sequence = replace(sequence, level=is_answer(sequence).long())
        with torch.no_grad():  # the reference's are not shifted
            got = model.backbone.head(model.hidden(sequence, is_answer(sequence)))
            aligned = model.logits_at(sequence, is_answer(sequence))
        expected = TENSORS[f"img{number}.logits_{kind}_answer"]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(aligned[1:], got[:-1])
        if kind == "cached":
            assert int(aligned[0].argmax()) == TENSORS[f"img{number}.prefill_first_token"].item()


@pytest.mark.parametrize("run", RUNS)
def test_every_step_of_every_run_equals_reference(model: MultimodalDLM, run: str) -> None:
    given = CONFIG["gens"][run]
    for number in range(3):
        prompt = GOLDEN.laid_out(model, [number])
        decoded = mmdlm.decode(model, prompt, LENGTH, strategies(given))
        history = TENSORS[f"img{number}.hist.{run}"]
        found = GOLDEN.canvases(decoded, 0)
        if given.get("prefix_lm"):  # here the forward over the prompt is a step
            first = TENSORS[f"img{number}.prefill_first_token"]
            assert found[0].tolist() == [*first.tolist(), *[GOLDEN.mask] * (LENGTH - 1)]
            found = found[1:]
        assert torch.equal(found, history)
        assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS[f"img{number}.gen.{run}"])
        assert decoded.nfe == len(history) + bool(given.get("prefix_lm"))


def test_without_first_token_the_first_token_competes_with_the_others(
    model: MultimodalDLM,
) -> None:
    prompt = GOLDEN.laid_out(model, [0])
    rest = [PrefixLM(), Margin(), Timesteps(8)]
    alone = mmdlm.decode(model, prompt, LENGTH, [FirstToken(), *rest])
    sound = mmdlm.decode(model, prompt, LENGTH, rest)
    assert alone.tokens[0, -LENGTH] == sound.tokens[0, -LENGTH]
    assert (alone.history.step[0] == 0).nonzero().tolist() == [[0]]
    assert int(sound.history.step[0, 0]) > 0
    assert (alone.nfe, sound.nfe) == (9, 8)


def test_prompts_of_one_and_two_images_agree_alone_and_in_a_batch(model: MultimodalDLM) -> None:
    for run in ("cache_shift", "nocache"):
        chosen = strategies(CONFIG["gens"][run])
        both = mmdlm.decode(model, GOLDEN.laid_out(model, [2], [1, 0]), LENGTH, chosen)
        alone = mmdlm.decode(model, GOLDEN.laid_out(model, [1, 0]), LENGTH, chosen)
        assert torch.equal(both.tokens[0, -LENGTH:], TENSORS[f"img2.gen.{run}"])
        assert torch.equal(GOLDEN.canvases(both, 1), GOLDEN.canvases(alone, 0))


def test_losses_of_its_objective_equal_reference(model: MultimodalDLM) -> None:
    loss, logits = GOLDEN.trained(model, "train.full", objective("lavida"))
    torch.testing.assert_close(loss, TENSORS["train.full.loss"][0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits, TENSORS["train.full.logits_at_masked"], atol=2e-4, rtol=0)


def test_the_checkpoint_decodes_as_the_released_evaluation(model: MultimodalDLM) -> None:
    for task in ("caption", "answer"):
        found = preset.strategies(model.preset[task]["strategies"])
        assert found == [FirstToken(), PrefixLM(), TimeShift(shift=0.33), Margin()]


def test_export_to_the_published_layout_is_bit_equal(model: MultimodalDLM, tmp_path: Path) -> None:
    checkpoint.save_published(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == GOLDEN.weights.keys()
    for name, tensor in GOLDEN.weights.items():
        assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in GOLDEN.flat()} == GOLDEN.flat()
    assert describe(mmdlm.load(tmp_path, device="cpu")) == describe(model)


CONTROL = {
    "<|im_start|>": 100,
    "<|im_end|>": 101,
    "<|mask|>": CONFIG["ids"]["mask"],
    "<|endoftext|>": CONFIG["ids"]["eos"],
}


def test_prompts_are_chatml_with_the_newline_after_an_image(tmp_path: Path) -> None:
    model = mmdlm.load(with_tokenizer(GOLDEN.published(tmp_path), CONTROL), device="meta")
    parts = model.processor.prompt(asked(IMAGES[0], "What is it?"))
    written = spelled(parts, CONTROL, WRITTEN)
    system, _, rest = written.partition("<|im_end|>")
    assert system.startswith("<|im_start|>system\nYou are a helpful language and vision assistant.")
    assert rest == ("\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
    assert model.spec.stop_ids == (101,)
