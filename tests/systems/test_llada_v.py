"""LLaDA-V from a folder in the published layout: equal to the reference's run.

The golden folder was made by ML-GSAI/LLaDA-V (see its README.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import describe
from mmdlm.decoding import preset
from mmdlm.decoding.caches.dllm_cache import DLLMCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.stop_sequences import StopSequences
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.systems.llada_v import LLaDAV
from tests.objectives.recorded import preset as objective
from tests.systems.letters import spelled
from tests.systems.llava_golden import (
    WRITTEN,
    Golden,
    asked,
    is_answer,
    with_tokenizer,
)

GOLDEN = Golden("llada_v", {"architectures": ["LlavaLLaDAModelLM"], "model_type": "llava_llada"})
CONFIG, TENSORS, MASK = GOLDEN.config, GOLDEN.tensors, GOLDEN.mask
BANNED = tuple(CONFIG["ids"][name] for name in ("eos", "bos", "start_header", "end_header"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(GOLDEN.published(tmp_path_factory.mktemp("llada_v")), device="cpu")


@pytest.fixture(scope="module")
def prompts(model: MultimodalDLM) -> list[Sequence]:
    """The prompt of each image."""
    with torch.no_grad():
        return [GOLDEN.laid_out(model, [i]) for i in range(3)]


def test_images_and_prompts_equal_reference(model: MultimodalDLM, prompts: list[Sequence]) -> None:
    assert model.system == "llada_v"
    for number, sequence in enumerate(prompts):
        name = f"img{number}"
        item = model.processor.prepare("image", GOLDEN.images[number])
        assert list(item.tensor.shape) == TENSORS[f"{name}.pixel_shape"].tolist()
        pixels = TENSORS[f"{name}.pixel_values"]
        torch.testing.assert_close(item.tensor[..., ::2, ::2], pixels, atol=1e-6, rtol=0)
        length = sequence.tokens.shape[1]
        assert length == TENSORS[f"{name}.embeds_len"].item()
        with torch.no_grad():
            features = model.encoders["image"]([item])
            projected = model.adapters["image"].project(features).tokens[:, ::64]
            embedded = model.spliced(sequence, torch.arange(length)[None])[0]
        ends = torch.cat([embedded[:40], embedded[-40:]])
        for got, part in (
            (features.tokens[:, ::64], "tower_features"),
            (projected, "projected"),
            (embedded[::5], "inputs_embeds"),
            (ends, "inputs_embeds_head_tail"),
        ):
            torch.testing.assert_close(got, TENSORS[f"{name}.{part}"], atol=5e-5, rtol=0)


def test_logits_of_a_masked_answer_equal_reference(model: MultimodalDLM) -> None:
    for number in range(3):
        sequence = GOLDEN.laid_out(model, [number], length=GOLDEN.length)
        with torch.no_grad():
            got = model.logits_at(sequence, is_answer(sequence))
        expected = TENSORS[f"img{number}.logits_answer"]
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=0)


def strategies(run: dict[str, Any]) -> list[Strategy]:
    """Arguments of the reference's `generate_with_embeds` as strategies."""
    chosen: list[Strategy] = [Suppress(BANNED), TopK(run["steps"])]
    if "dllm_cache" in run:
        chosen.append(DLLMCache(*run["dllm_cache"]))
    if "stopping_criteria" in run:
        stops = tuple((int(text),) for text in run["stopping_criteria"])
        return [*chosen, StopSequences(stops)]
    return [*chosen, *([Blocks(run["block_length"])] if run["block_length"] < 16 else [])]


SMALL = {"dllm_cache": 1, "stop": 1}
"""The first image of each run whose test is fast; 2 in the others."""
RUNS = [
    pytest.param(run, number, marks=[pytest.mark.slow] if number < SMALL.get(run, 2) else [])
    for run in sorted(CONFIG["gens"])
    for number in range(3)
]


@pytest.mark.parametrize(("run", "number"), RUNS)
def test_every_run_equals_reference(model: MultimodalDLM, run: str, number: int) -> None:
    given = CONFIG["gens"][run]
    suffix = [int(i) for i in given.get("generation_suffix", "").split()]
    canvas = torch.tensor([[MASK] * given["gen_length"] + suffix])
    prompt = GOLDEN.laid_out(model, [number])
    decoded = mmdlm.decode(model, prompt, canvas.shape[1], strategies(given), canvas=canvas)
    expected = TENSORS[f"img{number}.gen.{run}"]
    answer = decoded.tokens[0, prompt.tokens.shape[1] :]
    assert torch.equal(answer[: len(expected)], expected)
    if len(expected) < given["gen_length"]:  # stopped, and cut there
        assert answer[len(expected)] == int(given["stopping_criteria"][0])
        assert decoded.nfe < given["steps"]


def test_a_mixed_batch_equals_its_rows(model: MultimodalDLM) -> None:
    both, alone = GOLDEN.laid_out(model, [2], [2, 0]), GOLDEN.laid_out(model, [2, 0])
    for cache in (PrefixCache(), DualCache(), DLLMCache(3, 2, 0.5)):
        chosen = [Suppress(BANNED), Blocks(4), TopK(4), cache]
        batch = mmdlm.decode(model, both, 8, chosen)
        single = mmdlm.decode(model, alone, 8, chosen)
        assert torch.equal(batch.tokens[1, -8:], single.tokens[0, -8:])
        assert batch.history.step[1].tolist() == single.history.step[0].tolist()


def test_caches_that_recompute_everything_equal_no_cache(
    model: MultimodalDLM, prompts: list[Sequence]
) -> None:
    ban = Suppress(BANNED)
    plain = mmdlm.decode(model, prompts[2], 16, [ban, TopK(16)])
    assert torch.equal(plain.tokens[0, -16:], TENSORS["img2.gen.plain"])
    for cache in (DLLMCache(1, 1), DLLMCache(1, 9, 1.0)):
        found = mmdlm.decode(model, prompts[2], 16, [ban, TopK(16), cache])
        assert torch.equal(found.tokens, plain.tokens)
        torch.testing.assert_close(found.history.confidence, plain.history.confidence)


def test_loss_of_its_objective_equals_reference(model: MultimodalDLM) -> None:
    loss, logits = GOLDEN.trained(model, "train", objective("llada_v"))
    torch.testing.assert_close(loss, TENSORS["train.loss"][0], atol=3e-4, rtol=1e-4)
    torch.testing.assert_close(logits, TENSORS["train.logits_at_masked"], atol=3e-4, rtol=0)


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
    "<|startoftext|>": CONFIG["ids"]["bos"],
    "<|start_header_id|>": CONFIG["ids"]["start_header"],
    "<|end_header_id|>": CONFIG["ids"]["end_header"],
    "<|eot_id|>": CONFIG["ids"]["eot"],
    "<|mdm_mask|>": MASK,
    "<|endoftext|>": CONFIG["ids"]["eos"],
}


def test_only_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    model = mmdlm.load(with_tokenizer(GOLDEN.published(tmp_path), CONTROL), device="meta")
    found = preset.strategies(model.preset["answer"]["strategies"])
    assert found == [Suppress(BANNED), EndOfText()]
    assert CONFIG["ids"]["eot"] in model.spec.stop_ids
    parts = model.processor.prompt(asked(GOLDEN.images[0], "What is it?"))
    written = spelled(parts, CONTROL, WRITTEN)
    assert written.endswith(
        "user<|end_header_id|>\n\n<image>What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("dropped", "changes", "message"),
    [
        ("model.mm_projector.", {}, r"LLaDA-V: the checkpoint holds no projector"),
        (
            "model.vision_tower.",
            {"mm_vision_tower": "google/another", "vision_config": GOLDEN.sizes},
            r"LLaDA-V: the checkpoint holds no vision tower .*'google/another'",
        ),
        (
            "nothing",
            {"mm_vision_tower": "google/another", "vision_config": None},
            "the sizes of tower 'google/another' are unknown",
        ),
        (
            "nothing",
            {"vision_config": {**GOLDEN.sizes, "intermediate_size": 64}},
            r"fc1.weight is \[48, 32\], expected \[64, 32\]",
        ),
        ("nothing", {"mm_hidden_size": 64}, "mm_hidden_size is 64, but the width of the tower"),
    ],
)
def test_missing_or_wrong_parts_are_rejected(
    dropped: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    weights = {n: w for n, w in GOLDEN.weights.items() if not n.startswith(dropped)}
    with pytest.raises(ValueError, match=message):
        mmdlm.load(GOLDEN.published(tmp_path, weights, **changes), device="cpu")


def test_the_published_tower_is_known_by_its_name() -> None:
    sizes = {"vision_config": None, "mm_hidden_size": 1152}
    pinpoints = {"image_grid_pinpoints": "(1x1),...,(6x6)"}
    named = {"mm_vision_tower": "google/siglip2-so400m-patch14-384"}
    blueprint = LLaDAV.read({**GOLDEN.flat(), **sizes, **pinpoints, **named}, set())
    encoder = blueprint.encoders["image"]["init_args"]
    assert encoder["encoder"]["init_args"]["layers"] == 26
    adapter = blueprint.adapters["image"]["init_args"]
    assert (adapter["most_tiles"], adapter["pool"]) == (4, None)
