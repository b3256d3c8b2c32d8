from dataclasses import replace

import pytest
import torch

from mmdlm.backbones.moe import MoEConfig
from tests.speed import roofline
from tests.speed.roofline import H200, Cost, Rates, floor, forward, forwards
from tests.speed.shapes import DREAM_7B, LLADA_8B, SHAPES, Shape, synthetic

CANVAS, BLOCK = 64, 32
# Prompt; full pass, full pass with all positions through the head, prefix step, dual step and
# prefill in ms: LLaDA-8B in bfloat16 on an H200, computed by hand from the formulas.
FORWARDS = [
    (499, 10.2, 10.9, 3.66, 3.61, 9.0),
    (793, 15.7, 16.8, 3.69, 3.64, 14.4),
    (909, 17.9, 19.1, 3.71, 3.66, 16.6),
    (3709, 76.2, 81.1, 4.05, 4.00, 74.7),
    (1886, 37.0, 39.5, 3.83, 3.78, 35.7),
    (975, 19.1, 20.4, 3.72, 3.67, 17.9),
    (428, 8.9, 9.5, 3.65, 3.60, 7.7),
]


def ms(cost):
    return 1e3 * cost.seconds(H200)


@pytest.mark.parametrize(("prompt", "full", "all_rows", "prefix", "dual", "prefill"), FORWARDS)
def test_floors_of_one_forward(prompt, full, all_rows, prefix, dual, prefill):
    total = prompt + CANVAS
    assert ms(forward(LLADA_8B, total, total, BLOCK)) == pytest.approx(full, abs=0.051)
    assert ms(forward(LLADA_8B, total, total, total)) == pytest.approx(all_rows, abs=0.051)
    assert ms(forward(LLADA_8B, CANVAS, total, BLOCK)) == pytest.approx(prefix, abs=0.006)
    assert ms(forward(LLADA_8B, BLOCK, total, BLOCK)) == pytest.approx(dual, abs=0.006)
    assert ms(forward(LLADA_8B, prompt, prompt, 0)) == pytest.approx(prefill, abs=0.051)


def test_flops_and_bytes_of_one_forward():
    full = forward(LLADA_8B, 563, 563, BLOCK)
    assert full.flops == pytest.approx(8.1e12, rel=0.01)
    prefix = forward(LLADA_8B, CANVAS, 563, BLOCK)
    assert prefix.flops == pytest.approx(0.95e12, rel=0.01)
    assert prefix.bytes == pytest.approx(15.7e9, rel=0.005)
    dream = forward(DREAM_7B, 236, 236, 58)
    assert dream.flops == pytest.approx(3.2e12, abs=0.05e12)
    assert dream.bytes == pytest.approx(15.7e9, rel=0.005)
    assert ms(dream) == pytest.approx(4.0, abs=0.05)
    assert ms(forward(DREAM_7B, 58, 236, 58, columns=256)) == pytest.approx(3.1, abs=0.05)


def test_body_counts_the_weights_of_the_blocks():
    assert roofline.body(LLADA_8B) == pytest.approx(6.98e9, rel=1e-3)
    assert roofline.body(DREAM_7B) == pytest.approx(6.53e9, rel=1e-3)
    model = synthetic(SHAPES["tiny"].transformer)
    weights = sum(w.numel() for b in model.backbone.blocks for w in b.parameters() if w.ndim == 2)
    assert roofline.body(SHAPES["tiny"].transformer) == weights


@pytest.mark.parametrize(
    ("prompt", "steps", "none", "dual", "once", "prefix_lm"),
    [
        (499, 64, 653, 245, 239, 243),
        (499, 16, 163, 71, 65, 68),
        (793, 8, 125, 53, 41, 44),
        (3709, 16, 1219, 209, 137, 139),
    ],
)
def test_floors_of_whole_answers(prompt, steps, none, dual, once, prefix_lm):
    shape = Shape("x", LLADA_8B, (prompt,), CANVAS, BLOCK, steps)
    found = {
        mode: 1e3 * floor(shape, mode, H200)
        for mode in ("none", "prefix", "dual", "prompt-once", "prefix-lm")
    }
    wanted = {
        **{"none": none, "dual": dual, "prefix": dual},
        **{"prompt-once": once, "prefix-lm": prefix_lm},
    }
    assert found == pytest.approx(wanted, rel=0.015)


def test_rows_of_a_batch_share_the_weights():
    one, eight = (forward(LLADA_8B, BLOCK, 563, BLOCK, batch=b) for b in (1, 8))
    assert eight.flops == 8 * one.flops
    assert eight.bytes < 1.25 * one.bytes


def test_number_of_forwards_and_the_longer_side_counts():
    shape = SHAPES["cap256"]
    assert len(forwards(shape, "dual")) == 16
    assert len(forwards(shape, "prefix-lm")) == 17
    with pytest.raises(ValueError, match="thr256 has no fixed number of steps"):
        forwards(SHAPES["thr256"], "none")
    assert len(forwards(SHAPES["thr256"], "none", steps=5)) == 5
    assert Cost(10, 10).seconds(Rates(copy=1, matmul=5)) == 10
    assert Cost(10, 10).seconds(Rates(copy=5, matmul=1)) == 10
    wide = forward(shape.transformer, 1, 1, 1, itemsize=4)
    assert wide.bytes == 2 * forward(shape.transformer, 1, 1, 1).bytes


def test_experts_are_rejected():
    config = replace(LLADA_8B, moe=MoEConfig(experts=4, top=2, inner=8))
    with pytest.raises(ValueError, match="only dense models"):
        forward(config, 1, 1, 1)


def test_rates_of_this_machine_are_plausible():
    found = roofline.rates("cpu", torch.float32, seconds=0.05)
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.matmul < 1e15
