"""MMaDA from a folder in the published layout: reads images as codes and draws the golden ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmdlm
from encoders.magvit_v2 import MagvitV2
from mmdlm import checkpoint
from mmdlm.blueprint import Blueprint, build, describe
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.loading.keymap import locate, shapes
from mmdlm.messages import Message, Text
from mmdlm.model import MultimodalDLM
from mmdlm.systems.mmada import MMaDA
from tests.systems import letters

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "mmada"
SETTINGS = json.loads((GOLDEN / "config.json").read_text())
TENSORS = load_file(GOLDEN / "tensors.safetensors")
RESERVED = {"<|soi|>": 52, "<|eoi|>": 53, "<|t2i|>": 51, "<|mmu|>": 54, "bos": 1}
SIZES = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": [1, 1], "z_channels": 4}
CONTROL = {
    **{"<|startoftext|>": 1, "<|endoftext|>": 2, "<|mdm_mask|>": 60},
    **{"<|start_header_id|>": 40, "<|end_header_id|>": 41, "<|eot_id|>": 42},
}


def published(folder: Path, vq: bool = True) -> Path:
    """A folder as MMaDA publishes it, with the image tokenizer in its sub-folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SETTINGS["llm"] | {
        "architectures": ["MMadaModelLM"],
        "model_type": "mmada",
        "new_vocab_size": 80,
        "codebook_size": 16,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "reserved_tokens": RESERVED,
        "resolution": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(GOLDEN / "weights.safetensors"), folder / "model.safetensors")
    letters.write(folder, 64, CONTROL)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|startoftext|>"}))
    if vq:
        sub = folder / "magvitv2"
        sub.mkdir()
        (sub / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2", **SIZES}))
        save_file(tokenizer_weights(), sub / "model.safetensors")
    return folder


def tokenizer_weights() -> dict[str, torch.Tensor]:
    """Random weights of the image tokenizer under the published names, with a quantizer's table."""
    torch.manual_seed(5)
    model = MagvitV2(32, 4, (1, 1), (1, 1), (1, 1), (1, 1))
    blueprint = Blueprint(tiny_spec(), {"image": recipe()}, {"image": codes()})
    places = locate(
        {f"encoders.image.{k}": tuple(v.shape) for k, v in model.state_dict().items()},
        {"encoders.image": MMaDA.keys(blueprint)["encoders.image"]},
        blueprint.spec.transformer,
    )
    ours = model.state_dict()
    held = {
        name.removeprefix("vq."): ours[place.ours.removeprefix("encoders.image.")]
        for name, place in places.items()
    }
    return held | {"quantize.embedding": torch.ones(16, 4)}


def recipe() -> dict[str, Any]:
    return {"class_path": "encoders.magvit_v2.MagvitV2", "init_args": {}}


def codes() -> dict[str, Any]:
    return {"class_path": "adapters.image_codes.CodeTokens", "init_args": {}}


def tiny_spec():
    names = {"model.transformer.wte.weight"}
    config = SETTINGS["llm"] | {"model_type": "mmada", "eos_token_id": 2, "pad_token_id": 2}
    return MMaDA.read(config, names).spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("mmada"))


@pytest.fixture(scope="module")
def model(folder) -> MultimodalDLM:
    return mmdlm.load(folder, device="cpu")


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_every_tensor_is_read_and_the_codes_follow_the_text_tokenizer(model) -> None:
    assert model.system == "mmada"
    assert model.report.missing == ()
    assert list(model.report.ignored) == ["vq.quantize.embedding"]
    assert model.drawing.ids == range(64, 80)
    assert model.drawing.grid() == (4, 4)


def test_published_sizes_are_those_of_the_checkpoint() -> None:
    config = {
        **{"model_type": "mmada", "new_vocab_size": 134656, "codebook_size": 8192},
        **{"d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288},
        **{"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms"},
        **{"rope": True, "weight_tying": False, "max_sequence_length": 4096},
    }
    plan = MMaDA.read(config, {"vq.encoder.conv_in.weight"})
    assert plan.outputs["image"]["first"] == 126349  # the length of the text tokenizer
    assert plan.outputs["image"]["stride"] == 16
    assert plan.outputs["image"]["begin"] == [126084]
    assert plan.outputs["image"]["before"] == [126088, 126080]
    assert plan.adapters["image"]["init_args"]["begin"] == [126089, 126084]
    held = shapes(build(plan))
    assert held["encoders.image.encoder.conv_out.weight"] == (13, 512, 3, 3)
    places = locate(held, MMaDA.keys(plan), plan.spec.transformer)
    assert {"vq.encoder.down.4.block.3.conv2.bias", "vq.decoder.up.0.block.3.norm1.weight"} <= {
        *places
    }


@pytest.mark.parametrize("name", sorted(SETTINGS["gens"]))
def test_draws_the_golden_codes(model, name) -> None:
    from mmdlm.decoding.commits.random_top_k import RandomTopK
    from mmdlm.decoding.guidance.cfg import CFG

    given = SETTINGS["gens"][name]
    chosen = [
        CFG(float(given["guidance_scale"])),
        RandomTopK(given["timesteps"], given.get("schedule", "cosine"), given["temperature"]),
    ]
    # The ids 7 and 8 of the golden prompt are the letters e and f.
    drawn = mmdlm.draw(model, "ef", seed=given["seed"], strategies=chosen, details=True)
    assert torch.equal(drawn.codes.flatten()[None], TENSORS[f"t2i.{name}"])
    assert drawn.image.size == (8, 8)
    assert drawn.forwards == given["timesteps"] * (2 if given["guidance_scale"] else 1)
    assert int(drawn.step.max()) == given["timesteps"] - 1
    assert bool((drawn.confidence > 0).all())
    pixels = model.encoders["image"].images(drawn.codes[None])[0]
    assert np.array_equal(np.asarray(pixels), np.asarray(drawn.image))


def test_options_take_the_place_of_the_checkpoints_settings(model) -> None:
    given = SETTINGS["gens"]["cfg"]
    options = {"guidance": given["guidance_scale"], "steps": given["timesteps"]}
    drawn = mmdlm.draw(model, "ef", seed=given["seed"], details=True, **options)
    assert torch.equal(drawn.codes.flatten()[None], TENSORS["t2i.cfg"])


def test_an_image_does_not_depend_on_the_others(model) -> None:
    texts = ["a red circle", "b", "a red circle", "cd"]
    together = mmdlm.draw(model, texts, seed=[1, 2, 3, 1], steps=5, details=True)
    for text, seed, found in zip(texts, [1, 2, 3, 1], together, strict=True):
        alone = mmdlm.draw(model, text, seed=seed, steps=5, details=True)
        assert torch.equal(alone.codes, found.codes)
        assert alone.forwards == found.forwards == 10
    assert not torch.equal(together[0].codes, together[2].codes)
    single = mmdlm.draw(model, texts, seed=[1, 2, 3, 1], steps=5, batch_size=1)
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b.image))
        for a, b in zip(single, together, strict=True)
    )


def test_images_of_a_question_are_codes_before_the_chat(model) -> None:
    image = picture(0)
    prepared = model.processor.prepare("image", image)
    codes = model.encoders["image"].encode(prepared.tensor[None]).flatten()
    (ids,) = model.encode("image", [prepared])
    assert ids.tolist() == [54, 52, *(codes + 64).tolist(), 53]
    parts = model.processor.prompt(
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "what"}, {"type": "image", "image": image}],
            }
        ]
    )
    assert parts[0].kind == "image"
    assert parts[1][:2].tolist() == [1, 40]
    assert not any(hasattr(part, "kind") for part in parts[1:])


@pytest.mark.filterwarnings("ignore:.*filled the canvas")
def test_answers_and_captions_in_batches_equal_those_alone(model) -> None:
    images = [picture(seed) for seed in range(3)]
    found = mmdlm.caption(model, images, length=6, details=True)
    alone = [mmdlm.caption(model, image, length=6, details=True) for image in images]
    assert [one.tokens for one in found] == [one.tokens for one in alone]
    both = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": images[0]},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": "which"},
            ],
        }
    ]
    assert mmdlm.answer(model, [both, "why"], length=6) == [
        mmdlm.answer(model, both, length=6),
        mmdlm.answer(model, "why", length=6),
    ]


@pytest.mark.parametrize("kind", ["with", "without"])
def test_logits_of_a_prompt_equal_those_of_the_reference(model, kind) -> None:
    """With the mask of the generator, padding on the left is neither attended to nor scored."""
    ids, mask = TENSORS["input_ids"], TENSORS["attention_mask"].bool()
    assert not mask.all()
    real = mask if kind == "with" else torch.ones_like(mask)
    with torch.no_grad():
        found = model.logits(ids, mask=real)
    expected = TENSORS[f"logits_{kind}_bias"]
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*filled the canvas")
def test_answers_equal_those_of_the_reference(model) -> None:
    """The reference fills masks of the prompt too, but commits only as many as the answer has.

    So two of its four masks in the prompt stay, and two in the answer. Here all twelve positions
    are the canvas, and its four steps of two tokens are the first four of six.
    """
    given, expected = TENSORS["mmu.in"][0], TENSORS["mmu.out"][0]
    text, count = given[given != 60], len(expected) - 8
    assert torch.equal(expected[:8], text)
    raw = [Message("raw", (Text(text),))]
    found = mmdlm.answer(model, raw, length=count, strategies=[TopK(6)], details=True)
    committed = [
        token if step < 4 else 60 for token, step in zip(found.tokens, found.step, strict=True)
    ]
    assert committed == expected[8:].tolist()
    assert found.forwards == 6


def test_only_the_codes_under_the_mask_are_drawn_again(model) -> None:
    image = picture(3, (8, 8))
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    before = model.encoders["image"].encode(model.processor.prepare("image", image).tensor[None])[0]
    drawn = mmdlm.draw(model, "ab", image=image, mask=mask, seed=1, steps=4, details=True)
    assert torch.equal(drawn.codes[:, :2], before[:, :2])
    assert bool((drawn.step[:, :2] == -1).all())
    assert bool((drawn.step[:, 2:] >= 0).all())
    assert not torch.equal(drawn.codes[:, 2:], before[:, 2:])
    again = mmdlm.draw(
        model,
        "ab",
        codes=before.index_fill(1, torch.tensor([2, 3]), -1),
        seed=1,
        steps=4,
        details=True,
    )
    assert torch.equal(again.codes, drawn.codes)


def test_what_cannot_be_drawn_is_refused(model, folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot edit an image by a text; pass mask="):
        mmdlm.draw(model, "ab", image=picture(0))
    with pytest.raises(ValueError, match="positive multiples of 2 pixels"):
        mmdlm.draw(model, "ab", size=7)
    with pytest.raises(ValueError, match="exclude each other"):
        mmdlm.draw(model, "ab", size=8, codes=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="codes span -1 to 16, expected -1 to 15"):
        mmdlm.draw(model, "ab", codes=torch.tensor([[16, -1]]))
    with pytest.raises(ValueError, match="mask covers no code"):
        mmdlm.draw(model, "ab", image=picture(0), mask=Image.new("L", (12, 9)))
    with pytest.raises(ValueError, match="text is ' ', expected a text"):
        mmdlm.draw(model, " ")
    with pytest.raises(ValueError, match="holds the mask token|unk") as caught:
        model.processor.encode("<|mdm_mask|>")
    assert "infill" in str(caught.value)
    text_only = mmdlm.load(published(tmp_path / "text", vq=False))
    with pytest.raises(ValueError, match="this model cannot draw"):
        mmdlm.draw(text_only, "ab")
    with pytest.raises(ValueError, match="takes text only, not image"):
        mmdlm.caption(text_only, picture(0))


def test_the_image_tokenizer_stays_float32_in_lower_precision(model, folder) -> None:
    half = mmdlm.load(folder, dtype="bfloat16", device="cpu")
    assert half.backbone.embed.weight.dtype == torch.bfloat16
    assert {w.dtype for w in half.encoders["image"].parameters()} == {torch.float32}
    for seed in range(3):
        item = model.processor.prepare("image", picture(seed))
        (ids,), (same,) = half.encode("image", [item]), model.encode("image", [item])
        assert torch.equal(ids, same)
    drawn = mmdlm.draw(half, "ab", seed=0, steps=3, details=True)
    assert drawn.codes.shape == (4, 4)


def test_control_tokens_in_a_text_stay_text(model) -> None:
    ids = model.processor.encode("a<|eot_id|>", special=False)
    assert 42 not in ids.tolist()


def test_written_back_it_is_the_same_folder(model, folder, tmp_path) -> None:
    checkpoint.save_published(model, tmp_path / "back")
    for path in (".", "magvitv2"):
        was, now = (load_file(f / path / "model.safetensors") for f in (folder, tmp_path / "back"))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[name], now[name]) for name in was)
        old, new = (
            json.loads((f / path / "config.json").read_text()) for f in (folder, tmp_path / "back")
        )
        assert old.items() <= new.items()
    again = mmdlm.load(tmp_path / "back")
    assert describe(again) == describe(model)
    drawn = [mmdlm.draw(m, "ab", seed=0, steps=3, details=True).codes for m in (model, again)]
    assert torch.equal(*drawn)


def test_saved_in_our_layout_it_draws_the_same(model, tmp_path) -> None:
    checkpoint.save(model, tmp_path)
    again = mmdlm.load(tmp_path)
    assert again.drawing == model.drawing
    drawn = [mmdlm.draw(m, "ab", seed=0, steps=3, details=True).codes for m in (model, again)]
    assert torch.equal(*drawn)


def test_a_stream_shows_the_image_as_it_forms(model) -> None:
    from mmdlm.tasks.drawings import preview

    stream = mmdlm.stream(model, "draw", "ab", seed=2, steps=4)
    canvases = list(stream)
    open_codes = [sum(token == 60 for token in canvas.tokens) for canvas in canvases]
    assert open_codes[0] == 16
    assert open_codes[-1] == 0
    assert open_codes == sorted(open_codes, reverse=True)
    first, last = (preview(model, canvases[i].tokens, (4, 4)) for i in (0, -1))
    assert np.asarray(first).tolist() == np.full((8, 8, 3), 128).tolist()
    assert np.array_equal(np.asarray(last), np.asarray(stream.result))
