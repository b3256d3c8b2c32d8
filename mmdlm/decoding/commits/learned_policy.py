"""Learned unmasking policy: commit what a small transformer selects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from encoders.checks import NonNegativeFloat
from mmdlm.decoding import aux_network
from mmdlm.decoding.memory import Entry, PerAnswer
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.model import MultimodalDLM

KIND = "unmasking policy"


class PolicyBlock(nn.Module):
    """A transformer block whose norms and branches are modulated by a condition (DiT).

    Args:
        width: D.
        heads: attention heads.
        inner: width inside the MLP.
    """

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ada_conditioning = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor, seen: Tensor | None) -> Tensor:
        """[B G D] from x and condition [B G D], and keys [B G] that may be attended (None: all)."""
        scales = self.ada_conditioning(condition).chunk(6, -1)
        scale1, shift1, out1, scale2, shift2, out2 = scales
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (
            rearrange(project(h), "b g (h c) -> b h g c", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if seen is None else seen[:, None, None]
        h = F.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=mask)
        x = x + self.out_proj(rearrange(h, "b h g c -> b g (h c)")) * (1 + out1)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + self.linear2(F.gelu(self.linear1(h))) * (1 + out2)


class Policy(nn.Module):
    """Log-odds of unmasking each position, from the best probabilities there and what is masked.

    Weight names and arithmetic are those of apple/ml-rl-dllm: common/models/policy.py
    (DiTConfidencePolicy) and policy_layers.py; the defaults are its published sizes
    (configs/experiment_configs/*_dit_confidence_*.yaml).

    Args:
        width: D.
        heads: attention heads.
        inner: width inside the MLP.
        time: width of the time embedding.
        period: longest period of the time embedding; 1 gives all channels the same.
        top: number of probabilities per position, the highest ones.
        blocks: transformer blocks.
        whole: its input is the whole answer, not the open positions only.
    """

    def __init__(
        self,
        width: int = 128,
        heads: int = 2,
        inner: int = 512,
        time: int = 128,
        period: float = 1.0,
        top: int = 1,
        blocks: int = 1,
        whole: bool = True,
    ) -> None:
        super().__init__()
        self.time, self.period, self.top, self.whole = time, period, top, whole
        self.time_mlp = nn.Sequential(nn.Linear(time, width), nn.SiLU(), nn.Linear(width, width))
        self.confidence_proj = nn.Linear(top, width)
        self.mask_embedding = nn.Embedding(2, width)
        self.transformer_blocks = nn.ModuleList(
            PolicyBlock(width, heads, inner) for _ in range(blocks)
        )
        self.final_norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, 1)

    def forward(
        self, masked: Tensor, confidences: Tensor, progress: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """[B G] float32 log-odds.

        Args:
            masked: [B G] bool.
            confidences: [B G top] probabilities.
            progress: [B 1] steps of a row as a share of the length of its answer.
            seen: [B G] bool, positions that may be attended to; None: all.
        """
        time = self.time_mlp(waves(progress, self.time, self.period))  # [B 1 D]
        condition = self.mask_embedding(masked.long()) + time
        x = self.confidence_proj(confidences)
        for block in self.transformer_blocks:
            x = block(x, condition, seen)
        return self.output_proj(self.final_norm(x))[..., 0]


@dataclass(frozen=True)
class LearnedPolicy(Strategy):
    """Learned policy: commits what the policy unmasks; if nothing, the position of highest score.

    Inputs of the policy are the highest probabilities at all positions of the answer, which of them
    are masked, and the row's steps so far as a share of the length of its answer. Probabilities of
    positions that a step does not score are those of the last step that did. A policy is trained
    for one model and block size, by reinforcement learning, which is not part of this file. Without
    a policy the most confident position commits in each step.

    Source: apple/ml-rl-dllm: common/generation/generation.py ("bernoulli-argmax"), read in a public
    copy of the repository (orkunkinay/ml-rl-dllm).

    Args:
        policy: safetensors file of a policy, see `Policy` and `mmdlm.decoding.aux_network`; None:
            there is none.
        temperature: 0 takes positions of a probability above 0.5; otherwise each position is drawn
            with its probability at that temperature. Published evaluations use 0.5 with blocks of
            32 and 1 without blocks.
    """

    paper: ClassVar[str] = "Learned unmasking policies, arXiv 2512.09106"
    sees: ClassVar = "answer"
    may_idle: ClassVar = True

    policy: str | Path | None = None
    temperature: NonNegativeFloat = 0.0

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Loads the policy.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a policy.
        """
        if self.policy is None:
            return {}
        return {"policy": aux_network.load(self.policy, KIND, Policy).to(model.device)}

    def begin(self, view: View) -> dict[str, Entry]:
        """Probabilities of positions that were never scored: 0."""
        if self.policy is None:
            return {}
        shape = (*view.commit_step.shape, view.memory(self)["policy"].top)
        return {"confidences": PerAnswer(torch.zeros(shape, device=view.device))}

    def observe(self, view: View, logits: Tensor) -> None:
        """Stores the highest probabilities of each scored position."""
        if self.policy is None:
            return
        mine = view.memory(self)
        count = mine["policy"].top
        top = logits.topk(min(count, logits.shape[-1]), -1).values  # `columns` may be fewer
        top = F.pad(top, (0, count - top.shape[-1]), value=-torch.inf)
        best = (top - logits.logsumexp(-1, keepdim=True)).exp()  # [B R top]
        # A step may recompute the written block before, whose probabilities stay as they were.
        own = view.opened if view.model.spec.attention == "block_causal" else view.sequence.mask
        fresh = view.here(own)
        kept = mine["confidences"].unbind(-1)
        kept = [view.placed(old, fresh, best[..., i], view.prompt) for i, old in enumerate(kept)]
        mine["confidences"] = torch.stack(kept, -1)

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        if self.policy is None:
            return rank(view.confidence) < 1
        odds = self._odds(view).gather(1, view.at - view.prompt)
        odds = odds.masked_fill(~view.open, -torch.inf)
        if self.temperature:
            taken = view.uniform() < (odds / self.temperature).sigmoid()
        else:
            taken = odds > 0
        none = ~taken.any(1, keepdim=True)
        return taken | (none & (rank(odds) < 1))

    def _odds(self, view: View) -> Tensor:
        """[B G] log-odds of the policy."""
        mine = view.memory(self)
        network = mine["policy"]
        answer, masked = view.sequence.mask[:, view.prompt :], view.masked[:, view.prompt :]
        if not network.whole:
            answer = answer & view.opened[:, view.prompt :]
            masked = masked & answer
        progress = (view.step / view.lengths)[:, None].to(view.device)
        return network(masked, mine["confidences"], progress, answer)


def waves(progress: Tensor, width: int, period: float) -> Tensor:
    """[B 1 width] cosines and sines of [B 1], rounded to bfloat16 as in the training."""
    half = width // 2
    step = torch.arange(half, device=progress.device, dtype=torch.float32) / half
    angles = progress[..., None].float() * float(period) ** -step
    found = torch.cat([angles.cos(), angles.sin()], -1)
    return F.pad(found, (0, width % 2)).to(torch.bfloat16).float()


def rotated(x: Tensor) -> Tensor:
    """Queries or keys [B H G hd], pairs of channels rotated by the position in the answer.

    The even channels come first in the result, which leaves the attention scores unchanged.
    """
    length, width = x.shape[-2:]
    step = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    place = torch.arange(length, device=x.device, dtype=torch.float32)
    angles = place[:, None] / 10_000.0**step  # [G hd/2]
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)
