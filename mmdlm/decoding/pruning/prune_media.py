"""Drop media tokens during a decode, by the attention they get in the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Above, NonNegativeInt, PositiveInt
from mmdlm.backbones.kv import listed
from mmdlm.decoding.look import Look
from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

Keep = Annotated[float, Above(0)] | Annotated[int, Above(0)]


@dataclass(frozen=True)
class PruneMedia(Strategy):
    """Drops the media tokens that get least attention, at a layer and a step of choice.

    In that step, the layers from `layer` on compute the kept tokens only; after it the others are
    gone from the prompt and from the keys and values of every layer. Kept tokens keep their rotary
    positions. With a cached prompt (`PrefixLM`, block-causal models, `PrefixCache`) this is exact
    bookkeeping, as keys and values do not depend on the answer. All methods that prune inside the
    language model are settings of it:

    - FastV: `layer=2, keep=0.5`. The published rule takes the attention of the last token, which in
      a masked-diffusion model is just another mask; here it is the mean over all open masks.
    - Pruning in the middle of the first step, LLaDA-V (arXiv 2601.20168): `layer=16, keep=0.35`.
    - Late-step pruning (arXiv 2511.15098), for models trained from scratch: `step=4`.
    - Progressive pruning: `step=(0, 4, 8), keep=(0.7, 0.5, 0.3)`.
    - SparseVLM without recycling (its second version): `rank="raters", layer=(2, 6, 15),
      keep=(0.52, 0.35, 0.19)`.

    Source: FastV (arXiv 2403.06764; pkunlp-icler/FastV), SparseVLM (arXiv 2410.04417;
    Gumpest/SparseVLMs), and the two papers above, which have no public code.

    Args:
        keep: float: share of the media tokens of a request that stay, in (0, 1]; int: their number.
        layer: layers that run before the ranking, 1 to the model's; the attention of the last of
            them ranks. None: all layers, so that nothing is saved in the step itself.
        step: step of the request in which it happens, from 0.
        rank: "attention": what the open masks pay to a token, the mean over heads and masks.
            "raters": the mean attention score that a media token gets from the words of the prompt
            which are about the media (words whose embedding is more like the media than the mean of
            all words); in step 0 only. "random" tokens: what a ranking must be better than.

    `keep`, `layer` and `step` may be lists of the same length, one entry per pruning, in order.
    """

    paper: ClassVar[str] = "FastV, arXiv 2403.06764; SparseVLM, arXiv 2410.04417"
    requires: ClassVar[frozenset[str]] = frozenset({"plain_cache", "masks"})

    keep: Keep | tuple[Keep, ...] = 0.5
    layer: PositiveInt | tuple[PositiveInt, ...] | None = None
    step: NonNegativeInt | tuple[NonNegativeInt, ...] = 0
    rank: Literal["attention", "raters", "random"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {len(x) for x in (self.keep, self.layer, self.step) if isinstance(x, tuple)}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"PruneMedia: keep={self.keep}, layer={self.layer}, step={self.step}; expected "
                "single values, or lists of one length"
            )
        stages = self.stages
        times = [(step, layer or 0) for _, layer, step in stages]
        if times != sorted(times) or len(set(times)) < len(times):
            raise ValueError(
                f"PruneMedia: steps and layers {times} are not in ascending order, or repeat"
            )
        for keep, _, step in stages:
            if isinstance(keep, float) and keep > 1:
                raise ValueError(
                    f"PruneMedia.keep is {keep}, expected a share in (0, 1], or a number of tokens "
                    "as an integer"
                )
            if self.rank == "raters" and step:
                raise ValueError(
                    f"PruneMedia: rank='raters' in step {step}; the words of the prompt are "
                    "computed in step 0 only"
                )

    @property
    def stages(self) -> list[tuple[float | int, int | None, int]]:
        """(keep, layer, step) of each pruning."""
        given = (self.keep, self.layer, self.step)
        count = max((len(x) for x in given if isinstance(x, tuple)), default=1)
        return list(zip(*(x if isinstance(x, tuple) else (x,) * count for x in given), strict=True))

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, object]:
        """Checks the layers.

        Raises:
            ValueError: the model has fewer layers.
        """
        depth = len(model.backbone.blocks)
        deepest = max((layer or 1) for _, layer, _ in self.stages)
        if deepest > depth:
            raise ValueError(f"PruneMedia.layer is {deepest}, but the model has {depth} layers")
        return {}

    def begin(self, view: View) -> dict[str, Entry]:
        """How many media tokens each request has."""
        media = view.sequence.is_medium & view.sequence.mask
        return {"media": PerRow(media.sum(1).cpu())}

    def look(self, view: View) -> Look | None:
        """What is ranked in this step; None where no row is due."""
        count = view.memory(self)["media"]
        depth = len(view.model.backbone.blocks)
        stages: dict[int, Tensor] = {}
        for keep, layer, step in self.stages:
            due = (view.step == step) & (count > 0)
            if bool(due.any()):
                wanted = keep if isinstance(keep, int) else (count.double() * keep).round().long()
                wanted = torch.as_tensor(wanted).expand_as(count).clamp(min=1)
                at = layer or depth
                stages[at] = torch.where(due, wanted, stages.get(at, torch.full_like(count, -1)))
        return _Ranking(view, stages, self.rank) if stages else None


class _Ranking(Look):
    """Ranks media tokens while a forward runs.

    Args:
        view: the rows.
        stages: by the number of layers that run before it, [B] host int64 tokens to keep, -1 for
            rows that keep all.
        rank: see `PruneMedia`.
    """

    def __init__(self, view: View, stages: dict[int, Tensor], rank: str) -> None:
        self.stages, self.rank, self.view = stages, rank, view
        device = view.device
        self.media = view.sequence.is_medium & view.sequence.mask  # [B L]
        self.masks = (view.plan & view.left).to(device)
        self.out: Tensor | None = None
        self.raters = _raters(view, self.media) if rank == "raters" else None
        # By default the last layer computes queries only for the positions whose logits are used.
        # With a shift these are not the positions of the masks, and they never are those of words.
        last = len(view.model.backbone.blocks) in stages
        self.needs_all_queries = last and (view.model.spec.shift or rank == "raters")
        if rank == "random":
            self.draws = view.uniform_at(self.media.cpu())

    def gone(self, layer: int) -> Tensor | None:
        """See `Look.gone`."""
        return self.out

    def watch(self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, rows: Tensor) -> None:
        """See `Look.watch`."""
        keep = self.stages.get(layer + 1)
        if keep is None:
            return
        rows = rows.to(self.media.device)
        scores = self._scores(queries, keys, at, rows)  # [n end]
        media = self.media[rows, : scores.shape[1]]
        if self.out is not None:
            media = media & ~self.out[rows, : scores.shape[1]]
        keep = keep.to(rows.device)[rows, None]
        place = rank(scores.masked_fill(~media, -torch.inf))
        lost = media & (place >= keep) & (keep >= 0)
        out = torch.zeros_like(self.media) if self.out is None else self.out.clone()
        out[rows, : scores.shape[1]] |= lost
        self.out = out
        self.leaving = out.cpu()

    def _scores(self, queries: Tensor, keys: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        """[n end] float32, higher for tokens that stay."""
        if self.rank == "random":
            return self.draws[rows, : keys.shape[2]]
        asking = self.masks if self.raters is None else self.raters
        asking = asking[rows].gather(1, at.to(rows.device))  # [n M]
        places, real = listed(asking)
        real = real & asking.any(1, keepdim=True)
        index = places[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        few = queries.gather(2, index.to(queries.device)).float()
        keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        scores = few @ keys.transpose(2, 3) * few.shape[-1] ** -0.5  # [n H m end]
        if self.rank == "attention":
            sequence, size = self.view.sequence, keys.shape[2]
            level = sequence.level[rows]
            own = level.gather(1, at.to(rows.device).gather(1, places))
            seen = (level[:, None, :size] <= own[..., None]) & sequence.mask[rows, None, :size]
            if self.out is not None:
                seen = seen & ~self.out[rows, None, :size]
            scores = scores.masked_fill(~seen[:, None].to(scores.device), -torch.inf).softmax(-1)
            scores = scores.nan_to_num(0.0)
        weight = real[:, None, :, None].to(scores)
        found = (scores * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1) / scores.shape[1]
        return found.to(rows.device)


def _raters(view: View, media: Tensor) -> Tensor:
    """[B L] bool, words of the prompts that are about the media.

    Words that get more than the mean of softmax(media x word), which is taken over the words of a
    prompt and averaged over its media.
    """
    sequence = view.sequence
    raters = torch.zeros_like(media)
    words = sequence.mask & ~media & ~sequence.is_answer
    embeddings = view.model.backbone.tokens(sequence.tokens).float()
    counts = media.sum(1).tolist()
    for i, part in enumerate(sequence.media.float().split(counts)):
        if not len(part) or not bool(words[i].any()):
            continue
        relation = F.softmax(part @ embeddings[i, words[i]].T, dim=1).mean(0)
        raters[i, words[i]] = relation > relation.mean()
        if not bool(raters[i].any()):  # all words alike
            raters[i] = words[i]
    return raters
