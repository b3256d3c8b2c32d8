import torch

from mmdlm.decoding.scores.greedy import Greedy


def test_picks_the_highest_logit(cases, moment) -> None:
    for logits, masked in cases(11):
        picks = Greedy().pick(moment(logits, masked), logits)
        for row, got in zip(logits.tolist(), picks.tolist(), strict=True):
            assert got == [max(range(len(z)), key=lambda v, z=z: z[v]) for z in row]


def test_the_lower_id_wins_a_tie(moment) -> None:
    logits = torch.tensor([[[1.0, 4.0, 4.0]]])
    assert Greedy().pick(moment(logits, torch.ones(1, 1).bool()), logits).item() == 1
