"""DivPrune: keep a maximally diverse subset of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from adapters.adapter import Adapter
from adapters.mlp import MLP
from encoders.features import Features


class DivPrune(Adapter):
    """Projects with an inner adapter, then keeps a maximally diverse share of the tokens.

    Max-min selection by cosine distance: first the token farthest from its nearest other token,
    then repeatedly the token whose nearest kept token is farthest. No training is needed. As in
    the published code, it runs on the projected features, and kept tokens are renumbered.

    Source: DivPrune (arXiv 2503.02175; vbdi/divprune: LLaVA/llava/model/llava_arch.py).

    Args:
        in_dim: encoder width E.
        out_dim: backbone width D.
        inner: the projecting adapter, or a class or function that creates it, called as
            inner(in_dim, out_dim).
        keep: float: share of the valid tokens in (0, 1] (0.098 in the paper's LLaVA runs); int:
            number of tokens. At least one token of a non-empty row is kept.
        order: order of the kept tokens: "original", or "picked" for the order of selection.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        inner: Callable[[int, int], Adapter] = MLP,
        keep: int | float = 0.5,
        order: Literal["original", "picked"] = "original",
    ) -> None:
        super().__init__(in_dim, out_dim)
        if keep <= 0 or (isinstance(keep, float) and keep > 1):
            raise ValueError(
                f"DivPrune: keep={keep}; expected a share in (0, 1] or a count of at least 1"
            )
        self.inner = inner if isinstance(inner, Adapter) else inner(in_dim, out_dim)
        self.arguments["inner"] = self.inner  # a function cannot be serialized
        self.keep, self.order = keep, order

    def forward(self, features: Features) -> Features:
        """The kept tokens [B K D], without a grid; all projected features if all are kept.

        Args:
            features: tokens [B N E].
        """
        projected = self.inner(features)
        tokens, mask = projected.tokens, projected.mask
        width = int(self._counts(torch.tensor(tokens.shape[1], device="cpu")))
        if width >= tokens.shape[1]:
            return projected
        picked, kept = self.select(tokens, mask)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return Features(tokens[rows, picked], kept)  # [B K D]

    @torch.no_grad()
    def select(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept tokens, and which of them are valid.

        Args:
            tokens: [B N D].
            mask: [B N] bool; tokens at False are never kept.
        Returns:
            [B K] int64 indices into N and [B K] bool; K is the number for N valid tokens, and rows
            with fewer end in invalid entries.
        """
        count = tokens.shape[1]
        width = int(self._counts(torch.tensor(count, device="cpu")))
        far, near = float("inf"), float("-inf")
        # Masked tokens may be anything, including NaN.
        clean = torch.where(mask[:, :, None], tokens.float(), 0)
        unit = functional.normalize(clean, dim=-1)
        distance = 1 - unit @ unit.mT  # [B N N]
        distance = torch.where(mask[:, :, None] & mask[:, None, :], distance, far)
        # The smallest entry of a column is the token itself, the second its nearest neighbour.
        nearest = distance.topk(min(2, count), dim=1, largest=False).values[:, -1]  # [B N]
        nearest = torch.where(mask, nearest, near)
        best = nearest.argmax(1)  # [B]
        chosen, picks = ~mask, [best]
        rows = torch.arange(len(tokens), device=tokens.device)
        nearest = torch.full_like(nearest, far)
        for _ in range(width - 1):
            chosen = chosen.index_put((rows, best), torch.ones_like(chosen[:, 0]))
            nearest = torch.minimum(nearest, distance[rows, best])
            best = nearest.masked_fill(chosen, near).argmax(1)
            picks.append(best)
        picked = torch.stack(picks, dim=1)  # [B K]
        kept = torch.arange(width, device=mask.device) < self._counts(mask.sum(1))[:, None]
        if self.order == "original":
            picked = picked.masked_fill(~kept, count).sort(dim=1).values
        return picked.masked_fill(~kept, 0), kept

    def _counts(self, real: Tensor) -> Tensor:
        """Number of kept tokens; rounds half to even, as in the published code."""
        if isinstance(self.keep, int):
            return real.clamp(max=self.keep)
        return (real.double() * self.keep).round().long().clamp_min(1).minimum(real)
