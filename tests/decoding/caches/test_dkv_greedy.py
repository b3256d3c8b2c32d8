import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dkv_greedy import DKVGreedy, widened
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "caches.json"
CASES = json.loads(FILE.read_text())["methods"]["dkv_greedy_window"]["cases"]
MASK, P, L = 2, 4, 16
PROMPT = torch.tensor([[3, 4, 5, 6]])


def flags(length: int, at: list[int]) -> Tensor:
    row = torch.zeros(1, length, dtype=torch.bool)
    row[0, at] = True
    return row


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_neighbours_are_those_of_the_reference(case: dict) -> None:
    masks, rows = flags(case["length"], case["masked"]), flags(case["length"], case["already"])
    # Beside a row that gets none, in a batch.
    masks, rows = masks.repeat(2, 1), rows.repeat(2, 1)
    for centre in case["selected"]:
        at, where = torch.tensor([centre, centre]), torch.tensor([True, False])
        rows = widened(rows, masks, at, case["params"]["window_size"], where)
    assert rows[0].nonzero()[:, 0].tolist() == case["output"]
    assert rows[1].nonzero()[:, 0].tolist() == sorted(case["already"])


def around(centre: int, taken: set[int], masks: set[int], count: int) -> set[int]:
    """Up to `count` masks that are not taken, left and right in alternation."""
    found: list[int] = []
    for away in range(1, L):
        found += [p for p in (centre - away, centre + away) if p in masks - taken]
    return set(found[:count])


def indices(rows: tuple[int, int] | Tensor, row: int = 0) -> list[int]:
    return list(range(*rows)) if isinstance(rows, tuple) else sorted(set(rows[row].tolist()))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("window", "every", "size"), [(4, 2, 12), (2, 4, 12), (1, 5, 6), (0, 3, 6)]
)
def test_every_step_is_what_it_is_by_hand(window, every, size, shift, toy, watch, seeds) -> None:
    """The positions of each step, and its logits from keys and values that were kept by hand."""
    model = toy(shift=shift)
    forwards = watch(model)
    chosen = [DKVGreedy(window, every), Blocks(size)]
    got = decode(model, PROMPT, L - P, chosen, generator=seeds(3))
    steps = got.history.step[0].tolist()
    assert sorted(steps) == list(range(12))
    assert got.nfe == len(forwards) == 12
    kv = model.backbone.cache(1, L)
    for i, f in enumerate(list(forwards)):
        masks = {p for p in range(L) if f.tokens[0, p] == MASK}
        rows = set(range(L))
        if i % size % every:
            now = P + steps.index(i)
            rows = {P + steps.index(i - 1), now}
            rows |= around(now, rows, masks, window)
            rows |= {now - 1} if shift else set()
        assert indices(f.rows) == sorted(rows)
        at, read = torch.tensor([sorted(rows)]), torch.tensor(sorted(masks))
        read = read[torch.isin(read - int(shift), at[0])]
        sequence = from_tokens(f.tokens, None, "full", None)
        logits = torch.zeros(1, L, 50)
        logits[:, read] = model.run(sequence, at, read[None], kv, None, None)
        torch.testing.assert_close(f.logits, f.scored(logits))


def test_the_order_is_random_and_does_not_depend_on_what_is_computed(toy, seeds, prompts) -> None:
    tokens = prompts(5)[0].expand(3, -1)
    orders = [
        decode(toy(), tokens, 12, [DKVGreedy(w, n)], generator=seeds(0, 1, 2)).history.step
        for w, n in ((4, 1), (4, 2), (0, 5))
    ]
    assert orders[0].equal(orders[1])
    assert orders[0].equal(orders[2])
    assert not orders[0][0].equal(orders[0][1])


@pytest.mark.parametrize(("steps", "want"), [(5, [3, 3, 2, 2, 2]), (12, [1] * 12), (1, [12])])
def test_positions_commit_in_equal_shares(steps, want, toy, watch) -> None:
    forwards = watch(toy())
    got = decode(toy(), PROMPT, 12, [DKVGreedy(1, 4, steps)])
    assert [int((got.history.step == i).sum()) for i in range(got.nfe)] == want
    for i, f in enumerate(forwards):
        if i % 4:
            committed = torch.isin(got.history.step[0], torch.tensor([i - 1, i])).nonzero() + P
            rows = set(indices(f.rows))
            assert set(committed[:, 0].tolist()) <= rows
            assert len(rows) <= len(committed) + want[i]  # a neighbour for each that is next


def test_a_row_begins_its_second_block_while_another_is_in_its_first(
    toy, watch, prompts, seeds
) -> None:
    tokens, mask = prompts(4, 4)
    canvas = torch.full((2, 8), MASK)
    canvas[1, :3] = 7  # one mask in the first block
    forwards = watch(toy())
    chosen = [Blocks(4), DKVGreedy(0, 9)]
    got = decode(toy(), tokens, 8, chosen, mask=mask, canvas=canvas, generator=seeds(0, 1))
    assert got.forwards == (8, 5)
    for b, steps in enumerate(got.history.step.tolist()):
        mine = [(f, i) for f in forwards for i, x in enumerate(f.tokens) if x[:4].equal(tokens[b])]
        order = [P + steps.index(step) for step in range(len(mine))]
        opens = [min(s for s in steps[at : at + 4] if s >= 0) for at in (0, 4)]
        for step, (f, i) in enumerate(mine):
            want = list(range(12)) if step in opens else sorted(order[step - 1 : step + 1])
            assert indices(f.rows, i) == want


def test_it_decides_what_commits(toy) -> None:
    with pytest.raises(ValueError, match="both decide 'select'"):
        decode(toy(), PROMPT, 4, [DKVGreedy(), Threshold()])
    for given in ({"window": -1}, {"every": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"DKVGreedy.{next(iter(given))} is"):
            DKVGreedy(**given)
