"""Pruners: published values, slow references, places, and models that prune."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from adapters.llava_grid import LlavaGrid
from adapters.mlp import MLP
from adapters.pixel_shuffle import PixelShuffle
from adapters.pool import Pool
from adapters.prune_divprune import DivPrune
from adapters.prune_pooling import Pooling
from adapters.prune_prumerge import PruMerge, outliers, prumerged
from adapters.prune_received import Received
from adapters.prune_tome import ToMe, average, matched, pooled
from adapters.prune_uniform import Uniform
from adapters.prune_visionzip import VisionZip, zipped
from adapters.pruner import Seen
from encoders.anyres import AnyRes
from encoders.attention import recorded
from encoders.features import Features
from encoders.qwen25_vision import Qwen25Vision
from encoders.vit import ViT

GOLDEN = Path(__file__).parents[1] / "golden" / "vision" / "pruners.safetensors"
ALL = (DivPrune, Pooling, PruMerge, Received, ToMe, Uniform, VisionZip)


@pytest.fixture(scope="module")
def published():
    return load_file(GOLDEN)


def some(count=12, seed=0, grid=None):
    generator = torch.Generator().manual_seed(seed)
    tokens, keys = (torch.randn(count, n, generator=generator) for n in (6, 4))
    received = torch.rand(count, generator=generator)
    return Seen(tokens, keys, received / received.sum(), grid)


# -- published values


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_divprune_picks_the_published_tokens(published, share):
    picked = DivPrune(share).select(Seen(published["tokens"][0]))
    assert torch.equal(picked, published[f"divprune.{share}"])


@pytest.mark.parametrize("row", [0, 1])
def test_tome_merges_as_published(published, row):
    tokens, keys, one = published["tokens"][row], published["keys"][row], torch.ones(49, 1)
    order, pairs = matched(keys, 10)
    assert torch.allclose(average(tokens, one, order, pairs), published["tome.cls0.merged"][row])
    assert torch.equal(pooled(one, order, pairs), published["tome.cls0.size"][row])


@pytest.mark.parametrize("row", [0, 1])
def test_visionzip_keeps_and_merges_as_published(published, row):
    importance = published["visionzip.attn"][row, :, 0, 1:].sum(0)
    hidden, keys = published["visionzip.hidden"][row, 1:], published["visionzip.metric"][row, 1:]
    found = zipped(hidden, importance, keys, 8, 5)
    assert torch.allclose(found.tokens, published["visionzip.out"][row, 1:], atol=1e-5)
    assert set(found.places[:8].tolist()) == set(
        (published["visionzip.kept"][row, 1:] - 1).tolist()
    )


def test_prumerge_keeps_and_merges_as_published(published):
    q, k = published["prumerge.q"][0], published["prumerge.k"][0]
    scores = (q[:1] @ k.T * k.shape[1] ** -0.5).softmax(-1)[0, 1:]
    count = outliers(scores)
    assert count / 49 == float(published["prumerge.adaptive_ratio"])
    chosen = scores.topk(count).indices
    found = prumerged(published["prumerge.features"][0, 1:], scores, k[1:], chosen, 32)
    assert torch.allclose(found.tokens, published["prumerge.out_adaptive"][0], atol=1e-5)


# -- slow references


@pytest.mark.parametrize("seed", range(5))
def test_divprune_equals_a_loop(seed):
    tokens = some(17, seed).tokens
    distance = [[1 - float(functional.cosine_similarity(a, b, 0)) for b in tokens] for a in tokens]
    places = range(17)
    picks = [max(places, key=lambda i: min(distance[i][j] for j in places if j != i))]
    while len(picks) < 6:
        rest = [i for i in places if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i][j] for j in picks)))
    assert DivPrune(6).select(Seen(tokens)).tolist() == picks


def test_pooling_averages_areas_of_the_grid():
    tokens = torch.arange(16.0).view(16, 1)
    found = Pooling(4)(Seen(tokens, grid=(4, 4)))
    assert found.tokens[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert found.places.tolist() == [5, 7, 13, 15]
    along = Pooling(0.5)(Seen(tokens))
    assert along.tokens[:, 0].tolist() == [0.5 + 2 * i for i in range(8)]


def test_merging_keeps_the_mean_of_all_tokens():
    seen = some(16)
    found = ToMe(5)(seen)
    # Each token stands for some; the sizes are what makes the mean of all come out.
    sizes = torch.linalg.lstsq(found.tokens.T, seen.tokens.sum(0)[:, None]).solution[:, 0]
    assert torch.allclose(sizes, sizes.round(), atol=1e-3)
    assert int(sizes.round().sum()) == 16


def test_adaptive_prumerge_decides_the_number():
    calm, loud = some(32), some(32)
    loud.received[[3, 8, 20]] = 1.0
    assert len(PruMerge(20, adaptive=True)(loud).tokens) == 4
    assert len(PruMerge(20, adaptive=True)(calm).tokens) <= 2
    spread = PruMerge(9, spread=True)(loud)
    assert set(spread.places.tolist()) >= {3, 8, 20}
    assert len(spread.tokens) <= 9


# -- what all have in common


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("grid", [(3, 4), None])
def test_places_are_ascending_and_counts_hold(kind, grid):
    for keep, most in ((0.5, 6), (0.25, 3), (4, 4), (1, 1)):
        found = kind(keep)(some(12, grid=grid))
        assert 1 <= len(found.tokens) == len(found.places) <= max(most, 2)
        assert found.places.tolist() == sorted(found.places.tolist())
        assert found.places.min() >= 0
        assert found.places.max() < 12
    whole = kind(1.0)(some(12, grid=grid))
    assert torch.equal(whole.tokens, some(12).tokens)
    assert torch.equal(kind(40)(some(12, grid=grid)).tokens, whole.tokens)


@pytest.mark.parametrize("keep", [0.0, -1, 1.5, float("nan"), 0])
def test_wrong_budgets_are_named(keep):
    with pytest.raises(ValueError, match=r"Uniform\.keep is"):
        Uniform(keep)


# -- attention of the tower


def slow_attention(vit, x, block):
    """Keys and attention received [N] of a block, for one image of prefix-free tokens."""
    x = vit.patch_embed(x) + vit.pos_embed
    for each in vit.blocks[:block]:
        x = each(x)
    attention = vit.blocks[block].attn
    x = vit.blocks[block].norm1(x)
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return k.mean(2)[0], weights.softmax(-1).mean((1, 2))[0]


@pytest.mark.parametrize(("layers", "block"), [(None, 1), (3, 2), (2, 1)])
def test_the_last_but_one_layer_is_recorded(layers, block):
    vit = ViT(size=32, patch=8, dim=24, depth=3, heads=3, layers=layers).eval()
    item = vit.prepare(vit.example())
    with torch.no_grad(), recorded(vit) as attended:
        vit([item])
    keys, received = slow_attention(vit.vit, item.tensor[None], block if layers else 1)
    assert torch.allclose(attended.keys[0], keys, atol=1e-6)
    assert torch.allclose(attended.received[0], received, atol=1e-6)
    assert float(attended.received.sum()) == pytest.approx(1)
    with torch.no_grad():
        vit([item])  # nothing is recorded any more
    assert torch.allclose(attended.keys[0], keys, atol=1e-6)


def test_towers_of_timm_record_without_their_class_token():
    vit = ViT("vit_tiny_patch16_224", size=32).eval()
    with torch.no_grad(), recorded(vit) as attended:
        features = vit([vit.prepare(vit.example())])
    assert attended.received.shape == features.mask.shape == (1, 4)
    assert 0 < float(attended.received.sum()) < 1


def test_towers_without_it_say_what_else_to_use():
    with (
        pytest.raises(ValueError, match="Qwen25Vision records no attention.*divprune"),
        recorded(Qwen25Vision(16, depth=2, heads=2, inner=24, window=56, full=())),
    ):
        pass


def test_values_are_carried_as_tokens_are_merged():
    values = torch.arange(16.0).view(1, 16, 1)
    features = Features(values, torch.ones(1, 16, dtype=torch.bool), (4, 4))
    assert MLP(1, 8).carry(features, [None])[0][:, 0].tolist() == list(range(16))
    means = [2.5, 4.5, 10.5, 12.5]
    assert PixelShuffle(1, 8).carry(features, [None])[0][:, 0].tolist() == means
    assert Pool(1, 8, kind="average").carry(features, [None])[0][:, 0].tolist() == means
    with pytest.raises(ValueError, match="Pool mixes tokens"):
        Pool(1, 8, kind="concat").carry(features, [None])


def test_views_are_carried_with_empty_ends_of_rows():
    encoder = AnyRes.tiny()
    item = encoder.prepare(encoder.example())
    adapter = LlavaGrid(32, 8)
    with torch.no_grad(), recorded(encoder) as attended:
        features = encoder([item])
        (tokens,) = adapter.embed(features, [item])
    (carried,) = adapter.carry(attended.features(features), [item])
    assert len(carried) == len(tokens.tokens)
    ends = (tokens.tokens == adapter.newline).all(1)
    assert ends.any()
    assert (carried[ends] == 0).all()
    assert (carried[~ends, 0] > 0).all()
