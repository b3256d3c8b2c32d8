"""ToMe between the blocks of a tower: a slow reference, schedules, batches, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.llava_grid import LlavaGrid
from adapters.mlp import MLP
from adapters.pixel_shuffle import PixelShuffle
from adapters.prune_tome_tower import ToMeTower
from encoders.anyres import AnyRes
from encoders.qwen_vision import QwenVision
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.decoding.pruning import option
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "pruners.safetensors"
SIGLIP = "vit_base_patch16_siglip_224"


def tower(name=None, **given):
    torch.manual_seed(0)
    sizes = {"size": 48, "patch": 8, "dim": 24, "depth": 3, "heads": 3, "mlp_ratio": 2.0}
    made = ViT(name, **sizes | given).eval()
    for weight in made.parameters():  # far from the small initial values, so that keys differ
        torch.nn.init.normal_(weight, std=0.25)
    return made


def items(vit, count=3):
    return [vit.prepare(vit.example(seed)) for seed in range(count)]


def slow_tome(vit, x, plan):
    """Tokens and places of one image [N E], token by token, from the paper's definition."""
    tokens, stand, places = list(x), [1] * len(x), list(range(len(x)))
    for block, r in zip(vit.blocks, plan, strict=True):
        heads = getattr(block.attn, "heads", None) or block.attn.num_heads
        rows = block.attn.qkv(block.norm1(torch.stack(tokens)))
        q, k, v = rows.unflatten(-1, (3, heads, -1)).unbind(1)  # [N H C]
        mixed = []
        for i in range(len(tokens)):
            parts = []
            for h in range(heads):
                scores = [
                    float(q[i, h] @ k[j, h]) / math.sqrt(k.shape[-1]) + math.log(stand[j])
                    for j in range(len(tokens))
                ]
                parts.append(torch.tensor(scores).softmax(0) @ v[:, h])
            mixed.append(torch.cat(parts))
        tokens = [t + block.attn.proj(m) for t, m in zip(tokens, mixed, strict=True)]
        metric = [each / each.norm() for each in k.mean(1)]
        evens, odds = range(0, len(tokens), 2), range(1, len(tokens), 2)
        best = {a: max(odds, key=lambda b: float(metric[a] @ metric[b])) for a in evens}  # noqa: B023
        likeness = {a: float(metric[a] @ metric[best[a]]) for a in evens}
        ranked = sorted(evens, key=lambda a: -likeness[a])
        sums = [t * n for t, n in zip(tokens, stand, strict=True)]
        for a in ranked[:r]:
            sums[best[a]] = sums[best[a]] + sums[a]
            stand[best[a]] += stand[a]
        order = [*ranked[r:], *odds]
        tokens = [sums[i] / stand[i] for i in order]
        stand, places = [stand[i] for i in order], [places[i] for i in order]
        tokens = [t + block.mlp(block.norm2(t)) for t in tokens]
    pairs = sorted(zip(places, tokens, strict=True), key=lambda pair: pair[0])
    return vit.norm(torch.stack([t for _, t in pairs])), [p for p, _ in pairs]


@torch.no_grad()
@pytest.mark.parametrize("name", [None, SIGLIP])
@pytest.mark.parametrize(
    ("merging", "left"),
    [
        (ToMeTower(r=5), 21),
        (ToMeTower(r=5, schedule="decreasing"), 21),
        (ToMeTower(0.25), 9),
        (ToMeTower(r=30), 5),
    ],
)
def test_equals_a_slow_reference_token_by_token(name, merging, left):
    made = tower(name)
    given = items(made, 2)
    features, places = made.merged(given, merging)
    plan = merging.plan(36, 3)
    for i, item in enumerate(given):
        x = made.vit.patch_embed(item.tensor[None]).reshape(36, -1) + made.vit.pos_embed[0]
        tokens, at = slow_tome(made.vit, x, plan)
        assert places[i].tolist() == at
        assert torch.allclose(features.tokens[i], tokens, rtol=1e-4, atol=1e-4)
    assert features.tokens.shape[1] == left
    assert features.grid is None


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
def test_numbers_of_pairs_are_the_published_ones(schedule):
    published = load_file(GOLDEN)[f"tome.schedule_{schedule[:3].replace('con', 'const')}"]
    assert ToMeTower(r=10, schedule=schedule).plan(500, 6) == published.tolist()


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
@pytest.mark.parametrize(("keep", "left"), [(0.5, 364), (0.1, 73), (100, 100), (1.0, 729)])
def test_a_share_is_reached_in_the_last_block(schedule, keep, left):
    plan = ToMeTower(keep, schedule=schedule).plan(729, 26)
    assert 729 - sum(plan) == left
    if schedule == "decreasing":
        assert plan == sorted(plan, reverse=True)
    else:
        assert max(plan) - min(plan) <= 1


@torch.no_grad()
@pytest.mark.parametrize("method", [ToMeTower(r=0), ToMeTower(1.0)])
def test_merging_nothing_is_bit_equal(method):
    made = tower()
    given = items(made)
    features, places = made.merged(given, method)
    assert torch.equal(features.tokens, made(given).tokens)
    assert places.tolist() == [list(range(36))] * 3


@torch.no_grad()
def test_an_image_in_a_batch_gets_what_it_gets_alone():
    made = tower()
    given = items(made, 4)
    together, places = made.merged(given, ToMeTower(r=6))
    for i, item in enumerate(given):
        alone, at = made.merged([item], ToMeTower(r=6))
        assert at[0].tolist() == places[i].tolist()
        assert torch.allclose(alone.tokens[0], together.tokens[i], atol=1e-5)


@torch.no_grad()
def test_later_blocks_compute_fewer_tokens():
    made, seen = tower(), []
    for block in made.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    made.merged(items(made, 1), ToMeTower(r=8))
    assert seen == [28, 20, 12]


def system(encoder, adapter):
    torch.manual_seed(1)
    transformer = TransformerConfig(width=16, layers=1, heads=2, inner=16, vocab=20)
    spec = Spec("mmdlm", transformer, mask_id=2, eos_id=1, pad_id=0)
    model = MultimodalDLM(spec, {"image": encoder}, {"image": adapter}).eval()
    model.backbone.reset(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def test_a_model_puts_merged_tokens_in_their_places():
    made = tower()
    model, given = system(made, MLP(24, 16)), items(made, 2)
    rows = [Row((torch.tensor([5, 6]), item, torch.tensor([7]))) for item in given]
    option.apply(model, None)
    whole = model.embed(rows)
    option.apply(model, "tome-tower@r=0")
    assert torch.equal(model.embed(rows).media, whole.media)
    option.apply(model, "tome-tower@r=6")
    features, places = made.merged(given, ToMeTower(r=6))
    found = model.embed(rows)
    assert torch.allclose(found.media, model.adapters["image"](features).tokens.flatten(0, 1))
    for i, at in enumerate(places):
        expected = [0, 1, *(2 + at).tolist(), 2 + 36]
        assert found.positions[i].tolist() == expected
    option.apply(model, ToMeTower(r=6, renumber=True))
    assert model.embed(rows).positions[0].tolist() == list(range(2 + 18 + 1))


@torch.no_grad()
def test_half_precision_stays_half_precision():
    made = tower()
    features, places = made.bfloat16().merged(items(made, 1), ToMeTower(r=4))
    assert features.tokens.dtype == torch.bfloat16
    assert features.tokens.isfinite().all()
    assert places.shape == (1, 24)


@pytest.mark.parametrize(
    ("encoder", "adapter", "error"),
    [
        (ViT.tiny, LlavaGrid, "not a grid any more, which LlavaGrid needs; use tome"),
        (AnyRes.tiny, LlavaGrid, "not a grid any more, which LlavaGrid needs"),
        (ViT.tiny, PixelShuffle, "which PixelShuffle needs"),
        (QwenVision.tiny, MLP, "without class token, such as SigLIP; QwenVision cannot merge"),
        (lambda: ViT("vit_tiny_patch16_224", size=32), MLP, "without class token"),
    ],
)
def test_systems_that_it_would_break_are_refused(encoder, adapter, error):
    made = encoder()
    model = system(made, adapter(made.dim, 16))
    with pytest.raises(ValueError, match=error):
        option.apply(model, "tome-tower@0.5")
    assert model.pruner is None


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("tome-tower@r=-1", "ToMeTower.r is -1"),
        ("tome-tower@q=8", "ToMeTower has no 'q', only keep"),
        ("tome-tower@r=many", "expected a share such as 0.25"),
        ("divprune@r=8", "DivPrune has no 'r'"),
    ],
)
def test_wrong_options_are_named(given, error):
    with pytest.raises(ValueError, match=error):
        option.read(given)


def test_impossible_numbers_are_named():
    with pytest.raises(ValueError, match="give one of them"):
        ToMeTower(0.3, r=4)
    with pytest.raises(ValueError, match="10 are left after 2 blocks"):
        ToMeTower(0.1).plan(36, 2)
