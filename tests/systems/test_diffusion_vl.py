"""DiffusionVL from both published layouts: equal to transformers' modules and to its decoding.

The weights are random and made here; the oracles are transformers' tower, merger and Qwen2, and a
decoding loop without a cache, written from the description of hustvl/DiffusionVL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor, nn

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import describe
from mmdlm.commands.main import main
from mmdlm.decoding import preset
from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.pruning import option
from mmdlm.layout import Row, Sparse, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.objective import Batch
from mmdlm.systems.diffusion_vl import DiffusionVL
from tests.objectives.recorded import preset as objective_of
from tests.systems.letters import spelled

MASK, EOS, BLOCK, VOCAB, WIDTH = 120, 121, 8, 128, 32
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": WIDTH,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "hidden_act": "silu",
}
CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionVLQwenVLForCausalLM"],
    "model_type": "diffusionvl_qwenvl",
    **TEXT,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "vision_config": VISION,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "bd3lm_block_size": BLOCK,
    "enable_bd3lm": True,
    "min_pixels": 3136,
    "max_pixels": 12544,
    "mm_vision_select_layer": -2,
}
IMAGES = [
    np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for i, shape in enumerate([(100, 60), (40, 70), (112, 112)])
]


def oracles() -> tuple[nn.Module, nn.Module]:
    """Tower with merger, and text model, of transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    torch.manual_seed(0)
    vision = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**VISION)).eval()
    text = Qwen2ForCausalLM(Qwen2Config(**TEXT)).eval()
    for module in (vision, text):
        for name, weight in module.named_parameters():
            nn.init.normal_(weight, mean=1.0 if "norm" in name or "ln_q" in name else 0, std=0.3)
    return vision, text


VISION_MODEL, TEXT_MODEL = oracles()


def weights() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Text model, tower and merger under the names that the converter gives them."""
    seen = VISION_MODEL.state_dict()
    merger = {n.removeprefix("merger."): w for n, w in seen.items() if n.startswith("merger.")}
    tower = {n: w for n, w in seen.items() if not n.startswith("merger.")}
    return dict(TEXT_MODEL.state_dict()), tower, merger


def converted(folder: Path, **changes: Any) -> Path:
    """A folder as the converter writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "vision_config.json").write_text(json.dumps(VISION))
    for name, tensors in zip(("model", "vision_tower", "projector"), weights(), strict=True):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def trained(folder: Path, **changes: Any) -> Path:
    """A folder as the trainer writes it: everything in one file, under LLaVA's prefixes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    text, tower, merger = weights()
    text |= {f"model.vision_tower.vision_tower.{name}": each for name, each in tower.items()}
    text |= {f"model.mm_projector.merger.{name}": each for name, each in merger.items()}
    save_file(text, folder / "model.safetensors")
    return folder


LAYOUTS = {"converted": converted, "trained": trained}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(trained(tmp_path_factory.mktemp("diffusion_vl")), device="cpu")


HEAD, TAIL = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8, 9, 10, 11, 12, 13])


@torch.inference_mode()
def parts(model: MultimodalDLM, images: list[int], cut: int = 0) -> tuple[Tensor, ...]:
    """A prompt with some images; `cut` tokens of its end are left out."""
    items = [model.processor.prepare("image", IMAGES[i]) for i in images]
    return (HEAD, *model.encode("image", items), TAIL[: len(TAIL) - cut])


def decoded(model: MultimodalDLM, rows: list[tuple[Tensor, ...]], length: int, *chosen: Any) -> Any:
    return mmdlm.decode(model, model.arrange([Row(row) for row in rows]), length, list(chosen))


def embedded(row: tuple[Tensor, ...]) -> Tensor:
    """[1 n D] of a prompt."""
    table = TEXT_MODEL.get_input_embeddings()
    return torch.cat([part if part.is_floating_point() else table(part) for part in row])[None]


def scored(x: Tensor) -> Tensor:
    """Logits of transformers' Qwen2 for embeddings [1 n D] with block-causal attention."""
    block = torch.arange(x.shape[1]) // BLOCK
    seen = block[:, None] >= block
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return TEXT_MODEL(inputs_embeds=x, attention_mask=bias[None, None]).logits[0]


@torch.inference_mode()
def reference(
    row: tuple[Tensor, ...], length: int, steps: int, tau: float | None
) -> tuple[list[int], list[int], int]:
    """Ids, the forward that filled each, and the number of forwards, without a cache.

    The prompt and the answer must fill whole blocks together.
    """
    prompt = embedded(row)
    size = prompt.shape[1]
    ids = torch.full((size + length,), MASK)
    ids[:size] = -1
    when = torch.zeros_like(ids)
    due = [BLOCK // steps + (i < BLOCK % steps) for i in range(steps + 1)]
    table, forwards = TEXT_MODEL.get_input_embeddings(), 0
    for start in range(size // BLOCK * BLOCK, size + length, BLOCK):
        for step in range(steps):
            window = slice(start, start + BLOCK)
            is_mask = ids[window] == MASK
            if not is_mask.any():
                break
            x = torch.cat([prompt, table(ids[size : start + BLOCK])[None]], 1)
            forwards += 1
            logits = scored(x)[window]
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            order = torch.where(is_mask, best.values, -torch.inf)
            take = order.topk(min(due[step], int(is_mask.sum()))).indices
            if tau is not None and int((order > tau).sum()) >= due[step]:
                take = (order > tau).nonzero()[:, 0]
            ids[start + take] = best.indices[take]
            when[start + take] = forwards - 1
    return ids[size:].tolist(), when[size:].tolist(), forwards


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_features_and_logits_equal_transformers(layout: str, tmp_path: Path) -> None:
    model = mmdlm.load(LAYOUTS[layout](tmp_path), device="cpu")
    items = [model.processor.prepare("image", image) for image in IMAGES]
    assert all(item.grid[1] == item.grid[2] for item in items)  # padded to squares
    expected = VISION_MODEL(
        torch.cat([item.tensor for item in items]),
        grid_thw=torch.tensor([item.grid for item in items]),
    ).pooler_output
    torch.testing.assert_close(torch.cat(model.encode("image", items)), expected, atol=1e-4, rtol=0)
    row = parts(model, [0, 2])
    sequence = model.arrange([Row(row)])
    got = model.backbone.head(model.hidden(sequence))[0]
    torch.testing.assert_close(got, scored(embedded(row)), atol=1e-4, rtol=0)


def most_attended(item: Any, keep: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Row-major places of the tokens that get most attention in transformers' last full layer."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as published

    inner, weights = published.eager_attention_forward, []

    def noted(*given: Any, **options: Any) -> Any:
        found = inner(*given, **options)
        weights.append(found[1])  # [1 heads n n]
        return found

    monkeypatch.setattr(published, "eager_attention_forward", noted)
    monkeypatch.setattr(VISION_MODEL.config, "_attn_implementation", "eager")
    VISION_MODEL(item.tensor, grid_thw=torch.tensor([item.grid]))
    paid = weights[-1].mean((0, 1, 2)).view(-1, 4).sum(1)  # per token, window by window
    # Windows of 56 pixels hold 2 x 2 tokens; the image has 4 x 4.
    assert item.grid == (1, 8, 8)
    order = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten()
    return paid[order.argsort()].argsort(descending=True)[:keep].sort().values


@torch.inference_mode()
def test_pruned_images_equal_transformers_attention(
    model: MultimodalDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = model.processor.prepare("image", IMAGES[2])
    whole = parts(model, [2])
    count = len(whole[1])
    places = most_attended(item, count // 4, monkeypatch)
    sparse = Sparse(whole[1][places], places, count)
    found = {}
    for method in ("received@1.0", "received@0.25", "visionzip@0.25"):
        option.apply(model, method)
        found[method] = parts(model, [2])
    option.apply(model, None)
    assert torch.equal(found["received@1.0"][1], whole[1])
    assert found["received@0.25"][1].places.tolist() == places.tolist()
    assert len(found["visionzip@0.25"][1]) == count // 4
    length = whole_blocks((HEAD, whole[1], TAIL), 2)
    rows = [(HEAD, sparse, TAIL), found["received@0.25"]]
    oracle, pruned = (decoded(model, [row], length, BlockCache()) for row in rows)
    assert torch.equal(oracle.tokens, pruned.tokens)
    # The text after the image is as far from that before it as without pruning.
    positions = [model.arrange([Row(row)]).positions[0, -1] for row in (whole, rows[1])]
    assert positions[0] == positions[1]


def test_a_tower_without_full_attention_in_use_is_refused(tmp_path: Path) -> None:
    vision = {**VISION, "fullatt_block_indexes": []}
    folder = converted(tmp_path, vision_config=vision)
    (folder / "vision_config.json").write_text(json.dumps(vision))
    model = mmdlm.load(folder, device="cpu")
    with pytest.raises(ValueError, match="Qwen25Vision records no attention.*use divprune"):
        option.apply(model, "received@0.5")
    option.apply(model, "divprune@0.5")
    assert model.pruner.keep == 0.5


def whole_blocks(row: tuple[Tensor, ...], blocks: int) -> int:
    """Answer length that fills the prompt's last block and some more."""
    return -sum(map(len, row)) % BLOCK + blocks * BLOCK


@pytest.mark.parametrize(("steps", "tau"), [(8, None), (4, None), (3, None), (8, 0.1), (4, 0.05)])
@pytest.mark.parametrize("images", [[0], [1, 2]])
def test_decoding_equals_a_loop_without_a_cache(
    model: MultimodalDLM, images: list[int], steps: int, tau: float | None
) -> None:
    row = parts(model, images, cut=len(images))
    length = whole_blocks(row, 2)
    ids, when, forwards = reference(row, length, steps, tau)
    rule = Dynamic(steps, 1.0 if tau is None else tau)
    got = decoded(model, [row], length, rule)
    assert got.tokens[0, -length:].tolist() == ids
    assert got.nfe == forwards
    assert got.history.step[0].tolist() == when
    cached = decoded(model, [row], length, rule, BlockCache())
    assert torch.equal(cached.tokens, got.tokens)
    assert cached.nfe > got.nfe  # whole blocks are stored by forwards of their own


def test_rows_of_one_to_three_images_agree_alone_and_in_a_batch(model: MultimodalDLM) -> None:
    rows = [parts(model, [0]), parts(model, [1, 2], cut=3), parts(model, [2, 0, 1], cut=1)]
    for chosen in ([Dynamic(8, 1.0)], [Dynamic(8, 0.1), BlockCache()]):
        together = decoded(model, rows, 20, *chosen)
        for i, row in enumerate(rows):
            alone = decoded(model, [row], 20, *chosen)
            assert torch.equal(together.tokens[i, -20:], alone.tokens[0, -20:])
            assert torch.equal(together.history.step[i], alone.history.step[0])
            assert together.forwards[i] == alone.forwards[0]


def test_the_released_decodings_are_presets(model: MultimodalDLM) -> None:
    static = [Dynamic(None, 1.0), EndOfText()]
    for task in ("caption", "answer"):
        assert model.preset[task]["length"] == 128
        assert preset.strategies(model.preset[task]["strategies"]) == static
    assert preset.strategies("diffusion_vl") == static
    assert preset.strategies("diffusion_vl_dynamic") == [Dynamic(None, 0.85), EndOfText()]
    row = parts(model, [0])
    length = whole_blocks(row, 1)
    expected = reference(row, length, 8, None)
    got = decoded(model, [row], length, Dynamic(None, 1.0))
    assert got.tokens[0, -length:].tolist() == expected[0]
    assert got.nfe == expected[2] == length


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_equals_the_folder(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "in")
    model = mmdlm.load(folder, device="cpu")
    checkpoint.save_published(model, tmp_path / "out")
    files = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    for name in files:
        if name.endswith(".safetensors"):
            was, now = load_file(folder / name), load_file(tmp_path / "out" / name)
            assert now.keys() == was.keys()
            assert all(torch.equal(now[key], was[key]) for key in was)
        else:
            was, now = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "out"))
            assert {key: now[key] for key in was} == was
    again = mmdlm.load(tmp_path / "out", device="cpu")
    assert describe(again) == describe(model)


def test_own_layout_keeps_everything_that_is_used(model: MultimodalDLM, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path)
    again = mmdlm.load(tmp_path, device="cpu")
    assert describe(again) == describe(model)
    row = parts(model, [1])
    got, expected = (decoded(each, [row], 8) for each in (again, model))
    assert torch.equal(got.tokens, expected.tokens)


def read(**changes: Any) -> Any:
    config = {**CONFIG, **changes}
    return DiffusionVL.read({k: v for k, v in config.items() if v is not None}, set())


def test_settings_of_config_json() -> None:
    tower = read(min_pixels=None, max_pixels=None).encoders["image"]["init_args"]
    assert (tower["min_pixels"], tower["max_pixels"]) == (384 * 384, 512 * 512)
    assert tower["square"] is True
    assert read(image_aspect_ratio="square").encoders["image"]["init_args"]["square"] is False
    assert read(bd3lm_block_size=None).spec.block_size == 4
    large = {"vocab_size": 152064}
    text = CONFIG["text_config"] | large
    spec = read(mask_token_id=None, eos_token_id=151645, pad_token_id=151643, text_config=text).spec
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151671, 151645, 151643)
    assert (spec.attention, spec.block_size, spec.shift) == ("block_causal", BLOCK, False)
    without_head = DiffusionVL.read(CONFIG, {"model.embed_tokens.weight"})
    assert without_head.spec.transformer.tied
    assert (
        read(**{"vision_config.json": VISION | {"window_size": 84}}).encoders["image"]["init_args"][
            "window"
        ]
        == 84
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"vision_config": VISION | {"out_hidden_size": 20}}, "out_hidden_size of the tower is 20"),
        ({"vision_config": VISION | {"hidden_act": "gelu"}}, "hidden_act"),
        ({"preprocessor_config.json": {"patch_size": 16}}, "patch_size of preprocessor_config"),
    ],
)
def test_settings_that_are_not_supported(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


WRITTEN = "".join(map(chr, range(32, 127))) + "\n"
CONTROL = {"<|im_start|>": 100, "<|im_end|>": EOS, "<|mask|>": MASK}


def with_tokenizer(folder: Path) -> Path:
    """The folder with a tokenizer of single characters and control tokens."""
    vocab = {character: number for number, character in enumerate(WRITTEN)} | CONTROL
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(with_tokenizer(converted(tmp_path_factory.mktemp("talking"))), device="cpu")


def asked(*content: Any) -> list[dict[str, Any]]:
    """A user's message of images and text."""
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}]


def test_prompts_are_written_as_in_training(talking: MultimodalDLM) -> None:
    parts = talking.processor.prompt(asked(IMAGES[0], IMAGES[1], "What is it?"))
    written = spelled(parts, CONTROL, WRITTEN)
    assert written == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n<image>\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_the_public_functions_answer_alone_as_in_a_batch(talking: MultimodalDLM) -> None:
    first = asked(IMAGES[0], "What?")
    turns = [*first, {"role": "assistant", "content": "A."}, *asked(IMAGES[1], "And?")]
    conversations = [first, asked(IMAGES[1], "and", IMAGES[2], "differ?"), turns]
    together = mmdlm.answer(talking, conversations, length=12, details=True)
    for one, found in zip(conversations, together, strict=True):
        alone = mmdlm.answer(talking, one, length=12, details=True)
        assert (found.tokens, found.step, found.forwards) == (
            alone.tokens,
            alone.step,
            alone.forwards,
        )
    caption = mmdlm.caption(talking, IMAGES[0], length=12, details=True)
    described = asked(IMAGES[0], "Describe this image.")
    assert caption.tokens == mmdlm.answer(talking, described, length=12, details=True).tokens
    text = mmdlm.infill(talking, "A [MASK:2] of [MASK:3].", IMAGES[0], prompt="Complete:")
    assert text.startswith("A ")
    assert text.endswith(".")
    reply = mmdlm.generate(talking, turns, length=12, strategies="diffusion_vl", details=True)
    assert reply.tokens == together[2].tokens


@torch.no_grad()
def test_the_loss_equals_the_published_one(model: MultimodalDLM) -> None:
    objective = objective_of("diffusion_vl")
    answers = [[20, 21, 22, 23, 24, EOS], [30, 31, EOS, EOS, EOS, EOS]]
    prompts = [parts(model, [0]), parts(model, [1, 2], cut=1)]
    rows = [Row(p, (Turn((), torch.tensor(a)),)) for p, a in zip(prompts, answers, strict=True)]
    batch = Batch(model.arrange(rows), torch.tensor([3, 4]), torch.tensor([0.2, 0.7]).double())
    batch = objective.prepare(model, batch)
    noise = objective.corrupt(batch)
    got = objective.loss(model, batch, noise).mean()
    total = 0.0
    table, mask = TEXT_MODEL.get_input_embeddings(), torch.tensor([MASK])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        said = answer[: answer.index(EOS) + 1]
        size = sum(map(len, prompt))
        said += [EOS] * (-(size + len(said)) % BLOCK)  # the end token fills its block
        place = batch.sequence.is_answer[i]
        assert batch.sequence.tokens[i, place].tolist() == said
        assert noise.maskable[i].sum() == len(said)
        masked, p = noise.masked[i, place], noise.p[i, place]
        clean = torch.cat([embedded(prompt), table(torch.tensor(said))[None]], 1)
        noisy = clean.clone()
        noisy[0, size:][masked] = table(mask)
        logits = twice(noisy, clean)[size:]
        losses = nn.functional.cross_entropy(logits, torch.tensor(said), reduction="none")
        total += float((losses / p)[masked].sum()) / len(said)
    torch.testing.assert_close(float(got), total / 2, atol=1e-4, rtol=1e-4)


def twice(noisy: Tensor, clean: Tensor) -> Tensor:
    """Logits [n V] of the noisy half of [x_t ; x_0] in transformers' Qwen2."""
    n = noisy.shape[1]
    at = torch.arange(n)
    half, block = torch.cat([0 * at, 0 * at + 1]), torch.cat([at, at]) // BLOCK
    query, key = (slice(None), None), (None, slice(None))
    same = (half[query] == half[key]) & (block[query] == block[key])
    earlier = (half[query] == 0) & (half[key] == 1) & (block[query] > block[key])
    causal = (half[query] == 1) & (half[key] == 1) & (block[query] >= block[key])
    seen = same | earlier | causal
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return TEXT_MODEL(
        inputs_embeds=torch.cat([noisy, clean], 1),
        attention_mask=bias[None, None],
        position_ids=torch.cat([at, at])[None],
    ).logits[0, :n]


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_trains_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer(converted(tmp_path / "source"))
    rows = []
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        said = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A dot." * (i + 1)},
        ]
        rows.append({"image": f"{i}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", "train/diffusionvl", "--source", str(source), "--data", "data.json"]
    words += ["--steps", "2", "--batch-size", "2", "--trainer.accelerator=cpu"]
    words += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.accumulate_grad_batches=1", "--model.schedule.warmup=1"]
    assert main(words) == 0
    folder = next((tmp_path / "runs").rglob("model"))
    before, after = (mmdlm.load(each, device="cpu").state_dict() for each in (source, folder))
    assert all(weight.isfinite().all() for weight in after.values())
    assert sum(not torch.equal(after[name], before[name]) for name in before) == len(before)
    out = tmp_path / "published"
    checkpoint.save_published(mmdlm.load(folder, device="cpu"), out)
    again = mmdlm.load(out, device="cpu")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in after.items())
