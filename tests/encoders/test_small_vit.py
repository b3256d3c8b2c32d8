"""SmallViT: equal to timm's VisionTransformer, and independent of timm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from encoders.small_vit import UNFUSED, ConvStem, SmallViT

ROOT = Path(__file__).parents[2]


def timm_vit(stem: str, sizes: dict) -> nn.Module:
    """timm's transformer of the same sizes; the convolutional stem is ours."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    class Stem(ConvStem):
        def __init__(self, img_size: int, patch_size: int, embed_dim: int, **options: object):
            super().__init__(img_size, patch_size, embed_dim)
            self.num_patches = self.grid_size[0] ** 2

    return VisionTransformer(
        img_size=sizes["size"],
        patch_size=sizes["patch"],
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        act_layer=sizes["act"],
        embed_layer=PatchEmbed if stem == "patch" else Stem,
        class_token=False,
        global_pool="",
        num_classes=0,
    )


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("side", [16, 72])  # 4 tokens unfused, 324 fused
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_equals_timm(stem: str, side: int, act: str) -> None:
    size = side if side < 64 else side * 2
    sizes = {"size": size, "patch": 8, "dim": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.5}
    sizes |= {"act": act}
    torch.manual_seed(0)
    theirs = timm_vit(stem, sizes)
    torch.manual_seed(0)
    ours = SmallViT(**sizes, stem=stem)
    for name, weight in theirs.state_dict().items():
        # Not the same numbers: trunc_normal_ of torch 2.14 draws others than timm's.
        assert ours.state_dict()[name].shape == weight.shape, name
        spread = float(ours.state_dict()[name].std(correction=0))
        wanted = float(weight.std(correction=0))
        assert spread == pytest.approx(wanted, rel=0.3, abs=3e-3), name
    assert ours.blocks[0].attn.is_fused == ((size // 8) ** 2 > UNFUSED)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = theirs.forward_features(images)
        torch.testing.assert_close(ours.forward_features(images), wanted, atol=1e-5, rtol=1e-5)


def test_fused_and_unfused_attention_agree() -> None:
    vit = SmallViT(size=16, dim=24, heads=3)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        unfused = vit.forward_features(images)
        for block in vit.blocks:
            block.attn.is_fused = True
        torch.testing.assert_close(vit.forward_features(images), unfused, atol=1e-5, rtol=1e-5)


def test_a_small_encoder_needs_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys; from encoders.vit import ViT\n"
        "for stem in ('conv', 'patch'): vit = ViT(stem=stem); vit([vit.prepare(ViT.example())])\n"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'gelu' or 'gelu_tanh'"):
        SmallViT(act="relu")
