"""ToMe between the blocks of the tower: merge pairs of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

from torch import Tensor

from adapters.prune_tome import average, matched, pooled
from adapters.pruner import Pruner
from encoders.checks import NonNegativeInt


@dataclass(frozen=True)
class ToMeTower(Pruner):
    """Merges tokens inside the tower, between attention and MLP of its blocks, as published.

    The tower itself becomes faster: each block computes fewer tokens than the one before. Its
    output is no grid any more, so it serves towers without class token whose adapter maps each
    token by itself (`MLP`).

    Source: ToMe (arXiv 2210.09461; facebookresearch/ToMe: tome/merge.py, tome/utils.py).

    Args:
        keep: see `Pruner`; tokens left after the last block.
        r: tokens merged per block, in place of `keep`; on average over the blocks for
            "decreasing". At most half of what is left. None: as many as `keep` needs.
        schedule: "constant", or "decreasing" linearly from 2 r in the first block to 0 in the last.
    """

    in_tower: ClassVar[bool] = True

    r: NonNegativeInt | None = None
    schedule: Literal["constant", "decreasing"] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.keep != Pruner.keep:
            raise ValueError(f"ToMeTower: keep={self.keep} and r={self.r}; give one of them")

    def plan(self, tokens: int, depth: int) -> list[int]:
        """Tokens merged in each block.

        Args:
            tokens: N, before the first block.
            depth: number of blocks.

        Raises:
            ValueError: more than half of the tokens of a block would have to go to reach `keep`.
        """
        target = self.count(tokens)
        wanted = self._per_block(tokens - target, depth) if self.r is None else self._of_r(depth)
        found, left = [], tokens
        for count in wanted:
            found.append(min(count, left // 2))
            left -= found[-1]
        if self.r is None and left > target:
            raise ValueError(
                f"ToMeTower.keep is {self.keep}, {target} of {tokens} tokens; a block merges at "
                f"most half of them, so that {left} are left after {depth} blocks with the "
                f"schedule {self.schedule!r}"
            )
        return found

    def _per_block(self, total: int, depth: int) -> list[int]:
        """`total` merged tokens over the blocks, by the schedule."""
        weights = [1 if self.schedule == "constant" else depth - 1 - i for i in range(depth)]
        sums = accumulate(weights if any(weights) else [1], initial=0)
        done = [each / (sum(weights) or 1) for each in sums]
        return [round(total * b) - round(total * a) for a, b in pairwise(done)]

    def _of_r(self, depth: int) -> list[int]:
        if self.schedule == "constant" or depth == 1:
            return [self.r] * depth
        step = -2 * self.r / (depth - 1)
        return [int(2 * self.r + step * i) for i in range(depth)]

    def step(
        self, x: Tensor, keys: Tensor, size: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `encoders.merging.Merging.step`."""
        order, pairs = matched(keys.float(), count)
        merged = average(x.float(), size, order, pairs).to(x.dtype)
        return merged, pooled(size, order, pairs), order
