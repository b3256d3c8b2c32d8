import pytest
import torch

from mmdlm.decoding.scores.margin import Margin


def test_ranks_by_the_difference_of_the_two_highest_probabilities(cases, softmax, moment) -> None:
    for logits, masked in cases(1):
        score = Margin().score(moment(logits, masked), logits, torch.zeros(logits.shape[:2]).long())
        for row, got in zip(logits.tolist(), score.tolist(), strict=True):
            for z, s in zip(row, got, strict=True):
                first, second = sorted(softmax(z), reverse=True)[:2]
                assert s + 1 == pytest.approx(first - second, abs=1e-6)


def test_keeps_the_order_near_certainty(moment) -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, :, 0] = torch.tensor([25.0, 40.0, 30.0])
    score = Margin().score(moment(logits, torch.ones(1, 3).bool()), logits, logits.argmax(-1))
    assert score[0].argsort(descending=True).tolist() == [1, 2, 0]


def test_ties_have_no_margin(moment) -> None:
    logits = torch.tensor([[[2.0, 2.0, -torch.inf]]])
    score = Margin().score(moment(logits, torch.ones(1, 1).bool()), logits, logits.argmax(-1))
    assert score.item() == pytest.approx(-1.0)


def test_a_single_possible_token_has_the_largest_margin(moment) -> None:
    logits = torch.tensor([[[5.0, -torch.inf]]])
    score = Margin().score(moment(logits, torch.ones(1, 1).bool()), logits, logits.argmax(-1))
    assert score.item() == 0.0
