"""Image tokenizers: parity with MAGVIT-v2 and with the VQModel of diffusers, sizes, crops."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from encoders.magvit_v2 import MagvitV2
from encoders.vq import CodeInput, ImageTokenizer, best_size, crop_sizes
from encoders.vq_model import VQModel

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def fill(model: ImageTokenizer, weights: dict[str, torch.Tensor]) -> None:
    """Loads published weights by `KEYS`; every one of them must be used."""
    state, rest = {}, dict(weights)
    for name in model.state_dict():
        level = re.search(r"levels\.(\d+)\.", name)
        key = model.KEYS[re.sub(r"levels\.\d+\.", "levels.{i}.", name)]
        state[name] = rest.pop(key.replace("{i}", level[1]) if level else key)
    assert not rest
    model.load_state_dict(state)


@torch.no_grad()
def test_magvit_v2_equals_the_reference():
    folder = GOLDEN / "magvitv2"
    config = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / "tensors.safetensors")
    mult, blocks = config["ch_mult"], config["num_res_blocks"]
    model = MagvitV2(config["ch"], config["z_channels"], mult, blocks, mult, blocks)
    fill(model, load_file(folder / "weights.safetensors"))
    codes = model.encode(golden["pixels"])
    torch.testing.assert_close(model.latents(golden["pixels"]), golden["latents"], **CLOSE)
    assert torch.equal(codes.flatten(1), golden["indices"])
    torch.testing.assert_close(model.decode(codes), golden["reconstruction"], **CLOSE)


@torch.no_grad()
def test_vq_model_equals_diffusers():
    folder = GOLDEN / "vqmodel"
    config = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / "tensors.safetensors")
    model = VQModel(
        config["block_out_channels"],
        config["layers_per_block"],
        config["latent_channels"],
        config["num_vq_embeddings"],
        config["vq_embed_dim"],
        config["norm_num_groups"],
        config["mid_block_add_attention"],
    )
    fill(model, load_file(folder / "diffusion_pytorch_model.safetensors"))
    latents = model.quant(model.encoder(golden["pixels"]))
    torch.testing.assert_close(latents, golden["latents"], **CLOSE)
    codes = model.encode(golden["pixels"])
    assert torch.equal(codes, golden["codes"])
    torch.testing.assert_close(model.decode(codes), golden["reconstruction"], **CLOSE)


def test_published_sizes_give_the_published_tensors():
    with torch.device("meta"):
        magvit, vq = MagvitV2(), VQModel()
    assert (magvit.count, magvit.stride, vq.count, vq.stride) == (8192, 16, 8192, 16)
    assert magvit.encoder.conv_out.weight.shape == (13, 512, 3, 3)
    assert [len(level.blocks) for level in magvit.encoder.levels] == [4, 3, 4, 3, 4]
    assert [len(level.blocks) for level in magvit.decoder.levels] == [4, 4, 3, 4, 3]
    assert magvit.decoder.conv_in.weight.shape == (512, 13, 3, 3)
    assert vq.codebook.weight.shape == (8192, 64)


@pytest.mark.parametrize("kind", [MagvitV2, VQModel])
@torch.no_grad()
def test_images_of_unequal_size_are_tokenized_as_alone(kind):
    model = kind.tiny()
    images = [Image.new("RGB", size, colour) for size, colour in (((70, 40), "red"), ((40, 70), 3))]
    items = [model.prepare(image) for image in images]
    features = model(items)
    for item, tokens, mask, size in zip(
        items, features.tokens, features.mask, features.sizes, strict=True
    ):
        alone = model.encode(item.tensor[None])[0]
        assert size == tuple(alone.shape) == tuple(n // model.stride for n in item.tensor.shape[1:])
        assert torch.equal(tokens[mask][:, 0], alone.flatten())
        assert 0 <= int(alone.min()) <= int(alone.max()) < model.count
    drawn = model.images(alone[None])[0]
    assert (drawn.height, drawn.width) == tuple(items[-1].tensor.shape[1:])


def test_square_crops_the_middle_and_squash_keeps_everything():
    strip = np.zeros((8, 24, 3), np.uint8)
    strip[:, 8:16] = 255  # only the middle third is white
    middle = CodeInput(8)(strip)
    assert middle.tensor.shape == (3, 8, 8)
    assert bool((middle.tensor == 1).all())
    assert middle.size == (8, 24)
    whole = CodeInput(8, "squash", 0.0)(strip).tensor
    assert whole.shape == (3, 8, 8)
    assert float(whole.min()) == 0.0
    assert float(whole[:, :, 0].max()) == 0.0
    assert float(whole[:, 4, 4].min()) == 1.0


def test_best_crop_has_the_nearest_ratio():
    # Of a budget of 16 patches: 8x2 is as wide as the ratio may be, 4x4 is the square.
    sizes = crop_sizes(16)
    assert {(128, 128), (256, 64), (64, 256)} <= set(sizes)
    assert all(w * h <= 16 * 32 * 32 and max(w, h) <= 4 * min(w, h) for w, h in sizes)
    assert best_size((1000, 1000), sizes) == (128, 128)
    assert best_size((1000, 240), sizes) == (256, 64)
    image = CodeInput(128, "best", 0.0)(Image.new("RGB", (1000, 240), "white"))
    assert image.tensor.shape == (3, 64, 256)
    assert bool((image.tensor == 1).all())


def test_an_image_that_is_none_is_refused():
    with pytest.raises(TypeError, match="expected a PIL image"):
        CodeInput(8)("cat.png")
