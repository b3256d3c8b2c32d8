"""Mixture of experts with top-k routing.

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

from encoders.checks import Checked, Count, CountOrZero, Factor
from mmdlm.backbones.linear import MLP


@dataclass(frozen=True)
class MoEConfig(Checked):
    """Sizes and routing of a mixture of experts.

    Args:
        experts: E, experts per layer.
        top: K, experts per token (top-k).
        inner: width inside one expert.
        dense: indices of layers with a plain MLP instead.
        shared: width inside the shared expert, which every token is routed to; 0 for none.
        score: function from router logits to scores: softmax over the experts, or sigmoid.
        bias: the router adds a bias to the scores that select the experts.
        bias_weighs: the bias also enters the weights, not only the selection.
        normalize: divide the K weights of a token by their sum.
        scale: factor on the weights.
        groups: number of groups of consecutive experts; the score of a group is the sum of its two
            highest scores.
        top_groups: groups per token; its experts are selected within them.
    """

    experts: Count
    top: Count
    inner: Count
    dense: tuple[CountOrZero, ...] = ()
    shared: CountOrZero = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False
    bias_weighs: bool = False
    normalize: bool = False
    scale: Factor = 1.0
    groups: Count = 1
    top_groups: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts % self.groups:
            raise ValueError(
                f"MoEConfig.groups is {self.groups}, expected a divisor of experts ({self.experts})"
            )
        if self.top_groups > self.groups:
            raise ValueError(
                f"MoEConfig.top_groups is {self.top_groups}, expected at most groups "
                f"({self.groups})"
            )
        reach = self.experts // self.groups * self.top_groups
        if self.top > reach:
            raise ValueError(
                f"MoEConfig.top is {self.top}, expected at most the {reach} experts of "
                f"{self.top_groups} groups"
            )


class Router(nn.Module):
    """Selects the experts of each token and their weights, in float32."""

    bias: Tensor | None

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        if not self.weight.is_meta:  # as in transformer.embedding
            nn.init.normal_(self.weight, std=0.02)
        # Not a parameter: training balances it by a separate rule, without a gradient.
        self.register_buffer("bias", torch.zeros(config.experts) if config.bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [N K] and expert indices int64 [N K] of tokens [N D]."""
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
        """Scores [N E], set to minus infinity outside the best groups of each token."""
        c = self.config
        if c.top_groups == c.groups:
            return ranked
        grouped = ranked.unflatten(-1, (c.groups, -1))  # [N groups E/groups]
        judged = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = judged.topk(c.top_groups, -1).indices
        open_groups = torch.zeros_like(judged, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves the bias but keeps it float32: a cast would change which experts are selected."""
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
        if not self.weight.is_meta:  # as in transformer.embedding
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiplies each row with the matrix of its expert.

        Args:
            x: [P n_in], sorted by expert.
            ends: [E] int32, one past the last row of each expert.
        Returns:
            [P n_out].
        """
        weight = self.weight.to(x.dtype)
        if fits(x, weight):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        # `unbind`, not `weight[e]`: its gradient is one stack instead of E full-size additions.
        parts = zip(x.split(sizes), weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in parts if len(rows)])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` supports these operands.

    Rows and matrices must start at multiples of 16 bytes. On a GPU only bfloat16 has a kernel, from
    compute capability 8.0 on.

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
    """E SwiGLU MLPs."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate_up = Stack(config.experts, 2 * config.inner, width)
        self.down = Stack(config.experts, width, config.inner)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """[P D] -> [P D]; rows are sorted by expert, see `Stack`."""
        gate, up = self.gate_up(x, ends).chunk(2, -1)
        return self.down(F.silu(gate) * up, ends)


class MoE(nn.Module):
    """Weighted sum of the top-k experts of each token, plus the shared expert.

    Experts have no capacity limit, so the result of a token does not depend on other tokens.

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
        expert, order = chosen.flatten().sort(stable=True)  # N K pairs sorted by expert
        index = torch.arange(len(self.router.weight), device=x.device)
        ends = torch.searchsorted(expert, index, right=True, out_int32=True)  # [E]
        # Copied before the permutation, so that the gradients of the K copies are added in a fixed
        # order; the backward of a gather with repeated rows is not deterministic on a GPU.
        pairs = tokens.to(compute_dtype(x)).repeat_interleave(k, 0).index_select(0, order)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        y = self.experts(pairs, ends).index_select(0, back).unflatten(0, (n, k))  # [N K D]
        y = (y.float() * weights[..., None]).sum(1).to(y.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products of x under autocast, which `grouped_mm` ignores."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
