"""Attention recorded from Qwen towers: a slow reference, windows, batches, threads."""

import math
import threading

import numpy as np
import pytest
import torch

from encoders.attention import received, recorded
from encoders.qwen25_vision import Qwen25Vision
from encoders.qwen_vision import QwenVision

SIZES = {"width": 16, "depth": 3, "heads": 2, "min_pixels": 1, "max_pixels": 20000}


def qwen2(**given):
    return QwenVision(20, **SIZES | given)


def qwen25(full=(1,), **given):
    return Qwen25Vision(**SIZES | {"inner": 24, "window": 56, "full": full} | given)


def drawn(encoder):
    """The encoder with weights of which attention depends on the image, and images of two sizes."""
    torch.manual_seed(0)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    rng = np.random.default_rng(0)
    shapes = (112, 56), (84, 140), (112, 56)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return encoder.eval(), [encoder.prepare(image) for image in images]


def turned(vector, row, column):
    """A query or key [d] rotated by hand; the first half of the pairs by the row."""
    half = len(vector) // 2
    out = vector.clone()
    for pair in range(half):
        place, speed = (row, pair) if pair < half // 2 else (column, pair - half // 2)
        angle = place * 10000.0 ** -(speed / (half // 2))
        a, b = vector[pair], vector[pair + half]
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def slow_units(encoder, item, x, block):
    """Attention received and keys of the tokens of one image, patch by patch.

    Args:
        x: [n width] patches before the block, groups of 2 x 2 in row-major order.
    """
    _, rows, columns = item.grid
    places = [
        (2 * y + a, 2 * z + b)
        for y in range(rows // 2)
        for z in range(columns // 2)
        for a in range(2)
        for b in range(2)
    ]
    q, k, _ = block.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).unbind(1)  # [n H d]
    paid = torch.zeros(len(x))
    for head in range(2):
        queries, keys = (
            torch.stack([turned(each[i, head], *places[i]) for i in range(len(x))])
            for each in (q, k)
        )
        for query in queries:
            scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
            paid += scores.softmax(0) / (2 * len(x))
    groups = range(0, len(x), 4)
    sums = torch.stack([paid[i : i + 4].sum() for i in groups])
    return sums, torch.stack([k[i : i + 4].mean((0, 1)) for i in groups])


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "index"),
    [
        (qwen2, 2),
        (qwen25, 1),
        (lambda: qwen25((0, 2)), 2),
        (lambda: qwen25((0, 2), layer=-2), 0),
    ],
)
def test_units_of_the_last_full_layer_equal_a_slow_reference(make, index):
    encoder, items = drawn(make())
    inputs = []
    block = encoder.blocks[index]
    block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    for item in items[:2]:
        with recorded(encoder) as attended:
            features = encoder([item])
        x = inputs[-1]
        if isinstance(encoder, Qwen25Vision):  # patches are in the order of the windows
            order, _, _ = encoder._windows([item])
            x = x.unflatten(0, (-1, 4))[order.argsort()].flatten(0, 1)
        sums, keys = slow_units(encoder, item, x, block)
        assert attended.received.shape == features.mask.shape
        assert torch.allclose(attended.received[0], sums, atol=1e-5)
        assert torch.allclose(attended.keys[0], keys, atol=1e-5)
        assert float(attended.received.sum()) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [qwen2, qwen25])
def test_an_image_in_a_batch_has_what_it_has_alone(make):
    encoder, items = drawn(make())
    plain = encoder(items)
    with recorded(encoder) as attended:
        assert torch.equal(encoder(items).tokens, plain.tokens)
    for i, item in enumerate(items):
        with recorded(encoder) as alone:
            encoder([item])
        size = alone.received.shape[1]
        assert torch.allclose(attended.received[i, :size], alone.received[0], atol=1e-6)
        assert torch.allclose(attended.keys[i, :size], alone.keys[0], atol=1e-6)
        assert not attended.received[i, size:].any()


def test_many_queries_are_computed_in_parts(monkeypatch):
    q, k = torch.randn(2, 2, 11, 4, generator=torch.Generator().manual_seed(0))
    whole = received(q, k)
    monkeypatch.setattr("encoders.attention.QUERIES", 3)
    assert torch.allclose(received(q, k), whole, atol=1e-6)


@torch.no_grad()
def test_forwards_of_other_threads_are_not_recorded():
    encoder, items = drawn(qwen2())
    with recorded(encoder) as attended:
        other = threading.Thread(target=lambda: encoder(items[:1]))
        other.start()
        other.join()
        assert not hasattr(attended, "received")
        encoder(items[1:2])
    assert attended.received.shape == (1, 15)
