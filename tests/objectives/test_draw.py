"""Levels and masks have the promised distribution."""

import pytest
import torch

from mmdlm.layout import Row, Turn
from mmdlm.objectives.draw import Draw, ranks
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.schedule import Schedule
from tests.objectives.test_masked import row, small


def batch_of(model, rows):
    n = len(rows)
    return Batch(model.arrange(rows), torch.arange(n) + 3, torch.arange(n).double() / n)


def noise_of(draw, rows, schedule=None, **settings):
    objective = Masked(draw=draw, schedule=schedule or Schedule(), **settings)
    return objective.corrupt(batch_of(small("prefix", 2), rows))


ROWS = [row([3], [4, 5, 6, 7, 8])] * 2000


@pytest.mark.parametrize("spread", ["antithetic", "independent", "stratified"])
@pytest.mark.parametrize(("level", "moments"), [("uniform", (0.5, 1 / 12)), ("mode", (0.5, 0.03))])
def test_levels_have_their_distribution(spread, level, moments):
    p = noise_of(Draw(level=level, spread=spread), ROWS, eps=0.0).p[:, -1]
    grid = (torch.arange(20000).double() + 0.5) / 20000
    mean, variance = Draw(level=level).shaped(grid).mean(), Draw(level=level).shaped(grid).var()
    assert moments == pytest.approx((mean.item(), variance.item()), abs=0.02)
    assert p.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert p.var().item() == pytest.approx(variance.item(), abs=0.005)


def test_logit_normal_levels_are_sigmoids_of_normal_numbers():
    p = noise_of(Draw(level="logit_normal", spread="independent"), ROWS, eps=0.0).p[:, -1]
    z = p.double().logit()
    assert z.mean().item() == pytest.approx(0, abs=0.08)
    assert z.std().item() == pytest.approx(1, abs=0.05)


def test_tokens_share_a_level_per_turn_row_or_block():
    model = small("cascade", 2)
    turns = [
        Turn(torch.tensor([7]), torch.tensor([8, 3, 5, 1])),
        Turn(torch.tensor([9]), torch.tensor([10, 4, 6])),
    ]
    batch = batch_of(model, [Row((torch.randn(2, 16),), tuple(turns))])
    numbers = {}
    for per in ("row", "turn", "block"):
        p = Masked(draw=Draw(per=per)).corrupt(batch).p[0][batch.sequence.is_answer[0]]
        numbers[per] = [p.tolist().index(value) for value in p.tolist()]
    assert numbers == {
        "row": [0] * 7,
        "turn": [0, 0, 0, 0, 4, 4, 4],
        "block": [0, 0, 2, 2, 4, 4, 6],
    }


@pytest.mark.parametrize("count", ["bernoulli", "exact"])
@pytest.mark.parametrize("per", ["row", "turn", "block"])
@pytest.mark.parametrize("spread", ["antithetic", "independent"])
def test_noise_does_not_depend_on_the_other_rows(spread, per, count):
    model = small("cascade", 2)
    answers = ([8, 3, 5, 1], [10, 4, 6], [9] * 11)
    turns = [Turn(torch.tensor([7]), torch.tensor(answer)) for answer in answers]
    rows = [Row((torch.randn(2, 16),), tuple(turns[:n])) for n in (2, 3)]
    rows += [Row((torch.randn(3, 16),), tuple(turns[:1]))]
    objective = Masked(draw=Draw(spread=spread, per=per, count=count), full=0.2)
    whole = batch_of(model, rows)
    together = objective.corrupt(whole)
    for i, one in enumerate(rows):
        batch = Batch(model.arrange([one]), whole.seeds[i : i + 1], whole.phase[i : i + 1])
        alone = objective.corrupt(batch)
        length = alone.masked.shape[1]
        assert torch.equal(together.masked[i, -length:], alone.masked[0])
        answer = batch.sequence.is_answer[0]
        assert torch.equal(together.p[i, -length:][answer], alone.p[0][answer])


def test_clipped_levels_stay_in_their_range():
    p = noise_of(Draw(clip=(0.3, 0.8)), ROWS).p[:, -1]
    assert p.min() >= 0.3
    assert p.max() <= 0.8
    assert p.max() - p.min() > 0.49


def test_exact_counts_are_all_equally_probable():
    noise = noise_of(Draw(count="exact"), ROWS, eps=0.0)
    counts = noise.masked.sum(1)
    assert torch.equal((noise.p[:, -1] * 5).round().long(), counts)
    share = torch.bincount(counts, minlength=6) / len(ROWS)
    torch.testing.assert_close(share, torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2]), atol=0.01, rtol=0)
    # Each position is masked equally often.
    assert (noise.masked.float().mean(0)[-5:] - 0.6).abs().max() < 0.04


def test_rounded_counts_follow_the_schedule():
    noise = noise_of(Draw(count="rounded"), ROWS, Schedule("cosine"), eps=0.0)
    level = Draw().levels(batch_of(small(), ROWS), torch.ones(len(ROWS), 6).long(), 0.0)[:, -1]
    want = (5 * torch.cos(torch.pi / 2 * (1 - level))).round().clamp(min=1)
    assert torch.equal(noise.masked.sum(1), want.long())


def test_at_least_one_token_is_masked_where_asked():
    rows = [row([3, 4], [5, 6])] * 500
    some = noise_of(Draw(), rows).masked
    forced = noise_of(Draw(at_least_one=True), rows).masked
    assert (some.sum(1) == 0).any()
    assert (forced.sum(1) > 0).all()
    assert torch.equal(forced[some.any(1)], some[some.any(1)])


def test_ranks_count_within_groups():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.2, 0.7]])
    group = torch.tensor([[1, 1, 1, 4, 4, 4]])
    maskable = torch.tensor([[True, True, True, False, True, True]])
    rank, size = ranks(noise, group, maskable)
    assert rank[maskable].tolist() == [1, 0, 2, 0, 1]
    assert size.tolist() == [[3, 3, 3, 2, 2, 2]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"clip": (0.8, 0.3)}, "lower level first"),
        ({"clip": (0.3,)}, "2 values"),
        ({"level": "normal"}, "one of"),
        ({"per": "token"}, "one of"),
    ],
)
def test_invalid_arguments_are_rejected(bad, message):
    with pytest.raises(ValueError, match=message):
        Draw(**bad)
