"""A model that drafts its own next steps and checks them all in one forward.

The logits of one forward say what comes next and, less surely, what comes after that: nested
drafts, each a token longer than the one before. One forward over all drafts as a batch shows what a
plain decode would do from each of them. The drafts it really reaches are kept, together with the
logits of the last, from which the next drafts are made. A draft that is never reached costs
computation, not correctness.

Source: FreeDave (arXiv 2510.00294; cychomatica/FreeDave: generation/core.py, token_transfer and
draft_verification_vectorized, with eager acceptance); FreeDave++ with `tau`, where the reference
takes `rule="subset"`.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmdlm.backbones.kv import KV
from mmdlm.backbones.linear import packed
from mmdlm.decoding.decode import Decoded, History
from mmdlm.decoding.numerics import log_odds, odds_of
from mmdlm.decoding.start import start
from mmdlm.decoding.state import State
from mmdlm.decoding.view import View, ban_mask
from mmdlm.layout import Sequence, chosen
from mmdlm.model import MultimodalDLM

Rule = Literal["exact_match", "subset"]
"""When a draft is what the model itself would write next: exact_match, all of it; subset, as far as
it is written."""
Order = Literal["confidence", "left_to_right"]
"""What is committed first."""


class Guess(NamedTuple):
    """What the model says about a canvas.

    Args:
        tokens: [L] int64 candidates.
        odds: [L] float32 log p/(1-p) of them, -inf where nothing was scored.
        rank: [L] float32, higher commits earlier; -inf where nothing was scored.
    """

    tokens: Tensor
    odds: Tensor
    rank: Tensor


@dataclass
class _Row:
    """One row being decoded; all tensors [L] on the CPU.

    Args:
        tokens: the canvas so far.
        writable: positions of the answer that were masks at first.
        number: the block of each position; blocks open one after the other.
        step: step that filled a position, -1 for none.
        sure: log p/(1-p) at that step, -inf for none.
        steps: steps done, as a plain decode counts them.
        guess: what the model says about `tokens`; None before it was asked.
        cached: where the keys and values of its prompt are, -1 for nowhere.
        forwards: forwards in which it took part.
    """

    tokens: Tensor
    writable: Tensor
    number: Tensor
    step: Tensor
    sure: Tensor
    steps: int = 0
    guess: Guess | None = None
    cached: int = -1
    forwards: int = 0


@torch.inference_mode()
def free_dave(
    model: MultimodalDLM,
    prompt: Tensor | Sequence,
    length: int,
    *,
    drafts: int = 4,
    block: int | None = None,
    tau: float | None = None,
    rule: Rule = "exact_match",
    order: Order = "confidence",
    mask: Tensor | None = None,
    canvas: Tensor | None = None,
    columns: slice | None = None,
) -> Decoded:
    """The answer of `decode` with one token per step, in fewer forwards.

    In exact arithmetic, tokens and commit order are those of
    `decode(model, prompt, length, [Blocks(block)])`, with `tau` those of `[Blocks(block),
    Threshold(tau)]`, and the forwards are never more. In low precision the kernels of another
    batch size may break near-ties otherwise.

    Every row has drafts and blocks of its own, so a row of a batch is decoded as it is alone.
    Drafts may reach into the next blocks. A prompt that does not see the answer is computed once;
    else, as with full attention, every forward recomputes it for every draft.

    Source: FreeDave (arXiv 2510.00294), see the module.

    Args:
        model: the model.
        prompt: see `mmdlm.decode`.
        length: positions G to fill.
        drafts: drafts per row and forward.
        block: positions per block, see `mmdlm.decoding.plans.blocks.Blocks`.
        tau: steps commit every open position of this probability, and always the best one; the
            first draft is such a step, each further one adds a token. None: one token per step.
        rule: without `tau` both rules are the same. With it, exact_match keeps the result that of
            the plain decode; subset also accepts drafts that hold less than a step of it would
            have written, and may end elsewhere.
        order: "left_to_right" is the order of `mmdlm.decoding.scores.left_to_right.LeftToRight`.
        mask: see `mmdlm.decode`.
        canvas: see `mmdlm.decode`.
        columns: see `mmdlm.decode`.
    Returns:
        tokens, forwards (one per batch of drafts), and the step of the plain decode at which each
        position would have been filled, counted for every row as if it were alone.
    Raises:
        ValueError: an argument is out of range, see also `mmdlm.decode`.
    """
    _check(drafts, block, tau, rule, order)
    state = start(model, prompt, length, mask, None, columns, canvas)
    rows = _rows(state, block)
    with packed(model.backbone):
        nfe = _rounds(state, rows, drafts, tau, rule, order)
    answer = slice(state.prompt, None)
    device = state.tokens.device
    history = History(
        torch.stack([row.step[answer] for row in rows]).to(device),
        torch.stack([row.sure[answer].sigmoid() for row in rows]).to(device),
    )
    given = prompt if isinstance(prompt, Tensor) else prompt.tokens
    size = given.shape[1] + length  # without the padding that stands for an empty prompt
    tokens = torch.stack([row.tokens[-size:] for row in rows]).to(device)
    return Decoded(tokens, nfe, history, tuple(row.forwards for row in rows))


def _rounds(
    state: State, rows: list[_Row], drafts: int, tau: float | None, rule: Rule, order: Order
) -> int:
    """Fills all rows, round by round; the number of forwards."""
    nfe = 0
    busy = [i for i, row in enumerate(rows) if _masked(state, row.tokens, row.writable).any()]
    if busy:
        nfe += 1
        given = [(i, rows[i].tokens) for i in busy]
        for i, guess in zip(busy, _ask(state, rows, given, drafts, order), strict=True):
            rows[i].guess = guess
    while busy:
        plans = {i: _plan(state, rows[i], drafts, tau) for i in busy}
        open_drafts = {
            i: [d for d in plan if _masked(state, d, rows[i].writable).any()]
            for i, plan in plans.items()
        }
        given = [(i, d) for i in busy for d in open_drafts[i]]
        guesses = iter(())
        if given:
            nfe += 1
            guesses = iter(_ask(state, rows, given, drafts, order))
        for i in busy:
            own = [next(guesses) for _ in open_drafts[i]]
            _accept(state, rows[i], plans[i], own, tau, rule)
        busy = [i for i in busy if rows[i].guess is not None]
    return nfe


def nested(tokens: Tensor, guess: Guess, order: Tensor, counts: Items[int]) -> Tensor:
    """Nested drafts [J L]: the canvas with ever more of the candidates written.

    Args:
        tokens: [L] int64, the canvas.
        guess: what the model says about it.
        order: [M] int64 positions, the first to be written first.
        counts: how many of them each draft holds.
    """
    made = tokens.repeat(len(counts), 1)
    for row, count in zip(made, counts, strict=True):
        row[order[:count]] = guess.tokens[order[:count]]
    return made


def verify(drafts: Tensor, targets: Tensor, rule: Rule, mask_id: int) -> list[int]:
    """Indices of the drafts that are reached, one after the other; the first one always is.

    From each the largest later draft that agrees with its target is taken.

    Args:
        drafts: [J L] int64, nested.
        targets: [K L] int64, K <= J: each of the first K drafts after one more step of the model.
        rule: see `Rule`.
        mask_id: id of the mask token.
    """
    path = [0]
    while path[-1] < len(targets):
        agrees = drafts == targets[path[-1]]
        if rule == "subset":
            agrees |= drafts == mask_id
        later = agrees.all(1).nonzero()[:, 0]
        if not len(later) or int(later[-1]) <= path[-1]:
            break
        path.append(int(later[-1]))
    return path


def _check(drafts: int, block: int | None, tau: float | None, rule: str, order: str) -> None:
    """Raises unless the arguments of `free_dave` make sense."""
    if drafts < 1:
        raise ValueError(f"drafts is {drafts}, expected at least 1 per forward")
    if block is not None and block < 1:
        raise ValueError(f"block is {block}, expected at least 1 position, or None")
    if tau is not None and not tau >= 0:
        raise ValueError(f"tau is {tau}, expected a probability, or None for one token per step")
    for name, value, known in (("rule", rule, Rule), ("order", order, Order)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")


def _rows(state: State, block: int | None) -> list[_Row]:
    """The rows of the batch before the first forward."""
    spec, size = state.model.spec, state.length - state.prompt
    if block is None and spec.attention == "block_causal":
        number = state.level
    else:
        place = torch.arange(state.length) - state.prompt
        number = (place // (block or spec.block_size or size)).expand(state.left.shape)
    nothing = torch.full((state.length,), -1)
    return [
        _Row(row, writable, blocks, nothing.clone(), torch.full((state.length,), -torch.inf))
        for row, writable, blocks in zip(state.tokens.cpu(), state.left, number, strict=True)
    ]


def _masked(state: State, tokens: Tensor, writable: Tensor) -> Tensor:
    """[L] bool, positions still to be filled."""
    return (tokens == state.model.spec.mask_id) & writable


def _step(state: State, row: _Row, tokens: Tensor, guess: Guess, tau: float | None) -> Tensor:
    """[M] int64 positions that a plain decode fills next."""
    masked = _masked(state, tokens, row.writable)
    is_open = masked & (row.number == row.number[masked].min())
    taken = torch.zeros_like(is_open)
    taken[guess.rank.masked_fill(~is_open, -torch.inf).argmax()] = True
    if tau is not None:
        taken |= is_open & (guess.odds >= odds_of(tau))
    return taken.nonzero()[:, 0]


def _plan(state: State, row: _Row, drafts: int, tau: float | None) -> Tensor:
    """Drafts [J L] of a row: the step that is certain, then one more token each."""
    now = _step(state, row, row.tokens, row.guess, tau)
    later = _masked(state, row.tokens, row.writable) & (row.guess.rank > -torch.inf)
    later[now] = False
    best = row.guess.rank.masked_fill(~later, -torch.inf).sort(descending=True, stable=True)
    rest = best.indices[: int(later.sum())]
    rest = rest[row.number[rest].sort(stable=True).indices]  # earlier blocks first
    order = torch.cat([now, rest])
    counts = range(len(now), min(len(now) + drafts, len(order) + 1))
    return nested(row.tokens, row.guess, order, counts)


def _accept(
    state: State,
    row: _Row,
    drafts: Tensor,
    guesses: list[Guess],
    tau: float | None,
    rule: Rule,
) -> None:
    """Moves a row to the last of its drafts that a plain decode reaches."""
    targets = []
    for tokens, guess in zip(drafts, guesses, strict=False):
        at = _step(state, row, tokens, guess, tau)
        targets.append(tokens.index_put((at,), guess.tokens[at]))
    reached = torch.stack(targets) if targets else drafts[:0]
    for j in verify(drafts, reached, rule, state.model.spec.mask_id):
        new = drafts[j] != row.tokens
        row.step[new] = row.steps
        row.sure[new] = row.guess.odds[new]
        row.steps += 1
        row.tokens, row.guess = drafts[j], guesses[j] if j < len(guesses) else None


def _ask(
    state: State,
    rows: list[_Row],
    given: list[tuple[int, Tensor]],
    drafts: int,
    order: Order,
) -> list[Guess]:
    """What the model says about some canvases, in one forward.

    Args:
        state: the run.
        rows: all rows.
        given: (row, canvas [L]) each.
        drafts: drafts that are to be made from the answer, see `_reach`.
        order: see `free_dave`.
    """
    device = state.tokens.device
    for i in {i for i, _ in given}:
        rows[i].forwards += 1
    at = torch.tensor([i for i, _ in given], device=device)
    canvases = torch.stack([tokens for _, tokens in given])
    reach = [_reach(state, rows[i], tokens, drafts) for i, tokens in given]
    size = max(len(positions) for positions in reach)
    # Rows that read fewer positions repeat their last one.
    read = torch.stack([torch.cat([r, r[-1:].expand(size - len(r))]) for r in reach])
    sequence = chosen(state.sequence, at).with_tokens(canvases.to(device))
    kv, first = _keys(state, [rows[i] for i, _ in given])
    computed = slice(first, state.length)
    logits = state.model.run(sequence, computed, read.to(device), kv, state.columns)
    picked = ban_mask(state, logits).argmax(-1)
    odds, picked = log_odds(logits, picked).cpu(), picked.cpu() + View(state).first_id
    if bool(odds.isnan().any()):
        raise ValueError(
            "a position had no possible token: the model gave NaN (check the weights, or load with "
            "dtype=float32)"
        )
    scored = torch.full(canvases.shape, -torch.inf).scatter(1, read, odds)
    tokens = canvases.scatter(1, read, picked)
    rank = scored
    if order == "left_to_right":
        rank = -torch.arange(state.length).expand_as(scored).float()
        rank = rank.masked_fill(scored == -torch.inf, -torch.inf)
    return [Guess(*each) for each in zip(tokens, scored, rank, strict=True)]


def _keys(state: State, rows: list[_Row]) -> tuple[KV | None, int]:
    """Keys and values of what no draft can change, and the first position after that.

    Args:
        state: the run; keeps those of the first forward.
        rows: the row of each draft of the coming forward; the first time every row at most once.
    """
    answer = state.level[:, state.prompt : state.prompt + 1]
    first = int((state.level >= answer).any(0).nonzero()[0])
    first = min(first, state.prompt - int(state.model.spec.shift))
    if first <= 0:
        return None, 0
    kv = state.model.backbone.cache(len(rows), state.length)
    if "canvas" not in state.caches:
        state.caches["canvas"] = kv
        for i, row in enumerate(rows):
            row.cached = i
        return kv, 0
    known = state.caches["canvas"]
    at = torch.tensor([row.cached for row in rows])
    for mine, theirs in zip((*kv.keys, *kv.values), (*known.keys, *known.values), strict=True):
        mine[:, :, :first] = theirs[at.to(theirs.device), :, :first]
    return kv, first


def _reach(state: State, row: _Row, tokens: Tensor, drafts: int) -> Tensor:
    """[R] int64 positions to score: the masks of the blocks that hold the next `drafts` of them."""
    masks = _masked(state, tokens, row.writable).nonzero()[:, 0]
    last = row.number[masks[:drafts][-1]]
    return masks[row.number[masks] <= last]
