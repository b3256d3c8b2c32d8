"""The second half of a block: one MLP, or many experts of which each token asks a few.

Sources: ZHZisZZ/dllm: dllm/pipelines/llada/models/modeling_lladamoe.py (softmax router) and
dllm/pipelines/llada2/models/modeling_llada2_moe.py (sigmoid router, groups, shared expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.backbones.linear import Linear

PIECE = 128
"""Rows an MLP takes at a time on a CPU, where nothing is trained: what lies between its two
products is several times as wide as a row, and stays in the cache of a core."""


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of a mixture of experts.

    Args:
        experts: E, experts of a layer.
        top: K, experts asked by a token.
        inner: width inside one expert.
        dense: layers that have a plain MLP instead.
        shared: width inside the expert that all tokens ask; 0 for none.
        score: what makes a score of a router logit: "softmax" over the experts, or "sigmoid".
        bias: the router has a bias, which is added to the scores experts are chosen by.
        bias_weighs: the bias also counts in the weights, not in the choice alone.
        normalize: the K weights of a token are divided by their sum.
        scale: factor on the weights.
        groups: consecutive experts are grouped so; each group is judged by its two best scores.
        top_groups: groups among whose experts a token chooses.
    """

    experts: int
    top: int
    inner: int
    dense: tuple[int, ...] = ()
    shared: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False
    bias_weighs: bool = False
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"router score {self.score!r} is unknown; expected softmax or sigmoid")
        if min(self.experts, self.inner, self.groups) < 1 or self.experts % self.groups:
            raise ValueError(
                f"{self.experts} experts of width {self.inner} cannot form {self.groups} groups"
            )
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"a token cannot choose {self.top_groups} of {self.groups} groups")
        reach = self.experts // self.groups * self.top_groups
        if not 1 <= self.top <= reach:
            raise ValueError(
                f"a token cannot ask {self.top} experts, {reach} of {self.experts} are in reach"
            )


class MLP(nn.Module):
    """SwiGLU with gate and up projections fused: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * inner, bias=bias)
        self.down = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        is_compiling = torch.compiler.is_compiling()
        if x.device.type == "cpu" and not is_compiling and torch.is_inference_mode_enabled():
            pieces = x.flatten(0, -2).split(PIECE)
            if len(pieces) > 1:
                return torch.cat([self._piece(piece) for piece in pieces]).view(x.shape)
        return self._piece(x)

    def _piece(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Router(nn.Module):
    """Which experts each token asks, and how much each of them weighs; always in float32."""

    bias: Tensor | None

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        nn.init.normal_(self.weight, std=0.02)
        # Balanced by a rule of its own in training, never by a gradient: not a parameter.
        self.register_buffer("bias", torch.zeros(config.experts) if config.bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32 [N K], and indices of the experts, int64 [N K], of tokens [N D]."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # [N E]
        scores = logits.softmax(-1) if c.score == "softmax" else logits.sigmoid()
        ranked = scores if self.bias is None else scores + self.bias
        chosen = self._reachable(ranked).topk(c.top, -1).indices
        weights = (ranked if c.bias_weighs else scores).gather(-1, chosen)
        if c.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.scale, chosen

    def _reachable(self, ranked: Tensor) -> Tensor:
        """Scores [N E] with those outside of a token's best groups at minus infinity."""
        c = self.config
        if c.top_groups == c.groups:
            return ranked
        grouped = ranked.unflatten(-1, (c.groups, -1))  # [N groups E/groups]
        judged = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = judged.topk(c.top_groups, -1).indices
        open_groups = torch.zeros_like(judged, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the model, but `model.bfloat16()` must not change which experts win."""
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self


class Stack(nn.Module):
    """One matrix per expert."""

    def __init__(self, experts: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, n_out, n_in))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Each row times the matrix of its expert.

        Args:
            x: [P n_in], sorted by expert.
            ends: [E] int32, the row after the last one of each expert.
        Returns:
            [P n_out].
        """
        weight = self.weight.to(x.dtype)
        if fits(x, weight):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        # `unbind` rather than `weight[e]`: its gradient is one stack, not E full-size additions.
        parts = zip(x.split(sizes), weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in parts if len(rows)])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` of this torch takes these operands.

    It wants rows and matrices to start at multiples of 16 bytes. On a GPU only bfloat16 has a
    kernel of its own, from compute capability 8.0 on.

    Args:
        x: [P n_in].
        weight: [E n_out n_in].
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(n * x.element_size() % 16 for n in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        capable = torch.cuda.get_device_capability(x.device) >= (8, 0)
        return x.dtype == torch.bfloat16 and capable
    return x.device.type == "cpu"


class Experts(nn.Module):
    """E SwiGLUs side by side."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate_up = Stack(config.experts, 2 * config.inner, width)
        self.down = Stack(config.experts, width, config.inner)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """[P D] -> [P D] for rows sorted by expert, see `Stack`."""
        gate, up = self.gate_up(x, ends).chunk(2, -1)
        return self.down(F.silu(gate) * up, ends)


class MoE(nn.Module):
    """The weighted sum of the experts each token asks, plus the shared one.

    Tokens never compete for places in an expert, so no token depends on another.

    Args:
        width: D.
        config: sizes and routing.
    """

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(width, config)
        self.shared = MLP(width, config.shared) if config.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        tokens = x.flatten(0, -2)  # [N D]
        weights, chosen = self.router(tokens)
        n, k = chosen.shape
        expert, order = chosen.flatten().sort(stable=True)  # the N K pairs by expert
        index = torch.arange(len(self.router.weight), device=x.device)
        ends = torch.searchsorted(expert, index, right=True, out_int32=True)  # [E]
        # Copied before they are permuted: the gradients of a token's K copies are then added in
        # the same order every time, which a gather with repeated rows does not promise on a GPU.
        pairs = tokens.to(compute_dtype(x)).repeat_interleave(k, 0).index_select(0, order)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        y = self.experts(pairs, ends).index_select(0, back).unflatten(0, (n, k))  # [N K D]
        y = (y.float() * weights[..., None]).sum(1).to(y.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type a matrix product of x has; `grouped_mm` knows nothing of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
