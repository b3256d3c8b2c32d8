"""A quarter of the image tokens: how much faster a decode, or the tower itself, becomes.

    python -m pytest -m slow -s tests/speed/test_prune_speed.py

Processor time, one thread, AMD EPYC: see the README.
"""

import time
from functools import partial
from statistics import median

import pytest
import torch

from adapters.prune_tome_tower import ToMeTower
from encoders.vit import ViT
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.layout import Row, Sparse
from tests.speed.shapes import SHAPES, synthetic

MEDIA, TEXT = 729, 39


def seconds(model, prompt, strategies):
    begin = time.process_time()
    decode(model, prompt, 64, strategies)
    return time.process_time() - begin


@pytest.mark.slow
@pytest.mark.parametrize(
    # With a prompt that is computed once, half of the time goes into the layers before the ranking.
    ("caches", "least"),
    [((), 1.5), ((PrefixLM(),), 1.2)],
    ids=["none", "prefix-lm"],
)
def test_a_quarter_of_the_image_is_faster(caches, least):
    shape = SHAPES["cap768"]
    model = synthetic(shape.transformer)
    text = torch.randint(100, 1000, (TEXT,))
    image = 0.02 * torch.randn(MEDIA, shape.transformer.width)
    places = torch.arange(0, MEDIA, 4)
    plan = [Blocks(32), TopK(steps=8), *caches]
    rows = {
        "all": (Row((text[:5], image, text[5:])), plan),
        "before": (Row((text[:5], Sparse(image[places], places, MEDIA), text[5:])), plan),
        "inside": (Row((text[:5], image, text[5:])), [*plan, PruneMedia(0.25, layer=2)]),
    }
    ready = {name: (model.arrange([row]), given) for name, (row, given) in rows.items()}
    times = {name: [] for name in ready}
    for turn in range(4):
        for name, (prompt, given) in ready.items():
            took = seconds(model, prompt, given)
            if turn:  # the first one warms up
                times[name].append(took)
    ratios = {
        name: median(a / b for a, b in zip(times["all"], each, strict=True))
        for name, each in times.items()
    }
    print({n: (round(median(times[n]), 3), round(r, 2)) for n, r in ratios.items()})
    assert ratios["before"] > least
    assert ratios["inside"] > least


@pytest.mark.slow
@torch.inference_mode()
def test_merging_inside_a_tower_makes_it_faster():
    vit = ViT(size=384, patch=16, dim=384, depth=12, heads=6, stem="patch").eval()
    item = vit.prepare(vit.example())
    calls = {"all": lambda: vit([item])}
    for keep in (0.5, 0.25):
        calls[keep] = partial(vit.merged, [item], ToMeTower(keep))
    times = {name: [] for name in calls}
    for turn in range(6):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - begin)
    ratios = {
        name: median(a / b for a, b in zip(times["all"], each, strict=True))
        for name, each in times.items()
    }
    print({n: (round(median(times[n]), 3), round(r, 2)) for n, r in ratios.items()})
    assert ratios[0.25] > ratios[0.5] > 1.15
