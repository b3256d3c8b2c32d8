import math

import pytest
import torch

from mmdlm.decoding.commits.entropy_threshold import EntropyThreshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.scores.entropy import Entropy


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0, 9.0])
def test_commits_what_is_certain_enough(tau: float, cases, softmax, moment) -> None:
    for logits, masked in cases(21):
        view = moment(logits, masked)
        score = EntropyThreshold(tau).score(view, logits, view.candidates)
        view._state.confidence = score.masked_fill(~masked, -torch.inf)
        taken = EntropyThreshold(tau).select(view)
        for row, got, is_open in zip(logits.tolist(), taken.tolist(), masked, strict=True):
            for z, commits, open_here in zip(row, got, is_open, strict=True):
                nats = -sum(p * math.log(p) for p in softmax(z) if p > 0)
                if abs(nats - tau) > 1e-6:  # else float32 may decide otherwise
                    assert commits == (nats <= tau and bool(open_here))


def test_the_lowest_entropy_always_commits_even_if_another_is_more_probable(toy, moment) -> None:
    # 0.6 and one rival has less entropy than 0.7 and many.
    rivals = torch.tensor([[0.6, 0.4, *[1e-9] * 8], [0.7, *[0.3 / 9] * 9]]).log()[None]
    view = moment(rivals, torch.ones(1, 2).bool())
    assert view.confidence.argmax() == 1
    assert EntropyThreshold().score(view, rivals, view.candidates).argmax() == 0
    prompt = torch.tensor([[3, 4, 5]])
    strict, one = (decode(toy(), prompt, 6, [s]) for s in (EntropyThreshold(0.0), Entropy()))
    assert strict.tokens.equal(one.tokens)
    assert strict.history.step.equal(one.history.step)
    assert decode(toy(), prompt, 6, [EntropyThreshold(99.0)]).nfe == 1


@pytest.mark.parametrize("tau", [-0.1, float("nan")])
def test_bad_arguments_of_an_entropy_threshold(tau: float) -> None:
    with pytest.raises(ValueError, match=f"EntropyThreshold.tau is {tau}, expected at least 0"):
        EntropyThreshold(tau)
