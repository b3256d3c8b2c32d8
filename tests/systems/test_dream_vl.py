"""Dream-VL from a folder in its published layout: equal to the reference's run.

The golden folder holds tiny random weights under the published names; its images, prompts and runs
were made by DreamLM/Dream-VLX (see `tests/golden/vision/README.md`).
"""

from __future__ import annotations

import json
import shutil
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
from torch import Tensor

import mmdlm
from encoders.attention import recorded
from encoders.qwen_vision import PatchInput
from mmdlm import checkpoint
from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.commands.main import main
from mmdlm.decoding import preset
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.guidance.eos_penalty import EosPenalty
from mmdlm.decoding.guidance.nucleus import Nucleus
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.pruning import option
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Row, Sequence, Sparse
from mmdlm.loading.keymap import locate, shapes
from mmdlm.messages import Example, Slot, assistant, conversation
from mmdlm.model import MultimodalDLM
from mmdlm.systems.dream_vl import DreamVL
from mmdlm.systems.dream_vla import DreamVLA
from tests.systems.letters import spelled

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "dream_vl"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
TENSORS = load_file(GOLDEN / "tensors.safetensors")
WEIGHTS = load_file(GOLDEN / "weights.safetensors")
IMAGES = [GOLDEN / f"img{i}.png" for i in range(3)]
LENGTH, IDS = 12, CONFIG["ids"]
SCORES = {"entropy": [Entropy()], "topk_margin": [Margin()], "maskgit_plus": []}


def flat() -> dict[str, Any]:
    """The golden's settings as one published config.json."""
    return {
        "architectures": ["DreamVLModel"],
        "model_type": "dream-vl",
        **CONFIG["llm"],
        "rope_scaling": None,
        "mrope_section": CONFIG["mrope_section"],
        "vision_config": CONFIG["vision"],
        "mask_token_id": IDS["mask"],
        "pad_token_id": IDS["pad"],
        "eos_token_id": IDS["pad"],
        "image_token_id": IDS["image"],
        "video_token_id": IDS["video"],
        "vision_start_token_id": IDS["vstart"],
        "vision_end_token_id": IDS["vend"],
        "vision_token_id": IDS["vtok"],
    }


def published(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A folder as Dream-VL publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**flat(), **changes}))
    (folder / "preprocessor_config.json").write_text(json.dumps(CONFIG["processor"]))
    if weights is None:
        shutil.copy(GOLDEN / "weights.safetensors", folder / "model.safetensors")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultimodalDLM:
    return mmdlm.load(published(tmp_path_factory.mktemp("dream_vl")), device="cpu")


def strategies(run: dict[str, Any]) -> list[Strategy]:
    """Arguments of the reference's `diffusion_generate` as strategies."""
    chosen: list[Strategy] = [Timesteps(run["steps"])]
    if run.get("eos_penalty"):
        chosen.append(EosPenalty(run["eos_penalty"], run["steps"]))
    return [*chosen, Nucleus(1.0, 50), *SCORES[run["alg"]]]


@torch.inference_mode()
def laid_out(model: MultimodalDLM, *rows: list[int]) -> Sequence:
    """The golden's prompt with these images in each row."""
    head, tail = torch.tensor(CONFIG["head"]), torch.tensor(CONFIG["tail"])
    laid = []
    for images in rows:
        items = [model.processor.prepare("image", IMAGES[i]) for i in images]
        laid.append(Row((head, *model.encode("image", items), tail)))
    return model.arrange(laid)


@pytest.mark.parametrize("number", range(3))
@torch.inference_mode()
def test_features_positions_and_logits_equal_the_reference(
    model: MultimodalDLM, number: int
) -> None:
    name = f"img{number}"
    item = model.processor.prepare("image", IMAGES[number])
    torch.testing.assert_close(item.tensor[::2], TENSORS[f"{name}.pixel_values"], atol=1e-6, rtol=0)
    sequence = laid_out(model, [number])
    features = model.encoders["image"]([item])
    everything = torch.arange(sequence.tokens.shape[1])[None]
    for got, part in (
        (features.tokens[0], "visual"),
        (sequence.media, "projected"),
        (model.spliced(sequence, everything)[0, ::2], "plain.inputs_embeds"),
        (model.backbone.head(model.hidden(sequence))[0, -6:], "plain.logits"),
    ):
        torch.testing.assert_close(got, TENSORS[f"{name}.{part}"], atol=3e-4, rtol=0)
    axes = TENSORS[f"{name}.plain.position_ids"]
    assert torch.equal(sequence.positions.expand(3, -1), axes)


@pytest.mark.parametrize("run", CONFIG["gens"])
@pytest.mark.parametrize("number", range(3))
def test_decoded_ids_equal_the_reference(model: MultimodalDLM, number: int, run: str) -> None:
    settings = CONFIG["gens"][run]
    decoded = mmdlm.decode(model, laid_out(model, [number]), LENGTH, strategies(settings))
    assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS[f"img{number}.plain.gen.{run}"])
    assert decoded.nfe == settings["steps"]


BATCH = ([0], [1, 2], [2], [2, 0, 1])


@pytest.mark.parametrize(
    "chosen",
    [
        strategies(CONFIG["gens"]["nocache"]),
        strategies(CONFIG["gens"]["eos_penalty"]),
        [Blocks(4), PrefixCache(), TopK(6)],
        [Blocks(4), DualCache(), TopK(6)],
    ],
    ids=["plain", "eos_penalty", "prefix_cache", "dual_cache"],
)
def test_one_to_three_images_of_all_sizes_agree_alone_and_in_a_batch(
    model: MultimodalDLM, chosen: list[Strategy]
) -> None:
    together = mmdlm.decode(model, laid_out(model, *BATCH), LENGTH, chosen)
    for i, images in enumerate(BATCH):
        alone = mmdlm.decode(model, laid_out(model, images), LENGTH, chosen)
        assert torch.equal(together.tokens[i, -LENGTH:], alone.tokens[0, -LENGTH:])
        assert torch.equal(together.history.step[i], alone.history.step[0])
        assert together.forwards[i] == alone.nfe


@pytest.mark.parametrize("cache", [PrefixCache(), DualCache()])
def test_caches_that_are_renewed_for_every_token_change_nothing(
    model: MultimodalDLM, cache: Strategy
) -> None:
    # Each block of one token opens with a forward over the whole canvas.
    prompt = laid_out(model, [0], [1])
    plain = mmdlm.decode(model, prompt, LENGTH, [Blocks(1)])
    cached = mmdlm.decode(model, prompt, LENGTH, [Blocks(1), cache])
    assert torch.equal(cached.tokens, plain.tokens)


def test_the_checkpoint_decodes_as_its_evaluation_did(model: MultimodalDLM) -> None:
    for task in ("caption", "answer"):
        assert model.preset[task]["length"] == 128
        found = preset.strategies(model.preset[task]["strategies"])
        assert found == [Timesteps(), Nucleus(top_p=1.0, top_k=50)]
    chosen = preset.strategies(model.preset["answer"]["strategies"])
    for number in range(3):
        decoded = mmdlm.decode(model, laid_out(model, [number]), LENGTH, [*chosen, Entropy()])
        assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS[f"img{number}.plain.gen.entropy"])


# -- pruning


@torch.inference_mode()
def test_half_of_an_image_is_what_gets_most_attention_in_the_tower(model: MultimodalDLM) -> None:
    head, tail = torch.tensor(CONFIG["head"]), torch.tensor(CONFIG["tail"])
    plain = laid_out(model, [0], [1, 2])
    chosen = [Blocks(4), PrefixCache(), TopK(6)]
    rows = []
    for images in ([0], [1, 2]):
        parts = [head]
        for i in images:
            item = model.processor.prepare("image", IMAGES[i])
            with recorded(model.encoders["image"]) as attended:
                model.encoders["image"]([item])
            (tokens,) = model.encode("image", [item])
            half = round(len(tokens) / 2)
            places = attended.received[0].argsort(descending=True)[:half].sort().values
            parts.append(Sparse(tokens[places], places, len(tokens)))
        rows.append(Row((*parts, tail)))
    expected = model.arrange(rows)
    found = {}
    for method in ("received@1.0", "received@0.5", "visionzip@0.5"):
        option.apply(model, method)
        found[method] = laid_out(model, [0], [1, 2])
    option.apply(model, None)
    assert torch.equal(found["received@1.0"].media, plain.media)
    assert torch.equal(found["received@1.0"].positions, plain.positions)
    assert torch.allclose(found["received@0.5"].media, expected.media, atol=1e-5)
    assert torch.equal(found["received@0.5"].positions, expected.positions)
    assert len(found["visionzip@0.5"].media) == len(expected.media)
    decoded = [
        mmdlm.decode(model, one, LENGTH, chosen).tokens[:, -LENGTH:]
        for one in (plain, found["received@1.0"], expected, found["received@0.5"])
    ]
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[2], decoded[3])
    # The text after the image is as far from the text before it as with all tokens.
    assert int(found["received@0.5"].positions[0, -1]) == int(plain.positions[0, -1])


# -- pixels


def transformers_pixels(image: Image.Image, settings: PatchInput) -> tuple[Tensor, list[int]]:
    """Patches and grid of transformers' own processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    made = Qwen2VLImageProcessorPil(size=size)(image, return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


@pytest.mark.parametrize(
    "shape", [(28, 28), (30, 5990), (60, 100), (333, 28), (413, 711), (1500, 900)]
)
@pytest.mark.parametrize("most", [3211264, 401408])
def test_pixels_equal_those_of_transformers(shape: tuple[int, int], most: int) -> None:
    settings = PatchInput(max_pixels=most)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    got = settings(image)
    expected, grid = transformers_pixels(image, settings)
    assert list(got.grid) == grid
    # One of 255 grey levels, divided by the smallest deviation.
    torch.testing.assert_close(got.tensor, expected, atol=1 / 255 / 0.26, rtol=0)


@pytest.mark.parametrize(
    ("shape", "resized"), [((1, 1), (56, 56)), ((1, 50), (28, 1400)), ((300, 1), (8400, 28))]
)
def test_images_of_one_pixel_width_are_enlarged(shape: tuple[int, int], resized) -> None:
    """The released rule for sides below 28 pixels, which transformers' processor does not have."""
    made = PatchInput(max_pixels=3211264)
    pixels = np.full((*shape, 3), 200, np.uint8)
    got = made(Image.fromarray(pixels))
    assert made.resized(*shape) == resized
    assert got.grid == (1, resized[0] // 14, resized[1] // 14)
    red = got.tensor[:, :196]
    torch.testing.assert_close(red, torch.full_like(red, (200 / 255 - made.mean[0]) / made.std[0]))


def test_images_too_flat_are_refused_by_name(model: MultimodalDLM) -> None:
    with pytest.raises(ValueError, match="30 x 9000 pixels.*ratio of at most 200"):
        model.processor.prepare("image", Image.new("RGB", (9000, 30)))


# -- settings


def read(**changes: Any) -> Blueprint:
    """The blueprint of the golden's config.json with other values; None removes a key."""
    config = {**flat(), **changes}
    return DreamVL.read({k: v for k, v in config.items() if v is not None}, set(WEIGHTS))


def test_absent_settings_are_those_of_the_published_classes() -> None:
    blueprint = read(
        vision_config=None,
        mask_token_id=None,
        pad_token_id=None,
        eos_token_id=None,
        vocab_size=152064,
    )
    spec, tower = blueprint.spec, blueprint.encoders["image"]["init_args"]
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (151666, 151643, 151643)
    assert spec.stop_ids == (151645,)
    assert (tower["depth"], tower["width"], tower["dim"], tower["heads"]) == (32, 1280, 3584, 16)
    assert (tower["min_pixels"], tower["max_pixels"]) == (3136, 3211264)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
        (
            {"preprocessor_config.json": {"patch_size": 16}},
            "patch_size of preprocessor_config.json",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_settings_that_are_not_supported(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("config", "is_vl"),
    [
        ({"model_type": "dream-vl"}, True),
        ({"model_type": "dream_vl"}, True),
        ({"architectures": ["DreamVLModel"]}, True),
        ({}, True),
        ({"norm_stats": {}}, False),
        ({"model_type": "dream-vla"}, False),
        ({"architectures": ["DreamVLAForActionPrediction"]}, False),
    ],
)
def test_a_checkpoint_is_either_dream_vl_or_the_policy(config: dict, is_vl: bool) -> None:
    assert DreamVL.matches(config, set(WEIGHTS)) is is_vl
    assert DreamVLA.matches(config, set(WEIGHTS)) is not is_vl
    assert not DreamVL.matches(config, {"model.embed_tokens.weight"})


VARIATIONS: dict[str, dict[str, Any]] = {
    "other tower": {
        "vision_config": {
            **{"depth": 1, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2, "hidden_size": 20},
            "temporal_patch_size": 2,
        }
    },
    "wider text model, tied head": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
        **{"tie_word_embeddings": True, "num_hidden_layers": 3, "rms_norm_eps": 1e-5},
    },
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_other_configurations_load_decode_and_are_written_back(name: str, tmp_path: Path) -> None:
    changes = VARIATIONS[name]
    blueprint = read(**changes)
    made = build(blueprint)
    places = locate(shapes(made), DreamVL.keys(blueprint), made.spec.transformer)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(place.shape, generator=generator) for name, place in places.items()
    }
    model = mmdlm.load(published(tmp_path / "in", weights, **changes), device="cpu")
    both = mmdlm.decode(model, laid_out(model, [0], [1, 2]), 4)
    alone = mmdlm.decode(model, laid_out(model, [1, 2]), 4)
    assert torch.equal(both.tokens[1, -4:], alone.tokens[0, -4:])
    checkpoint.save_published(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert describe(mmdlm.load(tmp_path / "out", device="cpu")) == describe(model)


def test_export_to_the_published_layout_equals_the_folder(
    model: MultimodalDLM, tmp_path: Path
) -> None:
    checkpoint.save_published(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == WEIGHTS.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in WEIGHTS.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in flat()} == flat()
    pixels = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert pixels == CONFIG["processor"]


def test_own_layout_keeps_everything_that_is_used(model: MultimodalDLM, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path)
    again = mmdlm.load(tmp_path, device="cpu")
    assert describe(again) == describe(model)
    chosen = strategies(CONFIG["gens"]["nocache"])
    decoded = mmdlm.decode(again, laid_out(again, [1]), LENGTH, chosen)
    assert torch.equal(decoded.tokens[0, -LENGTH:], TENSORS["img1.plain.gen.nocache"])


# -- the public functions

WRITTEN = "".join(map(chr, range(32, 127))) + "\n"
CONTROL = {
    "<|im_start|>": 100,
    "<|im_end|>": 101,
    "<|image_pad|>": IDS["image"],
    "<|mask|>": IDS["mask"],
    "<|endoftext|>": IDS["pad"],
}


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
    folder = with_tokenizer(published(tmp_path_factory.mktemp("talking")))
    return mmdlm.load(folder, device="cpu")


def asked(*parts: Path | str) -> list[dict[str, Any]]:
    """A user's message of images (paths) and text."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def test_prompts_are_written_as_in_the_source(talking: MultimodalDLM) -> None:
    said = [*asked(IMAGES[0], "What?"), {"role": "assistant", "content": "A."}]
    parts = talking.processor.prompt([*said, *asked("And", IMAGES[1], "?")])
    written = spelled(parts, CONTROL, WRITTEN)
    assert written == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
        "<|im_start|>user\nAnd<image>?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_answers_in_a_batch_equal_answers_alone(talking: MultimodalDLM) -> None:
    turns = [*asked(IMAGES[0], "What?"), {"role": "assistant", "content": "A."}]
    conversations = [
        asked(IMAGES[0], "What is it?"),
        asked(IMAGES[1], "and", IMAGES[2], "differ how?"),
        [*turns, *asked(IMAGES[1], "And this?")],
    ]
    together = mmdlm.answer(talking, conversations, length=8, details=True)
    for one, found in zip(conversations, together, strict=True):
        alone = mmdlm.answer(talking, one, length=8, details=True)
        assert (found.tokens, found.step) == (alone.tokens, alone.step)
        assert found.forwards == alone.forwards
    plain = mmdlm.answer(talking, "What is it?", IMAGES[0], length=8, details=True)
    assert plain.tokens == together[0].tokens
    generated = mmdlm.generate(
        talking,
        conversations[2],
        length=8,
        strategies=preset.strategies(talking.preset["answer"]["strategies"]),
        details=True,
    )
    assert generated.tokens == together[2].tokens


@pytest.mark.filterwarnings("ignore:.* filled the canvas")
def test_captions_use_the_instruction_of_the_source(talking: MultimodalDLM) -> None:
    given = mmdlm.caption(talking, IMAGES[0], length=16, details=True)
    again = mmdlm.answer(talking, "Describe this image", IMAGES[0], length=16, details=True)
    assert given.tokens == again.tokens
    assert given.forwards == again.forwards == 16


def test_slots_of_a_text_about_an_image_are_filled(talking: MultimodalDLM) -> None:
    template = "The [MASK:2] is [MASK:3]."
    texts = mmdlm.infill(talking, template, [IMAGES[0], IMAGES[1]], prompt="Complete:")
    for image, text in zip(IMAGES, texts, strict=False):
        assert text.startswith("The ")
        assert text.endswith(".")
        assert mmdlm.infill(talking, template, image, prompt="Complete:") == text


def test_an_image_is_encoded_once_in_a_conversation(
    talking: MultimodalDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    forward = type(talking.encoders["image"]).forward

    def counted(self: Any, items: Any) -> Any:
        encoded.append(len(items))
        return forward(self, items)

    monkeypatch.setattr(type(talking.encoders["image"]), "forward", counted)

    def packed(messages: list[dict[str, Any]]) -> Any:
        example = Example((*conversation(messages), assistant(Slot(length=6))))
        return talking.processor.pack([example])

    session = mmdlm.Session(talking, [TopK(3)])
    first = asked(IMAGES[0], "What?")
    second = [*first, {"role": "assistant", "content": "A."}, *asked(IMAGES[1], "And?")]
    key = session.add(packed(first), keep=True)
    while session.keys:
        session.advance()
    session.extend(key, packed(second))
    while session.keys:
        session.advance()
    assert encoded == [1, 1]
    found = {each.key: each for each in session.finished()}[key]
    fresh = mmdlm.Session(talking, [TopK(3)])
    fresh.add(packed(second))
    while fresh.keys:
        fresh.advance()
    assert torch.equal(found.tokens, fresh.finished()[0].tokens)


# -- training

TRAINED = ("backbone.", "adapters.", "encoders.image.norm", "encoders.image.up")
TRAINED = (*TRAINED, "encoders.image.down", *(f"encoders.image.blocks.{i}." for i in range(16, 32)))


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_trains_the_upper_half_of_the_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"depth": 32, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 1, "hidden_size": 8}
    blueprint = read(vision_config=vision)
    places = locate(shapes(build(blueprint)), DreamVL.keys(blueprint), blueprint.spec.transformer)
    weights = {name: 0.1 * torch.randn(place.shape) for name, place in places.items()}
    source = with_tokenizer(published(tmp_path / "source", weights, vision_config=vision))
    rows = [
        {
            "image": str(IMAGES[i]),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A dot." * (i + 1)},
            ],
        }
        for i in range(3)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", "train/dream_vl", "--source", str(source), "--data", "data.json"]
    words += ["--steps", "2", "--batch-size", "2", "--length", "20"]
    words += [
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--model.schedule.warmup=1",
    ]
    words += ["--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"]
    words += ["--model.optimizer.lr=0.01"]
    assert main(words) == 0
    checkpoint_file = next((tmp_path / "runs").rglob("*.ckpt"))
    state = torch.load(checkpoint_file, weights_only=True)["state_dict"]
    before = mmdlm.load(source, device="cpu").state_dict()
    moved = {name for name, was in before.items() if not torch.equal(state[f"model.{name}"], was)}
    assert moved == {name for name in before if name.startswith(TRAINED)}
