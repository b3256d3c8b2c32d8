"""Base class of pruners, which reduce the number of media tokens before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from adapters.adapter import Embedded
from encoders.checks import Above, Checked


@dataclass(frozen=True)
class Seen:
    """What a pruner sees of one item: N embeddings, and what the encoder's attention was.

    Args:
        tokens: [N D] embeddings, as the language model would get them.
        keys: [N C] attention keys of the encoder at each token, the mean over its heads; None
            unless `Pruner.needs_attention`.
        received: [N] attention that each token receives in the encoder, the mean over its heads
            and the tokens that attend; None unless `Pruner.needs_attention`.
        grid: rows and columns if the tokens are a row-major grid, else None.
    """

    tokens: Tensor
    keys: Tensor | None = None
    received: Tensor | None = None
    grid: tuple[int, int] | None = None


class Pruned(NamedTuple):
    """What remains of one item.

    Args:
        tokens: [K D] embeddings.
        places: [K] int64 ascending, which of the N tokens each one is or mostly stands for.
    """

    tokens: Tensor
    places: Tensor


def in_order(pruned: Pruned) -> Pruned:
    """The same in the order of the places."""
    order = pruned.places.argsort(stable=True)
    return Pruned(pruned.tokens[order], pruned.places[order])


def seen(embedded: Embedded, carried: Tensor | None) -> Seen:
    """What a pruner sees of an item.

    Args:
        embedded: its N embeddings.
        carried: [N 1+C] attention received and keys, see `Adapter.carry`; None without.
    """
    received, keys = (None, None) if carried is None else (carried[:, 0], carried[:, 1:])
    return Seen(embedded.tokens, keys, received, embedded.grid)


@dataclass(frozen=True)
class Pruner(Checked):
    """Base class: fewer tokens for one image or recording, without training.

    A pruner sees the embeddings after the adapter, with newline vectors and the like. Methods that
    act inside the language model are decoding strategies, see `mmdlm.decoding.pruning`.

    Args:
        keep: float: share of the tokens in (0, 1]; int: number of tokens. At least one is kept.
        renumber: rotary positions are counted anew, as in the published code of all methods that
            act before the language model. False: kept tokens keep theirs, which costs less where a
            model knows places by their positions (captions of the bundled model, half of the
            tokens, divprune: 57 instead of 27 % exact).

    Attributes:
        needs_attention: the encoder's attention is recorded for it, see `encoders.attention`.
        in_tower: it merges tokens between the blocks of the encoder, see
            `encoders.merging.Merging`, and is not called with `Seen`.
    """

    needs_attention: ClassVar[bool] = False
    in_tower: ClassVar[bool] = False

    keep: Annotated[float, Above(0)] | Annotated[int, Above(0)] = 0.5
    renumber: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, float) and self.keep > 1:
            raise ValueError(
                f"{type(self).__name__}.keep is {self.keep}, expected a share in (0, 1], or a "
                "number of tokens as an integer"
            )

    def count(self, tokens: int) -> int:
        """Tokens to keep of a number of them; a share is rounded half to even."""
        kept = self.keep if isinstance(self.keep, int) else round(self.keep * tokens)
        return min(tokens, max(1, kept))

    @torch.no_grad()
    def select(self, seen: Seen) -> Tensor:
        """[K] int64 indices of the kept tokens, in any order."""
        raise TypeError(f"{type(self).__name__} does not define select(seen)")

    def merge(self, seen: Seen, count: int) -> Pruned:
        """A number of tokens; by default those that are selected. Merging pruners override it.

        Args:
            seen: N tokens.
            count: tokens to keep, 1 to N - 1.
        """
        places = self.select(seen).sort().values
        return Pruned(seen.tokens[places], places)

    def __call__(self, seen: Seen) -> Pruned:
        """What remains of an item; everything where the number of tokens is not above `keep`.

        Args:
            seen: N tokens.
        """
        total = len(seen.tokens)
        count = self.count(total)
        if count >= total:
            return Pruned(seen.tokens, torch.arange(total, device=seen.tokens.device))
        return self.merge(seen, count)
