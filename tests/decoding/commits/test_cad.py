import math

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.cad import CAD
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.view import View

EOS = 0  # of the moment


def oracle(value: dict[int, float], floor: float, ends: set[int], rule: CAD) -> list[int]:
    """The reference; `ends` are positions that its end-of-text rule defers."""
    order = sorted(value, key=lambda i: (-value[i], i))
    free = [i for i in order if i not in ends]
    if not free:
        return sorted(order[: rule.least])
    above = sum(value[i] >= floor for i in free)
    return sorted(free[: min(max(above, rule.least), rule.most)])


def decided(view: View, rule: CAD, logits: Tensor) -> Tensor:
    score = rule.score(view, logits, view.candidates)
    view._state.confidence = score.masked_fill(~view.open, -torch.inf)
    taken = rule.select(view)
    assert taken.gather(1, view.confidence.argmax(1, keepdim=True)).all()  # the best commits
    return taken & view.open


@pytest.mark.parametrize("selection", ["confidence", "entropy"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("least", "most"), [(1, 4), (2, 3), (1, 1), (3, 99)])
def test_commits_the_confident_positions_between_least_and_most(
    selection: str, share: float, least: int, most: int, cases, softmax, moment
) -> None:
    rule = CAD(0.6, least, most, selection, nats=0.7, eos_share=share)
    for logits, masked in cases(26):
        view = moment(logits, masked, rule)
        taken = decided(view, rule, logits)
        for i, row in enumerate(logits.tolist()):
            value, closest = {}, 1.0
            for j in masked[i].nonzero()[:, 0].tolist():
                p = softmax(row[j])
                p_max, nats = max(p), -sum(q * math.log(q) for q in p if q > 0)
                value[j] = float(view.log_odds[i, j]) if selection == "confidence" else -nats
                limit = abs(p_max - 0.6) if selection == "confidence" else abs(nats - 0.7)
                closest = min(closest, limit)
            if closest < 1e-6:
                continue  # float32 may decide otherwise
            floor = math.log(0.6 / 0.4) if selection == "confidence" else -0.7
            size = masked.shape[1]
            early = (size - len(value)) / size < share
            ends = {j for j in value if early and int(view.candidates[i, j]) == EOS}
            want = oracle(value, floor, ends, rule)
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_end_tokens_are_deferred_until_their_share_of_the_answer_is_written(moment) -> None:
    rule, end, word = CAD(0.9), [9.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    logits = torch.tensor([[end, word, end, word]])
    for known, want in ((0, [1]), (1, [3]), (2, [0, 2])):
        masked = torch.ones(1, 4).bool()
        masked[0, [1, 3][:known]] = False
        view = moment(logits, masked, rule)
        assert decided(view, rule, logits)[0].nonzero()[:, 0].tolist() == want
    # All are deferred: the best one commits, or the decode would not go on.
    logits = torch.tensor([[[5.0, 0, 0], [9.0, 0, 0], [7.0, 0, 0]]])
    view = moment(logits, torch.ones(1, 3).bool(), rule)
    assert decided(view, rule, logits)[0].tolist() == [False, True, False]


def test_every_stop_id_of_the_model_is_an_end_token(moment) -> None:
    logits = torch.tensor([[[0, 9.0, 0], [0, 0, 0.1]]])
    rule = CAD(0.9)
    view = moment(logits, torch.ones(1, 2).bool(), rule)
    assert decided(view, rule, logits)[0].tolist() == [True, False]
    view.model.spec.stop_ids = (1,)
    assert decided(view, rule, logits)[0].tolist() == [False, True]


def closed(view: View, positions: list[int]) -> None:
    """Closes positions as a plan does once the candidates are known."""
    view._state.open = view.open.clone()
    view._state.open[:, positions] = False
    view._state.confidence = view.confidence.masked_fill(~view.open, -torch.inf)


def test_positions_closed_by_the_plan_do_not_count_as_confident(moment) -> None:
    confident, unsure = [9.0, 0.0, 0.0], [0.0, 0.0, 0.1]
    rule, logits = CAD(0.9, eos_share=0), torch.tensor([[confident, unsure, confident, confident]])
    view = moment(logits, torch.ones(1, 4).bool(), rule)
    assert decided(view, rule, logits)[0].tolist() == [True, False, True, True]
    closed(view, [2, 3])
    assert (rule.select(view) & view.open)[0].tolist() == [True, False, False, False]


def test_a_step_commits_at_most_most_and_at_least_least(toy) -> None:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    all_confident = decode(toy(), prompt, 12, [Blocks(6), CAD(0.0, most=4, eos_share=0)])
    assert [row.bincount().tolist() for row in all_confident.history.step] == [[4, 2, 4, 2]] * 2
    none_confident = decode(toy(), prompt, 12, [Blocks(6), CAD(1.5, least=3)])
    assert [row.bincount().tolist() for row in none_confident.history.step] == [[3, 3, 3, 3]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": -1}, "CAD.tau is -1, expected a probability"),
        ({"least": 0}, "CAD.least is 0, expected at least 1"),
        ({"least": 5}, r"CAD.most is 4, expected least \(5\) or more"),
        ({"selection": "random"}, "CAD.selection is 'random', expected 'confidence' or 'entropy'"),
        ({"nats": -0.3}, "CAD.nats is -0.3, expected at least 0"),
        ({"eos_share": 50}, "CAD.eos_share is 50, expected at least 0 and at most 1"),
    ],
)
def test_bad_arguments_of_cad(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAD(**given)
