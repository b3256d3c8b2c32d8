import math

import pytest
import torch

from mmdlm.decoding.numerics import entropy
from mmdlm.decoding.scores.entropy import Entropy


def test_ranks_by_negative_entropy(cases, softmax, moment) -> None:
    for logits, masked in cases(2):
        score = Entropy().score(moment(logits, masked), logits, logits.argmax(-1))
        for row, got in zip(logits.tolist(), score.tolist(), strict=True):
            for z, s in zip(row, got, strict=True):
                want = sum(p * math.log(p) for p in softmax(z) if p > 0)
                assert s == pytest.approx(want, rel=1e-4, abs=1e-12)


def test_is_exact_near_zero() -> None:
    gaps = torch.tensor([20.0, 30.0, 60.0])
    logits = torch.stack([gaps, torch.zeros(3)], -1)
    q = [math.exp(-g) / (1 + math.exp(-g)) for g in gaps.tolist()]
    want = [-(p * math.log(p) + (1 - p) * math.log1p(-p)) for p in q]
    assert entropy(logits).tolist() == pytest.approx(want, rel=1e-5)


def test_impossible_tokens_do_not_count() -> None:
    logits = torch.tensor([[1.0, 1.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    assert entropy(logits).tolist() == pytest.approx([math.log(2), 0.0])
