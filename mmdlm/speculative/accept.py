"""Acceptance rules of speculative decoding."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rule = Literal["deterministic", "topk", "topk_relative"]
"""Acceptance rule of a draft token.

deterministic: it is the verifier's argmax. topk: it is among the `top_k` most probable tokens.
topk_relative: also, its probability is at least `ratio` times the highest.
"""


class Kept(NamedTuple):
    """Accepted part of a draft.

    Args:
        tokens: accepted tokens, then the verifier's token if there is one.
        accepted: number of accepted draft tokens.
    """

    tokens: list[int]
    accepted: int


def accept(
    draft: list[int],
    logits: Tensor,
    rule: Rule = "deterministic",
    *,
    top_k: int = 5,
    ratio: float = 0.5,
) -> Kept:
    """Accept a draft up to the first rejected token, which the verifier's argmax replaces.

    Source: ZhanqiuHu/flash-dlm-experimental: guided_diffusion/diff_spec_utils_shifted.py
    (ARVerifier).

    Args:
        draft: k tokens.
        logits: [k V] of the verifier, row i scores draft token i; or [k + 1 V], where the last row
            gives one more token after a fully accepted draft.
        rule: see `Rule`.
        top_k: see `Rule`.
        ratio: see `Rule`.
    Raises:
        ValueError: the rule is unknown or its numbers are out of range.
    """
    check_rule(rule, top_k, ratio)
    k = len(draft)
    first = logits.argmax(-1)
    ids = torch.tensor(draft, dtype=torch.long, device=logits.device)
    keep = ids == first[:k]
    if rule != "deterministic":
        own = logits[:k].gather(1, ids[:, None])  # [k 1]
        # Ties go to the lower id, as in argmax.
        lower = torch.arange(logits.shape[-1], device=logits.device) < ids[:, None]
        better = (logits[:k] > own) | ((logits[:k] == own) & lower)
        keep = better.sum(1) < top_k
        if rule == "topk_relative":
            probability = logits[:k].softmax(-1)
            keep &= probability.gather(1, ids[:, None])[:, 0] >= ratio * probability.amax(1)
    accepted = int(keep.long().cumprod(0).sum())
    return Kept(draft[:accepted] + first[accepted : accepted + 1].tolist(), accepted)


def check_rule(rule: str, top_k: int, ratio: float) -> None:
    """Raises ValueError unless the rule is known and its parameters are in range."""
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(get_args(Rule))}")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"ratio is {ratio}, expected a fraction of the highest probability, 0 to 1"
        )


def accept_sampled(
    draft: list[int],
    proposal: Tensor | None,
    logits: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Kept:
    """Speculative sampling: accept a draft up to the first rejected token, then sample one token.

    Token x, sampled from q, is accepted with probability min(1, p(x) / q(x)). A rejected token is
    replaced by a sample from max(0, p - q). The result follows the verifier's distribution p for
    any proposal q.

    Source: speculative sampling (arXiv 2211.17192, algorithm 1).

    Args:
        draft: k tokens.
        proposal: [k V] probabilities the draft was sampled from; None: a deterministic draft.
        logits: [k + 1 V] of the verifier, row i scores draft token i.
        temperature: temperature of the verifier's distribution, above 0.
        generator: random generator on the CPU.
    """
    target = (logits / temperature).softmax(-1).double().cpu()  # [k + 1 V]
    for i, token in enumerate(draft):
        p = target[i]
        q = torch.zeros_like(p)
        if proposal is None:
            q[token] = 1.0
        else:
            q = proposal[i].double().cpu()
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        if uniform * float(q[token]) < float(p[token]):
            continue
        rest = (p - q).clamp(min=0)
        # Rounding can give all zeros if both distributions are equal.
        rest = rest if float(rest.sum()) > 0 else p
        return Kept([*draft[:i], int(torch.multinomial(rest, 1, generator=generator))], i)
    bonus = int(torch.multinomial(target[len(draft)], 1, generator=generator))
    return Kept([*draft, bonus], len(draft))
