"""What a step of a session reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Committed:
    """Positions of one answer that a step filled.

    Args:
        key: the request.
        positions: within the answer, ascending; 0 is its first.
        tokens: the ids they got.
        confidence: their probabilities, 0 to 1.
    """

    key: int
    positions: list[int]
    tokens: list[int]
    confidence: list[float]


@dataclass(frozen=True, eq=False)
class Finished:
    """A complete answer.

    Args:
        key: the request.
        tokens: [G] int64.
        step: [G] int64, 0-based step of this request that filled a position; -1 where none did:
            known beforehand, or ended.
        confidence: [G] float32 probability of the token at that step, 0 where none did.
        forwards: forwards of the backbone that this request took.
    """

    key: int
    tokens: Tensor
    step: Tensor
    confidence: Tensor
    forwards: int
