"""LaViDa (LLaDA backbone) from a folder in the published layout: equal to the reference's run.

The golden folder holds tiny random weights under the published names; its images, prompts and
runs were made by jacklishufan/LaViDa (see its README.md).
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
from encoders.vit import ViT
from mmdlm import checkpoint
from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.decoding import preset
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.time_shift import TimeShift
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.loading.keymap import locate, shapes
from mmdlm.messages import Example, Media, Message, Text, conversation
from mmdlm.model import MultimodalDLM
from mmdlm.systems.lavida import LaViDa
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
    "lavida_llada",
    {"architectures": ["LlavaLladaForMaskedDiffusion"], "model_type": "llava_llada"},
)
CONFIG, TENSORS, WEIGHTS = GOLDEN.config, GOLDEN.tensors, GOLDEN.weights
LENGTH, MASK, IMAGES, SIZES = GOLDEN.length, GOLDEN.mask, GOLDEN.images, GOLDEN.sizes
flat, published, laid_out, canvases = (
    *(GOLDEN.flat, GOLDEN.published),
    *(GOLDEN.laid_out, GOLDEN.canvases),
)
RUNS = sorted(CONFIG["gens"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(published(tmp_path_factory.mktemp("lavida")), device="cpu")


def strategies(run: dict[str, Any]) -> list[Strategy]:
    """Arguments of the reference's `generate` as strategies."""
    blocks = run["max_new_tokens"] // run["block_length"]
    steps = run.get("step_per_block") or int(run["block_length"] * run["step_ratio"])
    chosen: list[Strategy] = [Blocks(run["block_length"])] if blocks > 1 else []
    if run.get("prefix_lm"):
        chosen.append(PrefixLM())
    if run.get("remasking") == "margin":
        chosen.append(Margin())
    if "schedule" in run:
        shift = run.get("schedule_kwargs", {}).get("shift", 3.0)
        return [*chosen, TimeShift(steps * blocks, shift, run["schedule"])]
    return [*chosen, TopK(steps * blocks)]


@pytest.mark.parametrize("number", range(3))
def test_features_and_prompt_equal_reference(model: MultimodalDLM, number: int) -> None:
    name = f"img{number}"
    item = model.processor.prepare("image", IMAGES[number])
    torch.testing.assert_close(item.tensor, TENSORS[f"{name}.pixel_values"], atol=1e-6, rtol=0)
    adapter = model.adapters["image"]
    sequence = laid_out(model, [number])
    everything = torch.arange(sequence.tokens.shape[1])[None]
    with torch.no_grad():
        features = model.encoders["image"]([item])
        projected, pooled = adapter.project(features).tokens, adapter(features).tokens
        embedded = model.spliced(sequence, everything)[0]
    for got, part in (
        (features.tokens[:, ::16], "tower_features"),
        (projected[:, ::16], "projected"),
        (pooled[:, ::4], "pooled"),
        (embedded, "inputs_embeds"),
    ):
        torch.testing.assert_close(got, TENSORS[f"{name}.{part}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["full", "cached"])
def test_logits_of_a_masked_answer_equal_reference(
    model: MultimodalDLM, kind: str, number: int
) -> None:
    sequence = laid_out(model, [number], length=LENGTH)
    if kind == "cached":  # the prompt does not see the answer
        sequence = replace(sequence, level=is_answer(sequence).long())
    with torch.no_grad():
        got = model.logits_at(sequence, is_answer(sequence))
    expected = TENSORS[f"img{number}.logits_{kind}_answer"]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("number", range(3))
def test_every_step_of_every_run_equals_reference(
    model: MultimodalDLM, number: int, run: str
) -> None:
    chosen = strategies(CONFIG["gens"][run])
    decoded = mmdlm.decode(model, laid_out(model, [number]), LENGTH, chosen)
    assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS[f"img{number}.gen.{run}"])
    assert torch.equal(canvases(decoded, 0), TENSORS[f"img{number}.hist.{run}"])
    assert decoded.nfe == len(TENSORS[f"img{number}.hist.{run}"])


@pytest.mark.parametrize("run", RUNS)
def test_prompts_of_one_and_two_images_agree_alone_and_in_a_batch(
    model: MultimodalDLM, run: str
) -> None:
    chosen = strategies(CONFIG["gens"][run])
    both = mmdlm.decode(model, laid_out(model, [0], [1, 2]), LENGTH, chosen)
    alone = mmdlm.decode(model, laid_out(model, [1, 2]), LENGTH, chosen)
    assert torch.equal(canvases(both, 0), TENSORS[f"img0.hist.{run}"])
    assert torch.equal(canvases(both, 1), canvases(alone, 0))


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
@pytest.mark.parametrize("run", RUNS)
def test_answers_to_conversation_token_ids_equal_reference(model: MultimodalDLM, run: str) -> None:
    at = CONFIG["prompt"].index(CONFIG["image_token_index"])
    before, after = (
        Text(torch.tensor(ids)) for ids in (CONFIG["prompt"][:at], CONFIG["prompt"][at + 1 :])
    )
    asked = [[Message("raw", (before, Media("image", image), after))] for image in IMAGES]
    chosen = strategies(CONFIG["gens"][run])
    answers = mmdlm.answer(model, asked, length=LENGTH, strategies=chosen, details=True)
    for number, got in enumerate(answers):
        history = TENSORS[f"img{number}.hist.{run}"]
        expected = history[-1].tolist()
        end = expected.index(model.spec.eos_id) if model.spec.eos_id in expected else LENGTH
        assert list(got.tokens) == expected[:end]
        assert list(got.step) == (history == MASK).sum(0).tolist()[:end]
        assert got.forwards == len(history)


@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_losses_of_its_objective_equal_reference(model: MultimodalDLM, kind: str) -> None:
    loss, logits = GOLDEN.trained(model, f"train.{kind}", objective("lavida"))
    torch.testing.assert_close(loss, TENSORS[f"train.{kind}.loss"][0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits, TENSORS[f"train.{kind}.logits_at_masked"], atol=2e-4, rtol=0)


def test_the_checkpoint_decodes_as_its_evaluation_did(model: MultimodalDLM) -> None:
    for task in ("caption", "answer"):
        entry = model.preset[task]
        assert entry["length"] == 32
        found = preset.strategies(entry["strategies"])
        assert found == [PrefixLM(), TimeShift(shift=0.33)]
        decoded = mmdlm.decode(model, laid_out(model, [0]), 32, found)
        assert decoded.nfe == 16
        counts = decoded.history.step[0].bincount().tolist()
        # LaViDa's counts for 32 tokens in 16 steps at a shift of 0.33.
        assert counts == [6, 4, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def read(**changes: Any) -> Blueprint:
    """The blueprint of the golden's config.json with other values; None removes a key."""
    config = {**flat(), **changes}
    return LaViDa.read({k: v for k, v in config.items() if v is not None}, set(WEIGHTS))


def test_the_released_tower_is_known_by_its_name() -> None:
    names = ("google/siglip-so400m-patch14-384", "/models/google/siglip-so400m-patch14-384/")
    for name in names:
        blueprint = read(vision_config=None, mm_vision_tower=name, mm_hidden_size=1152)
        encoder = blueprint.encoders["image"]["init_args"]["encoder"]["init_args"]
        assert encoder["layers"] == 26
        assert int(encoder["mlp_ratio"] * encoder["dim"]) == 4304
        with torch.device("meta"):
            vit = ViT(**encoder)
        assert vit.grid == (27, 27)
        assert sum(weight.numel() for weight in vit.parameters()) == 397_745_440


@pytest.mark.parametrize(
    ("changes", "mode", "adapter"),
    [
        ({}, "anyres", {"pool": "bilinear", "merge": "spatial_unpad", "most_tiles": None}),
        ({"mm_spatial_pool_mode": "average"}, "anyres", {"pool": "average"}),
        ({"mm_spatial_pool_mode": None}, "anyres", {"pool": "bilinear"}),
        ({"pooling_on": False}, "anyres", {"pool": None}),
        ({"image_aspect_ratio": "anyres_max_4"}, "anyres", {"most_tiles": 4, "pool": "bilinear"}),
        (
            {"image_aspect_ratio": "anyres_max_4", "mm_patch_merge_type": "spatial"},
            "anyres",
            {"most_tiles": None, "merge": "spatial"},
        ),
        ({"image_aspect_ratio": "pad"}, "pad", {"pool": None}),
        ({"image_aspect_ratio": "square", "pooling_on": True}, "square", {"pool": "bilinear"}),
        ({"image_aspect_ratio": None}, "square", {"pool": None}),
        ({"mm_patch_merge_type": None}, "anyres", {"merge": "flat"}),
        ({"mm_projector_type": "linear"}, "anyres", {"layers": 1}),
        ({"mm_projector_type": "mlp3x_gelu"}, "anyres", {"layers": 3}),
    ],
)
def test_settings_of_config_json(changes: dict, mode: str, adapter: dict) -> None:
    blueprint = read(**changes)
    assert blueprint.encoders["image"]["init_args"]["mode"] == mode
    given = blueprint.adapters["image"]["init_args"]
    assert {key: given[key] for key in adapter} == adapter


def test_a_pool_mode_of_null_pools_nothing() -> None:
    blueprint = LaViDa.read({**flat(), "mm_spatial_pool_mode": None}, set(WEIGHTS))
    assert blueprint.adapters["image"]["init_args"]["pool"] is None


def test_missing_ids_and_context_default_to_those_of_the_source() -> None:
    ids = {"mask_token_id": None, "eos_token_id": None, "pad_token_id": None}
    spec = read(**ids, vocab_size=126464, embedding_size=126464).spec
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (126336, 126081, 126081)
    assert spec.stop_ids == (126348,)
    assert read(tokenizer_model_max_length=8192).spec.context == 8192
    assert read(tokenizer_model_max_length=None).spec.context == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "the sizes of tower 'siglip' are unknown.*vision_config"),
        ({"vision_config": {"patch_size": 8}}, "lack hidden_size, image_size"),
        ({"vision_config": {**SIZES, "hidden_act": "gelu"}}, "hidden_act.*expected"),
        ({"mm_hidden_size": 64}, "mm_hidden_size is 64, but the width of the tower is 32"),
        ({"mm_projector_type": "pooler"}, "mm_projector_type is 'pooler'; expected mlp2x_gelu"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type"),
        ({"mm_patch_merge_type": "spatial_nobase"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'; expected square"),
        ({"image_grid_pinpoints": None}, "without image_grid_pinpoints"),
    ],
)
def test_settings_that_are_not_supported(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_export_to_the_published_layout_is_bit_equal(model: MultimodalDLM, tmp_path: Path) -> None:
    checkpoint.save_published(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "config.json").read_text())
    same = ("mm_", "image_", "vision_config", "n_", "d_model", "rope_theta", "mask_token_id")
    for key, value in flat().items():
        if key.startswith(same):
            assert config[key] == value, key
    again = mmdlm.load(tmp_path, device="cpu")
    assert describe(again) == describe(model)


SMALL = {"vision_config": {**SIZES, "patch_size": 6}}
"""Views of 9x9 tokens, so that the tests below are fast."""
VARIATIONS: dict[str, dict[str, Any]] = {
    "no pooling": {"pooling_on": False},
    "average pooling, LLaDA-V's tiles": {
        "mm_spatial_pool_mode": "average",
        "image_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": "(1x1),...,(3x3)",
    },
    "flat": {"mm_patch_merge_type": "flat"},
    "spatial": {"mm_patch_merge_type": "spatial", "mm_spatial_pool_mode": "max"},
    "one padded view": {"image_aspect_ratio": "pad"},
    "one square view, pooled": {"image_aspect_ratio": "square", "pooling_on": True},
    "linear projector": {"mm_projector_type": "linear"},
    "three layers in the projector": {"mm_projector_type": "mlp3x_gelu"},
    "grouped heads, tied head": {"n_kv_heads": 2, "weight_tying": True, "n_layers": 3},
    "newline of training": {"image_template": "{}\n", "tokenizer_model_max_length": 8192},
    "other tower": {
        "vision_config": {
            **{"hidden_size": 24, "image_size": 30, "intermediate_size": 50},
            **{"num_attention_heads": 3, "num_hidden_layers": 4, "patch_size": 7},
        },
        "mm_hidden_size": 24,
        "image_grid_pinpoints": [[30, 60], [60, 60], [90, 30]],
    },
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_other_configurations_load_decode_and_are_written_back(name: str, tmp_path: Path) -> None:
    changes = {**SMALL, **VARIATIONS[name]}
    blueprint = LaViDa.read({**flat(), **changes}, set())
    made = build(blueprint)
    places = locate(shapes(made), LaViDa.keys(blueprint), made.spec.transformer)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(place.shape, generator=generator) for name, place in places.items()
    }
    model = mmdlm.load(published(tmp_path / "in", weights, **changes), device="cpu")
    chosen = [PrefixLM(), TopK(2)]
    both = mmdlm.decode(model, laid_out(model, [0], [1, 2]), 4, chosen)
    alone = mmdlm.decode(model, laid_out(model, [1, 2]), 4, chosen)
    assert torch.equal(both.tokens[1, -4:], alone.tokens[0, -4:])
    checkpoint.save_published(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert describe(mmdlm.load(tmp_path / "out", device="cpu")) == describe(model)


def test_own_layout_keeps_everything_that_is_used(model: MultimodalDLM, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path)
    again = mmdlm.load(tmp_path, device="cpu")
    assert describe(again) == describe(model)
    prompt = laid_out(model, [0])
    for each in (model, again):
        decoded = mmdlm.decode(each, prompt, LENGTH, strategies(CONFIG["gens"]["cache"]))
        assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS["img0.gen.cache"])


def test_a_checkpoint_without_part_of_its_tower_is_rejected(tmp_path: Path) -> None:
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    rest = {key: tensor for key, tensor in WEIGHTS.items() if key != name}
    with pytest.raises(ValueError, match=r"1 tensors are missing.*layers\.1\.mlp\.fc1"):
        mmdlm.load(published(tmp_path, rest), device="cpu")


CONTROL = {
    "<|startoftext|>": 100,
    "<|start_header_id|>": 101,
    "<|end_header_id|>": 102,
    "<|eot_id|>": 103,
    "<|mdm_mask|>": CONFIG["ids"]["mask"],
    "<|endoftext|>": CONFIG["ids"]["eos"],
}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    folder = with_tokenizer(published(tmp_path_factory.mktemp("talking")), CONTROL)
    return mmdlm.load(folder, device="cpu")


@pytest.mark.parametrize(("template", "gap"), [(None, ""), ("{}\n", "\n")])
def test_prompts_are_written_as_in_the_source(
    template: str | None, gap: str, tmp_path: Path
) -> None:
    changes = {} if template is None else {"image_template": template}
    model = mmdlm.load(with_tokenizer(published(tmp_path, **changes), CONTROL), device="cpu")
    parts = model.processor.prompt(asked(IMAGES[0], IMAGES[1], "What is it? "))
    written = spelled(parts, CONTROL, WRITTEN)
    assert written == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural "
        "language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"<image>{gap}<image>{gap}What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_one_image_is_cut_into_tiles_and_several_are_padded(talking: MultimodalDLM) -> None:
    examples = [Example(conversation(asked(*IMAGES[:n], "What?"))) for n in (1, 2)]
    one, two = talking.processor.pack(examples).rows
    assert [len(item.tensor) for item in one.items] == [5]
    assert [len(item.tensor) for item in two.items] == [1, 1]
    with torch.no_grad():
        embedded = talking.encode("image", two.items)
    assert [len(tokens) for tokens in embedded] == [14 * 14 + 1] * 2


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_answers_of_one_and_two_images_agree_alone_and_in_a_batch(talking: MultimodalDLM) -> None:
    one, two = asked(IMAGES[0], "What is it?"), asked(IMAGES[1], "and", IMAGES[2], "differ how?")
    both = mmdlm.answer(talking, [one, two], length=8, details=True)
    assert both[0].tokens == mmdlm.answer(talking, one, length=8, details=True).tokens
    assert both[1].tokens == mmdlm.answer(talking, two, length=8, details=True).tokens
    asked_plainly = mmdlm.answer(talking, "What is it?", IMAGES[0], length=8, details=True)
    assert both[0].tokens == asked_plainly.tokens
    assert both[0].forwards == 4


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_captions_use_the_instruction_and_length_of_the_evaluation(talking: MultimodalDLM) -> None:
    given = mmdlm.caption(talking, IMAGES[0], details=True)
    again = mmdlm.answer(
        talking, "Provide a one-sentence caption for the provided image.", IMAGES[0], details=True
    )
    assert given.tokens == again.tokens
    assert given.forwards == again.forwards == 16
