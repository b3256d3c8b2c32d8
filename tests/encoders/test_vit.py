"""ViT: parity with the SigLIP tower of LaViDa, pixel preparation, sizes and errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters.mlp import MLP
from adapters.pool import Pool
from encoders.features import Prepared
from encoders.vit import ViT

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
PREFIX = "model.vision_tower.vision_tower."


def siglip(**options) -> ViT:
    """A tower of the golden's sizes: its published file holds 2 of 3 layers."""
    sizes = {"size": 54, "patch": 2, "dim": 32, "depth": 3, "heads": 4, "mlp_ratio": 1.5}
    return ViT("vit_so400m_patch14_siglip_384", **sizes, act="gelu_tanh", layers=2, **options)


def remap(state: dict[str, torch.Tensor], target: dict[str, torch.Tensor], prefix: str) -> dict:
    """Published tensors under our names, by `ViT.KEYS`."""
    out = {}
    for name, value in target.items():
        parts = name.split(".")
        block = parts[2] if parts[1] == "blocks" else ""
        if block:
            parts[2] = "{i}"
        ours = ".".join(parts)
        sources = ViT.KEYS[f"{ours}[0]" if ours == "vit.pos_embed" else ours]
        sources = (sources,) if isinstance(sources, str) else sources
        found = [state[prefix + source.replace("{i}", block)] for source in sources]
        out[name] = torch.cat(found).reshape(value.shape)
    return out


def test_siglip_tower_equals_reference():
    golden = load_file(GOLDEN / "siglip.safetensors")
    vit = siglip()
    vit.load_state_dict(remap(golden, vit.state_dict(), PREFIX))
    with torch.no_grad():
        features = vit([vit.prepare(view.numpy()) for view in golden["pixels"]])
    assert features.grid == (27, 27)
    assert features.mask.all()
    torch.testing.assert_close(features.tokens[:, ::16], golden["tower"], atol=1e-5, rtol=1e-5)


def test_tower_projector_and_bilinear_pooling_equal_reference():
    golden = load_file(GOLDEN / "siglip.safetensors")
    vit, pool = siglip(), Pool(32, 48, kind="bilinear")
    vit.load_state_dict(remap(golden, vit.state_dict(), PREFIX))
    pool.project.load_state_dict({ours: golden[name] for ours, name in MLP.KEYS.items()})
    with torch.no_grad():
        pooled = pool(vit([vit.prepare(view.numpy()) for view in golden["pixels"]]))
    assert pooled.grid == (14, 14)
    torch.testing.assert_close(pooled.tokens[:, ::4], golden["pooled"], atol=1e-5, rtol=1e-5)


def test_siglip_keys_consume_every_published_tensor_but_the_unused_norm():
    golden = {k for k in load_file(GOLDEN / "siglip.safetensors") if k.startswith(PREFIX)}
    used = set()
    for value in ViT.KEYS.values():
        for source in (value,) if isinstance(value, str) else value:
            used |= {PREFIX + source.replace("{i}", str(i)) for i in range(2)}
    assert golden <= used
    assert used == golden


def test_a_picture_file_gives_the_reference_pixels():
    vit, golden = siglip(), load_file(GOLDEN / "siglip.safetensors")
    from_file = vit.prepare(Image.open(GOLDEN / "siglip.png")).tensor
    from_array = vit.prepare(golden["pixels"][0].numpy()).tensor
    assert torch.equal(from_file, from_array)
    expected = (golden["pixels"][0].permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(from_file, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_default_sizes_give_64_tokens_of_192_and_all_weights_learn(stem):
    vit = ViT(stem=stem)
    images = [vit.prepare(ViT.example(seed)) for seed in range(2)]
    features = vit(images)
    assert features.tokens.shape == (2, 64, 192)
    assert (features.grid, vit.dim, vit.kind) == ((8, 8), 192, "image")
    features.tokens.square().mean().backward()
    for name, weight in vit.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("stem", "rows", "columns"),
    # The stem's seven convolutions reach 2 + 2 + 4 + 4 + 8 + 8 + 8 pixels around a patch's corner.
    [("conv", (0, 16 + 36), (40 - 36, 63)), ("patch", (16, 23), (40, 47))],
)
def test_tokens_lie_row_major_where_their_pixels_are(stem, rows, columns):
    embed = ViT(stem=stem).vit.patch_embed
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    embed(image)[0, 2 * 8 + 5].square().sum().backward()
    y, x = image.grad.abs().sum((0, 1)).nonzero().T
    assert (int(y.min()), int(y.max())) == rows
    assert (int(x.min()), int(x.max())) == columns


def test_bfloat16_autocast_stays_close_and_trains():
    torch.manual_seed(0)
    vit = ViT.tiny()
    images = [vit.prepare(ViT.example(seed)) for seed in range(3)]
    exact = vit(images).tokens
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vit(images).tokens
    rounded.float().sum().backward()
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in vit.parameters())


def test_a_row_alone_equals_the_row_in_a_batch():
    vit = ViT.tiny()
    images = [vit.prepare(ViT.example(seed)) for seed in range(4)]
    with torch.no_grad():
        batch = vit(images).tokens
        for index, image in enumerate(images):
            torch.testing.assert_close(vit([image]).tokens[0], batch[index], atol=1e-5, rtol=1e-5)


def test_every_form_of_an_image_gives_the_same_pixels():
    vit = ViT.tiny()
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = vit.prepare(array).tensor
    assert expected.shape == (3, 16, 16)
    assert expected.dtype == torch.float32
    assert float(expected.min()) >= -1
    assert float(expected.max()) <= 1
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    for form in (
        Image.fromarray(array),
        torch.from_numpy(array),
        channels_first,
        channels_first / 255,
        array.astype(np.float64) / 255,
        array[::-1][::-1],
    ):
        assert torch.equal(vit.prepare(form).tensor, expected)


def test_prepare_does_not_share_memory_with_the_array():
    vit = ViT.tiny()
    array = np.zeros((16, 16, 3), np.uint8)
    pixels = vit.prepare(array).tensor
    array[:] = 255
    assert float(pixels.max()) == -1


def test_grey_palette_and_transparent_images_become_rgb():
    vit = ViT.tiny()
    grey = np.full((5, 9), 100, np.uint8)
    colour = np.repeat(grey[:, :, None], 3, 2)
    assert torch.equal(vit.prepare(grey).tensor, vit.prepare(colour).tensor)
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert torch.equal(vit.prepare(clear).tensor, torch.ones(3, 16, 16))
    palette = Image.new("RGB", (8, 8), (255, 0, 0)).convert("P")
    assert vit.prepare(palette).tensor[:, 0, 0].tolist() == [1, -1, -1]


def test_one_pixel_image_is_spread_over_the_square():
    vit = ViT.tiny()
    pixels = vit.prepare(np.array([[[255, 0, 255]]], np.uint8)).tensor
    assert torch.equal(pixels, torch.tensor([1.0, -1, 1]).view(3, 1, 1).expand(3, 16, 16))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((5, 5, 2), np.uint8), r"image is \[5, 5, 2\], expected \[Y X\]"),
        (np.zeros((0, 4, 3), np.uint8), "Y, X > 0"),
        (np.zeros((4, 4, 3), np.int64), "dtype is int64"),
        (np.full((4, 4, 3), np.nan, np.float32), "spans nan"),
        (np.full((4, 4, 3), 200, np.float32), "divide by 255"),
        (torch.full((3, 4, 4), -0.1), "expected 0 to 1"),
        (Image.new("F", (4, 4), -1), "spans -1 to -1"),
    ],
)
def test_unusable_images_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        ViT.tiny().prepare(item)


def test_files_are_left_to_the_one_reader_of_files(tmp_path):
    with pytest.raises(TypeError, match="read files with mmdlm.media.read_image"):
        ViT.tiny().prepare(tmp_path / "x.png")


def test_other_kinds_of_items_are_refused():
    with pytest.raises(TypeError, match="image is a int"):
        ViT.tiny().prepare(3)


def test_forward_names_the_image_that_does_not_fit():
    vit = ViT.tiny()
    with pytest.raises(ValueError, match=r"image 1 is \[3, 8, 8\], expected \[3, 16, 16\]"):
        vit([Prepared("image", torch.zeros(3, side, side)) for side in (16, 8)])
    with pytest.raises(ValueError, match="no images"):
        vit([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_so400m_patch14_siglip"}, "near: .*vit_so400m_patch14_siglip_224"),
        ({"name": "resnet18"}, "expected a vision transformer"),
        ({"name": "deit_tiny_patch16_224", "stem": "conv"}, "fixed patch embedding"),
        ({"patch": 7}, "power of two"),
        ({"dim": 100}, "multiple of heads=6"),
        ({"size": 60}, "size=60"),
        ({"stem": "mlp"}, "'conv' or 'patch'"),
        ({"layers": 3}, "tower with 2; expected 1 to 2"),
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"pretrained": True}, "pass name="),
        ({"std": (1.0, 0.0, 1.0)}, "std is .*each at least"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(**options)


def test_named_model_without_prefix_tokens_and_with_its_own_pixel_statistics():
    vit = ViT("deit_tiny_patch16_224", depth=1)
    features = vit([vit.prepare(ViT.example())])
    assert features.tokens.shape == (1, 196, 192)
    assert vit.preprocess.mean == pytest.approx((0.485, 0.456, 0.406))


def test_layers_drops_the_final_norm_and_the_rest_of_the_tower():
    names = dict(ViT(size=16, depth=3, layers=2).named_parameters())
    assert not [name for name in names if "blocks.2" in name or name.startswith("vit.norm")]


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        vit = ViT("vit_so400m_patch14_siglip_384", act="gelu_tanh", layers=26)
    assert (vit.dim, vit.grid, vit.size, len(vit.vit.blocks)) == (1152, (27, 27), 384, 26)
    assert vit.prepare(ViT.example()).tensor.shape == (3, 384, 384)


def test_views_give_one_row_each_and_the_original_size_is_kept():
    vit = ViT.tiny()
    images = [vit.prepare(ViT.example(seed)) for seed in range(3)]
    views = Prepared("image", torch.stack([image.tensor for image in images[:2]]))
    with torch.no_grad():
        assert torch.equal(vit([views, images[2]]).tokens, vit(images).tokens)
    assert images[0].size == (20, 24)


def test_preprocessing_holds_no_weights_and_can_be_pickled():
    vit = ViT.tiny()
    again = pickle.loads(pickle.dumps(vit.preprocess))
    assert len(pickle.dumps(vit.preprocess)) < 1000
    assert torch.equal(again(ViT.example()).tensor, vit.prepare(ViT.example()).tensor)
