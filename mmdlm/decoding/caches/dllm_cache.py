"""dLLM-Cache: recompute the prompt rarely, and of the answer what has changed most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import PositiveInt, UnitFloat
from mmdlm.backbones.kv import KV, Pass, indices, joined, listed, take
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

if TYPE_CHECKING:
    from mmdlm.backbones.block import Block


@dataclass(frozen=True)
class DLLMCache(Strategy):
    """dLLM-Cache: recomputes the prompt rarely, the answer more often, and a part of it in between.

    Step 0 of a row computes everything. Every `prompt` steps the prompt is computed again, every
    `answer` steps the answer. In the other steps each layer computes the values of the whole answer
    and, of its positions, the share `ratio` whose values are least similar (cosine) to the cached
    ones; to the states of the others it adds what it added to them when it last computed them.
    Approximate. Rows have their own clocks.

    In a shifted family the last position of the prompt counts as one of the answer, which it
    scores.

    Source: dLLM-Cache (arXiv 2506.06295) as in ML-GSAI/LLaDA-V: train/llava/hooks,
    train/llava/cache and train/generate_demo.py, whose intervals are the defaults. Similarities
    that differ by less than 1e-4 count as equal here: most tokens do not change in a step, and
    among those the reference lets rounding decide. At least one position of an answer is computed.

    Args:
        prompt: steps from one computation of the prompt to the next.
        answer: steps from one computation of the whole answer to the next.
        ratio: share of the answer's positions that is computed in the other steps, rounded down.
    """

    paper: ClassVar[str] = "dLLM-Cache, arXiv 2506.06295"
    # A second forward (CFG's, without the text) would need its own states.
    requires: ClassVar[frozenset[str]] = frozenset({"full_attention", "one_forward"})

    prompt: PositiveInt = 25
    answer: PositiveInt = 7
    ratio: UnitFloat = 0.25

    def cache(self, view: View) -> KV | None:
        """Buffers that also hold what each layer last added to the states of the answer."""
        model = view.model
        kv = model.backbone.cache(len(view.tokens), view.length)
        return Partial(kv, list(model.backbone.blocks), view.prompt - int(model.spec.shift))

    def refresh(self, view: View) -> Refresh:
        """The answer, and the prompt where it is due; the layers choose what they compute of it."""
        new, real = ~view.has_cache, view.level >= 0
        kv = view.caches["canvas"]
        answer = real & (torch.arange(view.length) >= kv.start)
        prompt_due = (new | (view.step % self.prompt == 0))[:, None]
        answer_due = (new | (view.step % self.answer == 0))[:, None]
        kv.sizes = answer.sum(1)
        counts = (kv.sizes.double() * self.ratio).long().clamp(min=1)
        kv.whole = torch.where(answer, answer_due, prompt_due) & real
        kv.counts = counts.masked_fill(answer_due[:, 0], 0)
        return Refresh(answer | (prompt_due & real))


class Partial(KV):
    """Buffers that also hold what each layer last added to the states of the answer's positions.

    Args:
        kv: empty buffers, which are taken over.
        blocks: the layers.
        start: canvas position of the first of these positions.
    """

    needs_all_queries = True
    whole_batch = True

    def __init__(self, kv: KV, blocks: Sequence[Block], start: int) -> None:
        self.keys, self.values, self.length, self.end = kv.keys, kv.values, kv.length, kv.end
        self.blocks, self.start = blocks, start
        self.added: list[Tensor] = []
        """[B L-start+1 D] by layer, of which the last column is never read; empty at first."""
        self.whole = torch.zeros(0)
        """[B L] host bool, positions that every layer computes in this pass."""
        self.sizes = torch.zeros(0)
        """[B] host int64, positions of each answer."""
        self.counts = torch.zeros(0)
        """[B] host int64, further positions that each layer computes; 0 in rows without others."""
        self.all: Pass | None = None
        """What the pass brings to the current layer: all positions of the step."""
        self.within: Tensor | None = None
        """[B m] which of these the current layer computes; None for all."""

    def enter(self, layer: int, now: Pass) -> Pass:
        """See `KV.enter`: the positions that are computed whole, and those that changed most."""
        if layer:
            now = self.all._replace(x=self._complete(layer - 1, now.x))
        else:
            now = now._replace(rows=indices(now.rows, len(now.x), now.x.device))
        self.all, self.within = now, None
        if not bool(self.counts.any()):
            return now
        chosen = take(self.whole.to(now.x.device), now.rows) | self._changed(layer, now)
        self.within = listed(chosen)[0]
        mask = None if now.mask is None else take(now.mask, self.within)
        parts = (take(part, self.within) for part in (now.x, now.positions))
        return Pass(*parts, mask, take(now.rows, self.within), None)

    def leave(self, now: Pass) -> Tensor:
        """See `KV.leave`."""
        return take(self._complete(len(self.blocks) - 1, now.x), self.all.read)

    def _changed(self, layer: int, now: Pass) -> Tensor:
        """[B M] bool, in rows that compute a part of the answer, the positions that changed most.

        They are chosen row by row: which of equal ones `topk` takes depends on how many there are.
        """
        block, cached = self.blocks[layer], self.values[layer]
        values = block.attn.values(block.attn_norm(now.x)).flatten(2)  # [B M KV*hd]
        old = take(cached.transpose(1, 2).flatten(2), now.rows)
        alike = (F.cosine_similarity(values.float(), old.float(), dim=-1) * 1e4).round()
        chosen = torch.zeros_like(alike, dtype=torch.bool)
        for row, count in enumerate(self.counts.tolist()):
            if count:
                mine = (now.rows[row] >= self.start).nonzero()[: int(self.sizes[row]), 0]
                chosen[row, mine[alike[row, mine].topk(count, largest=False).indices]] = True
        return chosen

    def _complete(self, layer: int, x: Tensor) -> Tensor:
        """The states [B M D] after a layer, of all positions of the step."""
        rows, before = self.all.rows, self.all.x
        at = (rows - self.start).where(rows >= self.start, self.length - self.start)
        at = at[..., None].expand_as(before).to(x.device)
        if len(self.added) <= layer:
            size = (len(x), self.length - self.start + 1, x.shape[2])
            self.added.append(x.new_zeros(size))
        added = self.added[layer]
        if self.within is None:
            added.scatter_(1, at, x - before)
            return x
        within = self.within[..., None].expand_as(x)
        added.scatter_(1, at.gather(1, within), x - before.gather(1, within))
        return (before + added.gather(1, at)).scatter(1, within, x)

    def keep(self, rows: Tensor) -> None:
        """See `KV.keep`."""
        super().keep(rows)
        self.added = [added[rows.to(added.device)] for added in self.added]

    def pad(self, left: int, right: int) -> KV:
        """See `KV.pad`."""
        grown = Partial(super().pad(left, right), self.blocks, self.start + left)
        grown.added = [F.pad(added, (0, 0, 0, right)) for added in self.added]
        return grown

    def join(self, other: KV) -> KV:
        """See `KV.join`; the others' buffers are of the same kind."""
        both = Partial(super().join(other), self.blocks, self.start)
        batch, more = len(self.keys[0]), len(other.keys[0])
        both.added = joined(self.added, other.added, batch, more)
        return both
