import torch

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.left_to_right import LeftToRight

MASK = 2


def test_fills_in_reading_order(toy) -> None:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    got = decode(toy(), prompt, 6, [LeftToRight(), TopK(3)])
    assert got.history.step.tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_skips_given_tokens_and_respects_blocks(toy) -> None:
    canvas = torch.tensor([[MASK, 9, MASK, MASK, MASK, 9]])
    chosen = [LeftToRight(), Blocks(3)]
    got = decode(toy(), torch.tensor([[3]]), 6, chosen, canvas=canvas)
    assert got.history.step.tolist() == [[0, -1, 1, 2, 3, -1]]


def test_the_order_does_not_depend_on_the_logits(cases, moment) -> None:
    for logits, masked in cases(12, 12):
        view = moment(logits, masked)
        score = LeftToRight().score(view, logits, view.candidates)
        assert score.shape == masked.shape
        assert (score[:, 1:] < score[:, :-1]).all()
