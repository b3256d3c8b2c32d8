import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.events import Finished
from mmdlm.decoding.guidance.allowed import Allowed, Choice, Slot
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.guidance.suppress import Suppress
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.scores.left_to_right import LeftToRight
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.decoding.session import Session
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

MASK, LENGTH, REST = 2, 14, 9
OPTIONS = ((11, 12, 13), (11, 14), (15,), (16, 12, 14, 17))
SLOTS = (
    Slot(1, 4, ids=(20, 21, 22)),
    Slot(4, 7, ids=(30, 31), first=(30, 31, 32), rest=REST, ends=(REST,)),
    Slot(7, 10, rest=REST, ends=tuple(range(25, 50))),
    Choice(10, OPTIONS, REST),
)


@dataclass(frozen=True)
class Rewrite(Strategy):
    """Lets every written position take its candidate, as editing methods do."""

    sees: ClassVar[str] = "block"

    def edit(self, view: View) -> torch.Tensor:
        return view.here(view.writable & ~view.masked)


WAYS = {
    "one by one": [],
    "at once": [Threshold(0.0)],
    "when sure": [Threshold(0.2)],
    "left to right": [LeftToRight()],
    "any order": [RandomOrder()],
    "in blocks": [Blocks(5), Threshold(0.1)],
    "cached": [Blocks(5), DualCache(), Threshold(0.1)],
    "guided": [CFG(1.0)],
    "narrowed": [Suppress((11, 20))],
    "edited": [Rewrite()],
    "edited in blocks": [Rewrite(), Blocks(5), Threshold(0.05)],
}


def answers(model, *strategies, rows=3, length=LENGTH, **more) -> list[list[int]]:
    prompt = torch.arange(3, 3 + 4 * rows).reshape(rows, 4)
    given = [torch.Generator().manual_seed(i) for i in range(rows)]
    got = decode(model, prompt, length, strategies, generator=given, **more)
    return got.tokens[:, 4:].tolist()


@pytest.mark.parametrize("kind", ["full", "block_causal"])
@pytest.mark.parametrize("way", [name for name in WAYS if name not in ("at once", "cached")])
def test_slots_hold_what_they_allow(toy, way, kind) -> None:
    model = toy() if kind == "full" else toy(attention=kind, block_size=4)
    given = [*WAYS[way], Allowed(SLOTS)]
    found = answers(model, *given)
    for tokens in found:
        assert set(tokens[1:4]) <= {20, 21, 22}
        assert tokens[4] in (30, 31, 32)
        assert set(tokens[5:7]) <= {30, 31, REST}
        assert tokens[10:14] in [[*o, *[REST] * (4 - len(o))] for o in OPTIONS]
    assert answers(model, *given) == found


@pytest.mark.parametrize("way", WAYS)
def test_a_choice_is_one_of_its_options_in_any_way_of_decoding(toy, way) -> None:
    for tokens in answers(toy(shift=True), *WAYS[way], Allowed(SLOTS), rows=4):
        assert tokens[10:14] in [[*o, *[REST] * (4 - len(o))] for o in OPTIONS]


@pytest.mark.parametrize("way", WAYS)
def test_a_row_with_slots_equals_the_row_alone(toy, prompts, seeds, way) -> None:
    tokens, mask = prompts(7, 4, 6)
    given = [*WAYS[way], Allowed(SLOTS)]
    together = decode(toy(), tokens, LENGTH, given, mask=mask, generator=seeds(1, 2, 3))
    for i, size in enumerate((7, 4, 6)):
        row = tokens[i : i + 1, -size:]
        alone = decode(toy(), row, LENGTH, given, generator=seeds(1 + i))
        assert together.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()


def test_slots_hold_in_answers_of_different_lengths(toy) -> None:
    given = [Blocks(5), Threshold(0.1), Allowed(SLOTS)]
    session, done, keys = Session(toy(), given), {}, []
    for length in (14, 19, 16):
        keys.append(session.add(torch.arange(3, 9), length))
        done |= {e.key: e for e in session.step() if isinstance(e, Finished)}
    while session.keys:
        done |= {e.key: e for e in session.step() if isinstance(e, Finished)}
    for key, length in zip(keys, (14, 19, 16), strict=True):
        alone = decode(toy(), torch.arange(3, 9)[None], length, given)
        assert done[key].tokens.tolist() == alone.tokens[0, 6:].tolist()
        assert set(done[key].tokens[1:4].tolist()) <= {20, 21, 22}


def test_without_slots_nothing_changes(toy) -> None:
    assert answers(toy(), Allowed()) == answers(toy())
    free = Allowed([Slot(2, 9)])
    assert answers(toy(), free) == answers(toy())


def test_rest_gets_the_probability_of_all_others(cases, moment, softmax) -> None:
    for logits, masked in cases(5, 30):
        rows, read, vocab = logits.shape
        given = Allowed([Slot(0, read, ids=(0, 1), rest=2, ends=(2,))])
        guided = given.guide(moment(logits, masked, given), logits.clone())
        for b in range(rows):
            for r in range(read):
                chance = softmax(logits[b, r].tolist())
                expected = [chance[0], chance[1], sum(chance[2:])]
                if r == 0:  # must not be empty
                    expected = [x / (chance[0] + chance[1]) for x in chance[:2]] + [0.0]
                found = softmax(guided[b, r].tolist())
                assert found[:3] == pytest.approx(expected, abs=1e-5)
                assert found[3:] == [0.0] * (vocab - 3)


def test_after_an_end_only_the_filler_is_allowed(moment) -> None:
    logits, given = torch.zeros(2, 5, 6), Allowed([Slot(0, 4, rest=3, ends=(4,))])
    view = moment(logits, torch.tensor([[True, False, True, True, True]] * 2), given)
    view.tokens[:, 2] = torch.tensor([4, 5])  # position 1 of the answers
    guided = given.guide(view, logits.clone())
    only = [0.0 if i == 3 else -math.inf for i in range(6)]
    assert guided[0, 2].tolist() == guided[0, 3].tolist() == only
    assert guided[0, [0, 1, 4]].tolist() == guided[1, [0, 1, 4]].tolist() == [[0.0] * 6] * 3
    assert guided[1].tolist() == [[0.0] * 6] * 5


def most_probable(chances, written, options) -> tuple[int, float]:
    """Which option is offered, and its probability, by hand. `written` is None where masked."""
    scores = []
    for option in options:
        own = [i for i in range(len(option)) if written[i] is None]
        logs = [math.log(max(chances[i][option[i]], 1e-300)) for i in own]
        full = [*option, *[0] * (len(written) - len(option))]
        wrong = sum(w is not None and w != o for w, o in zip(written, full, strict=True))
        scores.append(sum(logs) / max(1, len(logs)) - 1e4 * wrong)
    weights = [math.exp(s - max(scores)) for s in scores]
    best = scores.index(max(scores))
    return best, weights[best] / sum(weights)


def test_the_most_probable_option_is_offered_with_its_probability(moment, softmax) -> None:
    generator = torch.Generator().manual_seed(4)
    options = ((1, 2), (1, 3, 4), (5,), (4, 2, 1))
    seen = set()
    for trial in range(60):
        logits = 2 * torch.randn(1, 3, 6, generator=generator)
        masked = torch.ones(1, 3, dtype=torch.bool)
        given = Allowed([Choice(0, options, 0)])
        view = moment(logits, masked, given)
        written: list[int | None] = [None] * 3
        if trial % 3 == 1:
            view.tokens[0, 1] = written[0] = 1
        elif trial % 3 == 2:
            view.tokens[0, 2] = written[1] = 2
        guided = given.guide(view, logits.clone())[0]
        best, sure = most_probable([softmax(row) for row in logits[0].tolist()], written, options)
        full = [[*o, *[0] * (3 - len(o))] for o in options]
        assert guided.argmax(-1).tolist() == full[best]
        seen.add(best)
        for i in range(3):
            chance = softmax(guided[i].tolist())
            assert sum(x > 0 for x in chance) <= 2
            if sum(x > 0 for x in chance) == 2:  # the next best has another token there
                assert chance[full[best][i]] == pytest.approx(max(sure, 0.5), abs=1e-3)
    assert seen == {0, 1, 2, 3}


def test_noise_cannot_leave_an_option_that_is_partly_written(toy) -> None:
    for tokens in answers(toy(), Gumbel(3.0), LeftToRight(), Allowed(SLOTS), rows=4):
        assert tokens[10:14] in [[*o, *[REST] * (4 - len(o))] for o in OPTIONS]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([Slot(0, 3), Slot(2, 4)], r"slot \[2, 4\), expected one within \[3, 14\)"),
        ([Slot(12, 15)], r"slot \[12, 15\)"),
        ([Slot(0, 2, ids=(50,))], "id 50; this model's ids are 0 to 49"),
        ([Slot(0, 2, ids=(3, MASK))], "the mask, which is never written"),
        ([Choice(0, [[1], [MASK]], 1)], "the mask"),
        ([Slot(0, 2, rest=MASK)], "the mask"),
    ],
)
def test_impossible_slots_are_refused(toy, slots, message) -> None:
    with pytest.raises(ValueError, match=message):
        answers(toy(), Allowed(slots))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slot(3, 3), "empty"),
        (lambda: Slot(0, 2, ends=(4,)), "needs rest="),
        (lambda: Choice(0, [], 1), r"options is \[\], expected a length of at least 1"),
        (lambda: Choice(0, [[1], []], 1), "each a length of at least 1"),
    ],
)
def test_invalid_slots_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_other_bounds_and_other_lengths_are_refused(toy) -> None:
    @dataclass(frozen=True)
    class Longer(Strategy):
        """May change the length."""

        def resize(self, view: View) -> None:
            return None

    with pytest.raises(ValueError, match="keep one"):
        answers(toy(), Allowed(SLOTS), columns=slice(0, 40))
    with pytest.raises(
        ValueError, match="Allowed cannot be combined with Longer: .* whose length stays"
    ):
        answers(toy(), Allowed(SLOTS), Longer())
