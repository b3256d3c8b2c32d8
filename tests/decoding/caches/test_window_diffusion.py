import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.window_diffusion import WindowDiffusion
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "caches.json"
CASES = json.loads(FILE.read_text())["methods"]["window_plan"]["cases"]
MASK, P, L = 2, 4, 18
PROMPT = torch.tensor([[3, 4, 5, 6]])


def flags(length: int, at: set[int]) -> Tensor:
    row = torch.zeros(1, length, dtype=torch.bool)
    row[0, sorted(at)] = True
    return row


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_active_positions_and_window_are_those_of_the_reference(case: dict, moment) -> None:
    length, given = case["length"], case["params"]
    strategy = WindowDiffusion(given["active_tokens"], given["window_tokens"], every=3)
    view = moment(torch.zeros(1, length - 1, 2), torch.ones(1, length - 1, dtype=bool), strategy)
    state = view._state
    state.prompt = 0

    def refresh(step: int, left: set[int]) -> tuple[list[int], list[int] | None]:
        state.block_step = torch.tensor([step])
        state.tokens[:] = torch.where(flags(length, left), 2, 0)
        state.wrote()
        got = strategy.refresh(view)
        state.has_cache = torch.tensor([True])
        window = None if got.attend is None else got.attend[0].nonzero()[:, 0].tolist()
        return got.compute[0].nonzero()[:, 0].tolist(), window

    masked, everything = set(case["masked"]), list(range(length))
    want, after = case["output"], masked - set(case["then_commit"])
    assert refresh(0, masked | set(case["just_committed"])) == (everything, None)
    assert refresh(1, masked) == (want["active"], want["window"])
    assert refresh(2, after) == (want["active_after"], want["window"])
    assert refresh(3, after) == (everything, None)


def indices(rows: tuple[int, int] | Tensor, row: int = 0) -> list[int]:
    return list(range(*rows)) if isinstance(rows, tuple) else sorted(set(rows[row].tolist()))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("more", [[TopK()], [TopK(7)], [Threshold(0.2)]], ids=str)
@pytest.mark.parametrize(
    ("active", "window", "every"), [(2, 5, 4), (1, 1, 3), (3, 14, 99), (9, 9, 2)]
)
def test_every_step_is_what_it_is_by_hand(active, window, every, more, shift, toy, watch) -> None:
    """Positions, keys that are seen and logits of each step, in Python sets and with kept keys."""
    model = toy(shift=shift)
    forwards = watch(model)
    got = decode(model, PROMPT, L - P, [WindowDiffusion(active, window, every), *more])
    assert got.nfe == len(forwards)
    kv, seen, base = model.backbone.cache(1, L), set(), set()
    masks_of = [{p for p in range(L) if f.tokens[0, p] == MASK} for f in forwards]
    for i, f in enumerate(list(forwards)):
        masks, rows, mask = masks_of[i], set(range(L)), None
        if i % every:
            near = set(sorted(masks)[:active])
            if i % every == 1:
                seen = set(range(L)) - masks | set(sorted(masks)[:window])
                base = masks
                rows = near | (masks_of[i - 1] - masks)
            else:
                rows = near | ((base - masks) & seen)
            rows |= {p - shift for p in near}
            mask = flags(L, seen)[:, None].expand(1, len(rows), L)
        assert indices(f.rows) == sorted(rows)
        at, read = torch.tensor([sorted(rows)]), torch.tensor(sorted(masks))
        read = read[torch.isin(read - int(shift), at[0])]
        sequence = from_tokens(f.tokens, None, "full", None)
        logits = torch.zeros(1, L, 50)
        logits[:, read] = model.run(sequence, at, read[None], kv, None, mask)
        torch.testing.assert_close(f.logits, f.scored(logits))
        if i % every:
            committed = {P + int(p) for p in (got.history.step[0] == i).nonzero()}
            assert committed <= near | ({p for p in masks if p - shift in rows})


def test_the_first_step_of_a_phase_commits_anywhere_and_others_among_the_active(toy) -> None:
    got = decode(toy(), PROMPT, L - P, [WindowDiffusion(1, 2, 5)])
    order = got.history.step[0].argsort().tolist()
    left = list(range(L - P))
    for i, position in enumerate(order):
        assert i % 5 == 0 or position == left[0]
        left.remove(position)
    assert order != sorted(order)


def test_masks_after_the_window_are_not_seen(toy, watch) -> None:
    """What stands there makes no difference to the steps of a phase but the first."""
    forwards = watch(toy())
    decode(toy(), PROMPT, L - P, [WindowDiffusion(2, 3, 6)])
    second, model = forwards[1], toy()
    masks = (second.tokens[0] == MASK).nonzero()[:, 0].tolist()
    kv = model.backbone.cache(1, L)
    whole = slice(0, L)
    first = from_tokens(forwards[0].tokens, None, "full", None)
    model.run(first, whole, whole, kv, None, None)
    for layer in (*kv.keys, *kv.values):
        layer[:, :, masks[3:]] = 1e3
    allowed = flags(L, set(range(L)) - set(masks[3:]))[:, None]
    at = torch.tensor([indices(second.rows)])
    now = from_tokens(second.tokens, None, "full", None)
    got = model.run(now, at, second.read, kv, None, allowed.expand(1, at.shape[1], L))
    torch.testing.assert_close(second.logits, got)


def test_it_is_an_approximation(toy) -> None:
    plain = decode(toy(), PROMPT, L - P, [TopK()])
    near = decode(toy(), PROMPT, L - P, [WindowDiffusion(14, 14)])
    assert not torch.allclose(near.history.confidence, plain.history.confidence)


def test_what_cannot_work_is_refused(toy) -> None:
    with pytest.raises(ValueError, match="both decide 'plan'"):
        decode(toy(), PROMPT, 6, [WindowDiffusion(), Blocks(3)])
    for kind in ("cascade", "block_causal"):
        model = toy(attention=kind, block_size=4)
        with pytest.raises(
            ValueError, match=f"filled in any order, but this model has {kind} attention"
        ):
            decode(model, PROMPT, 6, [WindowDiffusion()])
    for given, name in (((0, 4), "active"), ((5, 4), "active"), ((1, 4, 0), "every")):
        with pytest.raises(ValueError, match=f"WindowDiffusion.{name} is"):
            WindowDiffusion(*given)
