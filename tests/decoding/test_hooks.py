"""What the loop does for each hook: positions, logits, revisions, another length."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import GONE, NEW, Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

LENGTH = 8
EOS, MASK, PAD = 1, 2, 0
MODELS = {
    "full": {},
    "full shifted": {"shift": True},
    "prefix": {"attention": "prefix"},
    "prefix shifted": {"attention": "prefix", "shift": True},
    "cascade in blocks": {"attention": "cascade", "block_size": 4},
    "block causal": {"attention": "block_causal", "block_size": 4},
    "autoregressive": {"attention": "block_causal", "block_size": 1, "shift": True},
}
Toy = Callable[..., MultimodalDLM]
everywhere = pytest.mark.parametrize("kind", MODELS)


@dataclass(frozen=True)
class Everything(Strategy):
    """Recomputes the whole canvas in every step."""

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.level >= 0, cached=False)


@dataclass(frozen=True)
class Restless(Strategy):
    """Takes back what it can in every step, prompt and all."""

    def revise(self, view: View) -> Tensor:
        return torch.ones_like(view.masked)


@dataclass(frozen=True)
class Once(Strategy):
    """Takes back the first two positions of the answer in the fourth step."""

    def revise(self, view: View) -> Tensor:
        again = torch.zeros_like(view.masked)
        again[:, view.prompt : view.prompt + 2] = (view.step == 3)[:, None]
        return again


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        *[(k, c) for k in ("full", "full shifted") for c in (None, PrefixCache(), DualCache())],
        *[("block causal", c) for c in (None, SubBlockCache())],
    ],
)
def test_revising_comes_to_an_end(kind: str, cache: Strategy | None, toy: Toy, run) -> None:
    for strategy in (Restless(), Once()):
        got = run(toy(**MODELS[kind]), strategy, *([cache] if cache else []))
        assert not (got.tokens[:, -LENGTH:] == MASK).any()
        assert max(got.forwards) <= 4 * LENGTH
        assert got.history.step.min() >= 0
    assert got.history.step[:, :2].min() > 3


@everywhere
def test_keeping_keys_changes_nothing_when_tokens_are_taken_back(kind: str, toy: Toy, run) -> None:
    model = toy(**MODELS[kind])
    kept, all_new = run(model, Once(), Blocks(3)), run(model, Once(), Blocks(3), Everything())
    assert kept.tokens.equal(all_new.tokens)


@dataclass(frozen=True)
class Halt(Strategy):
    """Finishes row 1 in the third step from all that is scored."""

    sees = "answer"

    def stop(self, view: View) -> Tensor:
        return (torch.tensor(view.keys) == 1) & (view.step == 2)


def test_stop_fills_what_is_scored_and_ends_the_row(toy: Toy, run) -> None:
    got = run(toy(), Blocks(4), Halt())
    assert got.history.step.amax(1).tolist() == [LENGTH - 1, 2, LENGTH - 1]
    assert (got.history.step[1] == 2).sum() == LENGTH - 2


@dataclass(frozen=True)
class Spy(Strategy):
    """Changes nothing, and asks for logits beyond the block."""

    sees = "answer"

    def guide(self, view: View, logits: Tensor) -> Tensor:
        assert view.read == slice(view.prompt, view.length)
        assert logits.shape[1] == LENGTH
        return logits


def test_seeing_more_changes_nothing(toy: Toy, run) -> None:
    spied, plain = run(toy(), Blocks(5), Spy()), run(toy(), Blocks(5))
    assert spied.tokens.equal(plain.tokens)
    assert spied.history.step.equal(plain.history.step)


def test_only_masks_are_scored(toy: Toy, watch) -> None:
    forwards = watch(toy())
    canvas = torch.tensor([[9, MASK, 9, MASK, 9, 9]])
    decode(toy(), torch.tensor([[3, 4]]), 6, canvas=canvas)
    assert forwards[0].read.tolist() == [[3, 5]]
    assert forwards[1].read in ((3, 4), (5, 6))


@everywhere
def test_scoring_whole_blocks_as_on_a_gpu_changes_nothing(
    kind: str, toy: Toy, run, watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = toy(**MODELS[kind]), [Blocks(4), TopK(4)]
    masks = run(model, *chosen)
    monkeypatch.setattr(State, "score_masked_only", False)
    forwards = watch(model)
    whole = run(model, *chosen)
    assert {f.logits.shape[1] for f in forwards} == {4}
    assert whole.tokens.equal(masks.tokens)
    assert whole.history.step.equal(masks.history.step)


@dataclass(frozen=True)
class Nowhere(Strategy):
    """Computes the prompt only."""

    def refresh(self, view: View) -> Refresh:
        return Refresh((view.level >= 0) & ~view.answer)


def test_a_refresh_that_misses_the_block_is_named(toy: Toy, run) -> None:
    with pytest.raises(RuntimeError, match="Nowhere computes positions that score no open mask"):
        run(toy(), Nowhere())


@dataclass(frozen=True)
class Again(Strategy):
    """Recomputes the whole canvas in every step, into the cache."""

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.level >= 0)


@everywhere
def test_recomputing_all_of_a_cache_changes_nothing(kind: str, toy: Toy, run) -> None:
    model = toy(**MODELS[kind])
    for more in ([], [Threshold(0.2), Entropy()]):
        cached, plain = run(model, Again(), *more), run(model, Everything(), *more)
        assert cached.tokens.equal(plain.tokens)
        assert cached.history.step.equal(plain.history.step)
        torch.testing.assert_close(cached.history.confidence, plain.history.confidence)


@dataclass(frozen=True)
class Masked(Strategy):
    """Recomputes everything first, then the masks of each row and whatever scores them."""

    every: int = 100

    def refresh(self, view: View) -> Refresh:
        masks = view.left | view.left.roll(-int(view.model.spec.shift), 1)
        masks[:, : view.prompt - 1] = False
        everything = (view.step % self.every == 0)[:, None]
        return Refresh(torch.where(everything, view.level >= 0, masks))


@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_a_batch_choose_their_own(shift: bool, toy: Toy, prompts, watch) -> None:
    model, chosen = toy(shift=shift), [Masked(), Threshold(0.25)]
    forwards = watch(model)
    tokens, mask = prompts(7, 4, 6)
    canvas = torch.full((3, LENGTH), MASK)
    canvas[0, 2:7], canvas[1, 4] = 9, 8
    batch = decode(model, tokens, LENGTH, chosen, mask=mask, canvas=canvas)
    assert any(isinstance(forward.rows, Tensor) for forward in forwards)
    for i, size in enumerate((7, 4, 6)):
        alone = decode(model, tokens[i : i + 1, -size:], LENGTH, chosen, canvas=canvas[i : i + 1])
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].tolist() == alone.history.step[0].tolist()


@pytest.mark.parametrize("shift", [False, True])
def test_own_rows_renewed_in_every_step_are_exact(shift: bool, toy: Toy, run) -> None:
    model = toy(shift=shift)
    renewed, plain = run(model, Masked(1), Blocks(4)), run(model, Blocks(4))
    assert renewed.tokens.equal(plain.tokens)


@dataclass(frozen=True)
class Blind(Strategy):
    """Masks the prompt for all queries."""

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.level >= 0, attend=view.answer)


def test_keys_can_be_left_out(toy: Toy, prompts) -> None:
    a, b = prompts(7, 7)[0]
    blind, plain = ([decode(toy(), t[None], LENGTH, s) for t in (a, b)] for s in ([Blind()], []))
    assert blind[0].tokens[0, 7:].equal(blind[1].tokens[0, 7:])
    assert not plain[0].tokens[0, 7:].equal(plain[1].tokens[0, 7:])


@dataclass(frozen=True)
class Upper(Strategy):
    """Writes 40 over what is known in the block, once it is full, for two more steps."""

    sees = "block"
    passes: int = 2

    def begin(self, view: View) -> dict[str, Entry]:
        return {"done": PerRow(torch.zeros_like(view.step))}

    def guide(self, view: View, logits: Tensor) -> Tensor:
        full = ~view.here(view.masked).any(1)
        logits[full, :, 40] = 1000
        return logits

    def edit(self, view: View) -> Tensor:
        full = ~view.here(view.masked).any(1, keepdim=True)
        mine = view.memory(self)
        mine["done"] = mine["done"] + full[:, 0]
        return full.expand_as(view.open)

    def hold(self, view: View) -> Tensor:
        return view.plan & (view.memory(self)["done"] < self.passes)[:, None]


def test_what_is_written_can_be_edited(toy: Toy, prompts, watch) -> None:
    tokens, mask = prompts(7, 4)
    tokens[0, 2] = MASK
    canvas = torch.full((2, LENGTH), MASK)
    canvas[0, 3] = 9
    got = decode(toy(), tokens, LENGTH, [TopK(2), Upper()], mask=mask, canvas=canvas)
    want = torch.full((2, LENGTH), 40)
    want[0, 3] = 9  # given, so it stays
    assert got.tokens[:, 7:].equal(want)
    assert got.tokens[:, :7].equal(tokens)
    assert got.nfe == 2 + 2
    assert got.history.step[0, 3] == -1
    assert set(got.history.step[1].tolist()) == {3}


@dataclass(frozen=True)
class Stretch(Strategy):
    """Per row: puts a mask between the first two positions, or cuts the last three."""

    def resize(self, view: View) -> Tensor | None:
        if int(view.step[0]) != 1:
            return None
        size = view.length - view.prompt
        longer = [0, NEW, *range(1, size)]
        shorter = [*range(size - 3), *[GONE] * 4]
        # A row is known by what it holds, not by its number, so that it is the same alone.
        odd = (view.tokens[:, -1 - size] % 2).tolist()
        return torch.tensor([longer if each else shorter for each in odd])


@pytest.mark.parametrize("more", [[], [DualCache(), Blocks(4)], [PrefixLM()], [Threshold(0.2)]])
@pytest.mark.parametrize("shift", [False, True])
def test_rows_may_change_their_length(more: list[Strategy], shift: bool, toy: Toy, prompts) -> None:
    model, sizes = toy(shift=shift), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    tokens[:, -1] = torch.tensor([10, 11, 12, 13])
    got = decode(model, tokens, LENGTH, [Stretch(), *more], mask=mask)
    assert got.tokens.shape == (4, 7 + LENGTH + 1)
    assert not (got.tokens[:, 7:] == MASK).any()
    assert (got.tokens[[0, 2], -4:] == EOS).all()
    for i, size in enumerate(sizes):
        row = tokens[i : i + 1, -size:]
        alone = decode(model, row, LENGTH, [Stretch(), *more]).tokens[0, size:].tolist()
        assert got.tokens[i, 7:].tolist() == alone + [EOS] * (LENGTH + 1 - len(alone))


def test_a_stretched_canvas_is_the_longer_canvas(toy: Toy) -> None:
    prompt = torch.tensor([[5, 11]])
    got = decode(toy(), prompt, LENGTH, [Stretch()])
    steps = got.history.step[0]
    assert len(steps) == LENGTH + 1
    assert steps.min() >= 0
    # What was known when the canvas grew stays, the rest is what the longer canvas gives.
    canvas = torch.where(steps < 2, got.tokens[0, 2:], MASK)
    assert got.tokens.equal(decode(toy(), prompt, LENGTH + 1, canvas=canvas[None]).tokens)


def test_other_attention_keeps_its_length(toy: Toy) -> None:
    with pytest.raises(ValueError, match="in full attention only, this model has prefix"):
        decode(toy(attention="prefix"), torch.tensor([[5, 11]]), LENGTH, [Stretch()])
