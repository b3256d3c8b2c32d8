"""Small functions of scores and probabilities that several strategies share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.decoding.view import View


def rank(confidence: Tensor) -> Tensor:
    """[B R] int64 place of each position, 0 = most confident; ties go to the lower position."""
    order = confidence.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(confidence.shape[1], device=confidence.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def odds_of(probability: float) -> float:
    """Odds log p/(1-p); infinite at 0 and 1, NaN (which nothing reaches) above 1."""
    if probability > 1:
        return math.nan
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


def within_bound(nats: Tensor, place: Tensor, gamma: float) -> Tensor:
    """[B R] bool, the longest list of best positions whose summed entropy stays in a bound.

    Args:
        nats: [B R] entropies.
        place: [B R] int64, see `rank`.
        gamma: bound on the sum without its largest term.
    """
    listed = torch.empty_like(nats).scatter_(1, place, nats)
    # The sum never falls as the list grows: the lists within the bound are the shortest ones.
    fits = listed.cumsum(1) - listed.cummax(1).values <= gamma
    return place < fits.sum(1, keepdim=True)


PIECE = 2**18
"""Logits looked at together on a CPU: 1 MB."""


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B R] float32 log p/(1-p) of the chosen tokens.

    The sum over the other ids is taken without the chosen one, so probabilities that round to 1 in
    float32 keep the order a float64 softmax gives them.

    Args:
        logits: [B R V] float32.
        tokens: [B R] int64, columns of `logits`.
    """
    if logits.device.type != "cpu":
        return _log_odds(logits, tokens)
    # In pieces that stay in the cache of a core: a fresh copy of all logits would cost more in page
    # faults than the arithmetic does.
    if logits.numel() <= PIECE:
        return _log_odds(logits, tokens)
    flat, chosen = logits.flatten(0, -2), tokens.flatten()
    rows = max(1, PIECE // max(1, flat.shape[1]))
    parts = [_log_odds(*each) for each in zip(flat.split(rows), chosen.split(rows), strict=True)]
    return torch.cat(parts).view(tokens.shape) if parts else logits.new_zeros(tokens.shape)


def _log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    chosen = logits.gather(-1, tokens[..., None])
    others = (logits - chosen).scatter_(-1, tokens[..., None], -torch.inf)
    best = others.amax(-1, keepdim=True)
    # Where nothing else is possible the best is -inf, which must not be subtracted from itself.
    total = others.sub_(best.clamp(min=torch.finfo(best.dtype).min)).exp_().sum(-1)
    return -(total.log() + best[..., 0])


def entropy(logits: Tensor) -> Tensor:
    """[... R] float32 entropy in nats of logits [... R V].

    With m the highest logit it is log(sum of exp(z - m)) + sum of p (m - z). All terms are positive
    and the first is taken without the highest logit, so nothing cancels where the entropy is small.
    """
    best = logits.argmax(-1)
    gap = logits.gather(-1, best[..., None]) - logits
    p = logits.softmax(-1)
    spread = torch.where(p > 0, p * gap, 0.0).sum(-1)
    return F.softplus(-log_odds(logits, best)) + spread


def margin(logits: Tensor) -> Tensor:
    """[... R] p1 - p2 - 1 of the two highest probabilities of logits [... R V], in [-1, 0].

    Near 0 float32 has more distinct numbers than near 1.
    """
    best = logits.argmax(-1)
    odds = log_odds(logits, best)
    first = logits.gather(-1, best[..., None])
    others = logits.scatter(-1, best[..., None], -torch.inf)
    second = (others.amax(-1) - first[..., 0]).exp() * odds.sigmoid()
    return -((-odds).sigmoid() + second)


def logit_margin(view: View, logits: Tensor) -> Tensor:
    """[B R] difference of the two highest logits, the mask token left out; 1e9 at most.

    Args:
        view: the rows.
        logits: [B R V]; the mask token's are set to -inf.
    """
    logits = view.ban_mask(logits)
    if logits.shape[-1] == 1:
        return torch.full_like(logits[..., 0], 1e9)
    first, second = logits.topk(2).values.unbind(-1)
    # A token without rival has an infinite margin, which would reach a bar that nothing may reach.
    return (first - second).clamp(max=1e9)


def passing(view: View, best: Tensor, high: float | None, low: float | None) -> Tensor:
    """[B R] bool, what exceeds `high`, and of the best ones what exceeds `low`."""
    if low is not None:
        best = best & (view.log_odds > odds_of(low))
    return best if high is None else best | (view.log_odds > odds_of(high))


def best_of_runs(view: View, member: Tensor, read: Tensor, value: Tensor) -> Tensor:
    """[B R] bool, in every run of positions the one of highest value; of equal ones the first.

    Args:
        view: the step.
        member: [B L] bool, positions whose neighbourhood makes the runs.
        read: [B R] bool, those of them that are scored in this step.
        value: [B R] float32.
    """
    starts = member & ~member.roll(1, 1)  # position 0 belongs to the prompt
    run = starts.long().cumsum(1).gather(1, view.at)  # [B R], 1 is the first
    value = value.masked_fill(~read, -torch.inf)
    top = torch.full_like(member, -torch.inf, dtype=value.dtype)
    top.scatter_reduce_(1, run, value, "amax")
    equal = read & (value == top.gather(1, run))
    order = torch.arange(value.shape[1], device=value.device).expand_as(run)
    order = order.masked_fill(~equal, value.shape[1])
    first = torch.full_like(member, value.shape[1], dtype=torch.long)
    first.scatter_reduce_(1, run, order, "amin")
    return equal & (order == first.gather(1, run))


def ragged(rows: list[list[int]], fill: int) -> Tensor:
    """[B N] int64, rows of unequal length filled up at their ends."""
    size = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (size - len(row)) for row in rows])


def first(chosen: Tensor, count: int) -> Tensor:
    """The first `count` True of each row of [B L]."""
    return chosen & (chosen.cumsum(1) <= count)
