"""NAP: several parts of the answer filled in parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from encoders.checks import LengthAtLeast, PositiveInt
from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class Streams(Strategy):
    """NAP: fills several parts of the answer in parallel, most confident positions first.

    Meant for models whose answer holds several lines of reasoning and then a summary: the streams
    are filled in parallel; the positions after the last of them open when all are full.

    Source: parallel-forced decoding of NAP (arXiv 2602.23225; pixeli99/NAP: README.md). From the
    paper's description, not checked against its code, of which only the training is public.

    Args:
        count: number of equal streams that make up the whole answer; use `sizes` if they differ,
            or if a summary follows.
        sizes: positions of each stream, from the start of the answer.
        steps: steps for the whole answer; None: one token per stream and step.
    """

    paper: ClassVar[str] = "NAP, arXiv 2602.23225"

    count: PositiveInt = 4
    sizes: Annotated[tuple[PositiveInt, ...], LengthAtLeast(1)] | None = None
    steps: PositiveInt | None = None

    def begin(self, view: View) -> dict[str, Entry]:
        """The positions of each stream.

        Raises:
            ValueError: the answer is shorter than all streams together.
        """
        asked, sizes = view.length - view.prompt, self.sizes
        if sizes is None:
            each, more = divmod(asked, self.count)
            sizes = [each + (i < more) for i in range(self.count)]
        elif sum(sizes) > asked:
            raise ValueError(
                f"Streams.sizes {sizes} are {sum(sizes)} positions, but the answer has {asked}; "
                "give a longer one, or smaller streams"
            )
        return {"sizes": PerRow(torch.tensor(sizes).repeat(len(view.tokens), 1))}

    def plan(self, view: View) -> Tensor:
        """[B L] bool, all streams, then the positions after them; empty in rows without masks."""
        streams = view.answer & self._streams(view)
        filling = (view.left & streams).any(1, keepdim=True)
        plan = torch.where(filling, streams, view.answer & ~streams)
        return plan & view.left.any(1, keepdim=True)

    def block_size(self, view: View) -> Tensor:
        """[B] int64, positions of all streams, or of what follows them."""
        total = view.memory(self)["sizes"].sum(1)
        rest = torch.maximum(view.lengths, view.asked) - total
        return torch.where(self._filling(view), total, rest)

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        sizes, now = view.memory(self)["sizes"], view.block_step
        if self.steps is None:
            steps = torch.where(self._filling(view), sizes.amax(1), view.plan.sum(1))
        else:
            steps = view.share(self.steps)
        # What follows the streams has the next number.
        place = torch.arange(view.length - view.prompt).repeat(len(sizes), 1)
        number = torch.searchsorted(sizes.cumsum(1), place, right=True).to(view.device)  # [B G]
        stream = number.gather(1, view.at - view.prompt)  # [B R]
        # Counted in every step, as the length of the answer may change.
        opened = view.opened[:, view.prompt :]
        was_open = view.commit_step >= (view.step - now).to(view.device)[:, None]
        was_open = (was_open | view.masked[:, view.prompt :]) & opened
        taken = (now >= steps - 1).to(view.device)[:, None] & view.open
        steps, now = steps.to(view.device), now.to(view.device)
        for i in range(sizes.shape[1] + 1):
            masks = (was_open & (number == i)).sum(1)
            quota = masks // steps + (now < masks % steps)
            inside = stream == i
            order = rank(view.confidence.masked_fill(~inside, -torch.inf))
            taken |= inside & (order < quota[:, None])
        return taken

    def _filling(self, view: View) -> Tensor:
        """[B] host bool, rows whose streams are open."""
        return (view.plan & self._streams(view)).any(1)

    def _streams(self, view: View) -> Tensor:
        """[B L] host bool, the positions before the end of the last stream."""
        total = view.memory(self)["sizes"].sum(1, keepdim=True)
        return torch.arange(view.length) - view.prompt < total
