"""DivPrune: keep a maximally diverse subset of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapters.pruner import Pruner, Seen


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keeps a maximally diverse share of the tokens, by max-min selection of cosine distances.

    First the token farthest from its nearest other token, then repeatedly the token whose nearest
    kept token is farthest. As in the published code, it looks at the projected features.

    Source: DivPrune (arXiv 2503.02175; vbdi/divprune: LLaVA/llava/model/llava_arch.py), where LLaVA
    runs with keep=0.098.
    """

    @torch.no_grad()
    def select(self, seen: Seen) -> Tensor:
        """See `Pruner.select`; in the order of selection."""
        unit = functional.normalize(seen.tokens.float(), dim=-1)
        distance = 1 - unit @ unit.T  # [N N]
        # The smallest entry of a column is the token itself, the second its nearest neighbour.
        nearest = distance.topk(min(2, len(distance)), dim=0, largest=False).values[-1]
        best = nearest.argmax()
        picks, nearest = [best], torch.full_like(nearest, torch.inf)
        for _ in range(self.count(len(distance)) - 1):
            nearest = torch.minimum(nearest, distance[best])
            nearest[best] = -torch.inf
            best = nearest.argmax()
            picks.append(best)
        return torch.stack(picks)
