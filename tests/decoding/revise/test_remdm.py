import math
from dataclasses import dataclass

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.prophet import Prophet
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.revise.remdm import ReMDM
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

MODEL = {"seed": 5, "vocab": 12, "mask_id": 11, "scale": 2.0, "mix": 0.5}
MODEL |= {"eos_id": None, "eos_slope": 0.0, "shift": 0}
STRONG = [
    ReMDM("cap", 0.3),
    ReMDM("rescale", 0.5),
    ReMDM("conf"),
    ReMDM("loop", 0.1, t_on=0.6, t_off=0.3),
]


def masks(forwards: list, prompt: int) -> torch.Tensor:
    """[steps B G] bool, the masks of each forward, until the first row is finished."""
    whole = [f.tokens[:, prompt:] for f in forwards if len(f.tokens) == len(forwards[0].tokens)]
    return torch.stack(whole) == MODEL["mask_id"]


@dataclass(frozen=True)
class Wide(Strategy):
    """Has the whole answer scored."""

    sees = "answer"

    def guide(self, view: View, logits: torch.Tensor) -> torch.Tensor:
        return logits


def published(given: ReMDM, time: float, fall: float) -> tuple[float, float, float]:
    """Commit and remask probability and the known share after the step, as the reference's code."""
    eta = given.strength
    if given.mode == "loop":
        on, alpha = given.t_on, given.alpha_on
        if given.t_off < time <= on:
            return (alpha - (1 - eta) * alpha) / (1 - alpha), eta, alpha
        if time > on:
            move_t, move_s = (1 - (1 - t) * alpha / (1 - on) for t in (time, time - fall))
        else:
            move_t, move_s = (t * (1 - alpha) / given.t_off for t in (time, time - fall))
        # Drawn from p (move_t - move_s) with move_s for the mask: normalised by their sum.
        return (move_t - move_s) / move_t, 0.0, 1 - move_s
    alpha_t, alpha_s = 1 - time, 1 - (time - fall)
    most = min(1, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1
    if given.mode == "conf":
        return (alpha_s - alpha_t) / (1 - alpha_t), most, alpha_s
    remask = min(eta, most) if given.mode == "cap" else eta * most
    return (alpha_s - (1 - remask) * alpha_t) / (1 - alpha_t), remask, alpha_s


@pytest.mark.parametrize("given", [*STRONG, *(ReMDM(m) for m in ("cap", "rescale", "loop"))])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_chances_are_the_published_ones(given: ReMDM, steps: int) -> None:
    for now in range(steps):
        fall = (1 - 1e-5) / steps
        commit, remask, _ = published(given, 1 - now * fall, fall)
        want = pytest.approx((min(max(commit, 0.0), 1.0), remask), abs=1e-9)
        assert given.chances(now, steps) == want


@pytest.mark.parametrize("given", [s for s in STRONG if s.mode != "conf"])
def test_the_known_share_follows_time(given: ReMDM, synthetic, watch) -> None:
    """Over 20 x 150 positions, in spite of all remasking."""
    rows, size, steps = 20, 150, 12
    model = synthetic(MODEL)
    forwards = watch(model)
    prompt, generator = torch.full((rows, 1), 3), torch.Generator().manual_seed(0)
    given = ReMDM(given.mode, given.eta, steps, None, given.t_on, given.t_off, given.alpha_on)
    decode(model, prompt, size, [given], generator=generator)
    seen, fall = masks(forwards, 1), (1 - 1e-5) / steps
    assert len(seen) >= steps - 3
    for now in range(len(seen) - 1):
        share = 1 - published(given, 1 - now * fall, fall)[2]
        spread = math.sqrt(share * (1 - share) / (rows * size))
        assert seen[now + 1].float().mean() == pytest.approx(share, abs=4 * spread + 1e-3)
    again = seen[1:] & ~seen[:-1]
    assert again.sum() > 50


def test_conf_remasks_tokens_of_low_probability(synthetic, watch) -> None:
    """One token per step is expected to be remasked; those of low probability more often."""
    model = synthetic(MODEL | {"scale": 8.0})
    forwards = watch(model)
    prompt, generator = torch.full((60, 1), 3), torch.Generator().manual_seed(0)
    decode(model, prompt, 24, [ReMDM("conf", steps=8), Gumbel(1.0), Wide()], generator=generator)
    gone, kept = [], []
    sure = torch.zeros(60, 24)
    for before, after in zip(forwards, forwards[1:], strict=False):
        if len(after.tokens) < 60:
            break
        old, new = (f.tokens[:, 1:] == MODEL["mask_id"] for f in (before, after))
        gone += sure[~old & new].tolist()
        kept += sure[~old & ~new].tolist()
        at = before.logits.softmax(-1)
        chosen = at.gather(-1, after.tokens[:, 1:, None])[..., 0]
        sure = torch.where(old & ~new, chosen, sure)
    assert len(gone) > 30
    assert sum(gone) / len(gone) < sum(kept) / len(kept) - 0.02


@pytest.mark.parametrize("given", STRONG, ids=lambda s: s.mode)
@pytest.mark.parametrize("more", [[], [Blocks(5)]])
def test_a_row_draws_the_same_numbers_as_alone(
    given: ReMDM, more: list, toy, prompts, seeds
) -> None:
    tokens, mask = prompts(7, 4, 6)
    chosen = [given, Gumbel(1.0), *more]
    batch = decode(toy(), tokens, 12, chosen, mask=mask, generator=seeds(1, 2, 3))
    for i, size in enumerate((7, 4, 6)):
        alone = decode(toy(), tokens[i : i + 1, -size:], 12, chosen, generator=seeds(i + 1))
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


@pytest.mark.parametrize("given", STRONG, ids=lambda s: s.mode)
@pytest.mark.parametrize("steps", [1, 5, 24])
def test_takes_no_more_forwards_than_steps(given: ReMDM, steps: int, synthetic) -> None:
    given = ReMDM(given.mode, given.eta, steps)
    generator = torch.Generator().manual_seed(0)
    got = decode(synthetic(MODEL), torch.full((4, 1), 3), 24, [given], generator=generator)
    assert max(got.forwards) <= steps
    assert not (got.tokens == MODEL["mask_id"]).any()


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_remasks_no_more_than_the_budget(budget: int, synthetic, watch) -> None:
    model = synthetic(MODEL)
    forwards = watch(model)
    chosen = [ReMDM("cap", 0.5, 12, budget), Blocks(20)]
    decode(model, torch.full((6, 1), 3), 40, chosen, generator=torch.Generator().manual_seed(2))
    seen = masks(forwards, 1)
    count = (seen[1:] & ~seen[:-1]).sum((0, 2))
    assert count.max() == budget


def test_known_tokens_and_earlier_blocks_stay(synthetic, watch) -> None:
    model = synthetic(MODEL)
    forwards = watch(model)
    canvas = torch.full((3, 16), MODEL["mask_id"])
    canvas[:, ::3] = 4
    got = decode(
        model,
        torch.full((3, 1), 3),
        16,
        [ReMDM("cap", 1.0, 16), Blocks(8)],
        canvas=canvas,
        generator=torch.Generator().manual_seed(1),
    )
    assert (got.tokens[:, 1::3] == 4).all()
    seen = masks(forwards, 1)
    assert not seen[:, :, ::3].any()
    first = seen[:, :, :8].any(2).any(1)  # steps in which the first block is open
    assert first.tolist() == sorted(first.tolist(), reverse=True)


def test_without_strength_nothing_is_remasked(synthetic, watch) -> None:
    model = synthetic(MODEL)
    forwards = watch(model)
    for mode in ("cap", "rescale", "loop"):
        forwards.clear()
        generator = torch.Generator().manual_seed(0)
        decode(model, torch.full((1, 1), 3), 30, [ReMDM(mode, 0.0)], generator=generator)
        seen = masks(forwards, 1)
        assert not (seen[1:] & ~seen[:-1]).any()


def test_one_step_commits_everything(toy, run) -> None:
    assert run(toy(), ReMDM(steps=1)).tokens.equal(run(toy(), TopK(1)).tokens)


def test_early_exits_are_refused(toy, run) -> None:
    with pytest.raises(
        ValueError, match="ReMDM cannot be combined with Prophet: ReMDM requires a schedule"
    ):
        run(toy(), ReMDM(), Prophet())


@pytest.mark.parametrize("cache", [SubBlockCache(), PrefixCache(), DualCache()])
@pytest.mark.parametrize("shift", [False, True])
def test_a_row_with_a_cache_equals_the_row_alone(
    shift: bool, cache: Strategy, toy, prompts, seeds
) -> None:
    tokens, mask = prompts(7, 4, 6)
    model, chosen = toy(shift=shift), [ReMDM("cap", 0.3), Blocks(4), cache]
    batch = decode(model, tokens, 12, chosen, mask=mask, generator=seeds(1, 2, 3))
    for i, size in enumerate((7, 4, 6)):
        alone = decode(model, tokens[i : i + 1, -size:], 12, chosen, generator=seeds(i + 1))
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "top"}, "ReMDM.mode is 'top', expected one of 'cap', 'rescale', 'conf', 'loop'"),
        ({"eta": 1.5}, "ReMDM.eta is 1.5, expected at least 0 and at most 1"),
        ({"mode": "conf", "eta": 0.1}, 'ReMDM.eta has no effect in mode "conf"; leave it out'),
        ({"steps": 0}, "ReMDM.steps is 0, expected at least 1"),
        ({"budget": -1}, "ReMDM.budget is -1, expected at least 0"),
        ({"t_on": 0.1, "t_off": 0.2}, "expected 0 <= t_off < t_on < 1"),
        ({"alpha_on": 1.0}, "ReMDM.alpha_on is 1.0, expected above 0 and below 1"),
        ({"mode": "loop", "eta": 0.5}, "remasks more than the share 1 - alpha_on = 0.1 of masks"),
    ],
)
def test_bad_arguments_of_remdm(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReMDM(**given)


def test_rows_in_different_blocks_are_remasked_as_alone(toy, prompts, seeds) -> None:
    model = toy(attention="block_causal", block_size=4, shift=True)
    sizes = (6, 2, 3, 5)
    tokens, mask = prompts(*sizes)
    chosen = [ReMDM("rescale", eta=1.0, steps=24)]
    batch = decode(model, tokens, 9, chosen, mask=mask, generator=seeds(0, 1, 2, 3))
    for i, size in enumerate(sizes):
        row = tokens[i : i + 1, -size:]
        alone = decode(model, row, 9, chosen, generator=seeds(i))
        assert batch.tokens[i, 6:].equal(alone.tokens[0, size:])
