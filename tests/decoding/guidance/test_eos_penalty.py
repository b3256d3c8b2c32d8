from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.eos_penalty import EosPenalty
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


class Watch(Strategy):
    """Notes the logits of the end token before and after a penalty."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def observe(self, view: View, logits: Tensor) -> None:
        column = view.model.spec.eos_id - view.first_id
        self.seen.append(logits[:, :, column].clone())


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_is_added_follows_the_noise_level(toy, blocks: int) -> None:
    prompt, before, after = torch.tensor([[3, 4, 5]]), Watch(), Watch()
    steps, eps, weight = 6, 1e-3, 2.0
    chosen = [Blocks(12 // blocks), TopK(steps), before, EosPenalty(weight, steps), after]
    decode(toy(), prompt, 12, chosen)
    each = steps // blocks
    for i, (old, new) in enumerate(zip(before.seen, after.seen, strict=True)):
        level = 1 + (eps - 1) * (i % each) / each
        expected = torch.full_like(old, weight * math.log(1 - level + eps))
        torch.testing.assert_close(new - old, expected, atol=1e-4, rtol=0)
    assert len(after.seen) == steps


def test_no_weight_changes_nothing(toy) -> None:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    plain = decode(toy(), prompt, 10, [TopK(5)])
    same = decode(toy(), prompt, 10, [TopK(5), EosPenalty(0.0, 5)])
    assert torch.equal(plain.tokens, same.tokens)


def test_ids_without_the_end_token_are_left_alone(toy) -> None:
    prompt = torch.tensor([[3, 4, 5]])
    columns = slice(5, 20)
    plain = decode(toy(), prompt, 6, [TopK(3)], columns=columns)
    same = decode(toy(), prompt, 6, [TopK(3), EosPenalty(50.0, 3)], columns=columns)
    assert torch.equal(plain.tokens, same.tokens)
