"""A one-layer transformer that looks at all confidences and decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdlm.decoding import aux_network
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

KIND = "unmasking policy"


class PolicyBlock(nn.Module):
    """A transformer block whose norms and branches are scaled by what it is conditioned on (DiT).

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
        """[B G D] from two of them, and the keys [B G] that may be attended (None: all)."""
        scales = self.ada_conditioning(condition).chunk(6, -1)
        scale1, shift1, out1, scale2, shift2, out2 = scales
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (
            rearrange(project(h), "b g (h c) -> b h g c", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if seen is None else seen[:, None, None]
        h = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask)
        x = x + self.out_proj(rearrange(h, "b h g c -> b g (h c)")) * (1 + out1)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + self.linear2(F.gelu(self.linear1(h))) * (1 + out2)


class Policy(nn.Module):
    """Log-odds of unmasking each position, from the best probabilities there and what is masked.

    The weights have the names of apple/ml-rl-dllm: common/models/policy.py (DiTConfidencePolicy)
    and policy_layers.py, whose arithmetic this is; the defaults are the sizes it was published
    with (configs/experiment_configs/*_dit_confidence_*.yaml).

    Args:
        width: D.
        heads: attention heads.
        inner: width inside the MLP.
        time: width of the time's embedding.
        period: slowest period of the time's embedding; 1 gives all channels the same.
        top: probabilities per position, the highest ones.
        blocks: transformer blocks.
        whole: it looks at the whole answer and not at the open window only.
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
            progress: [B 1] share of the steps that a row may take.
            seen: [B G] bool, positions that are looked at; None: all.
        """
        time = self.time_mlp(waves(progress, self.time, self.period))  # [B 1 D]
        condition = self.mask_embedding(masked.long()) + time
        x = self.confidence_proj(confidences)
        for block in self.transformer_blocks:
            x = block(x, condition, seen)
        return self.output_proj(self.final_norm(x))[..., 0]


@dataclass(frozen=True)
class LearnedPolicy(Strategy):
    """Commits what a learned policy unmasks, and the position it likes best where it takes none.

    The policy sees the probabilities the model gives at all positions of the answer, which of them
    are masked, and the row's steps so far as a share of the answer's length. Probabilities of
    positions that a step does not score are those of the last step that did. It is trained for a
    model and for a size of blocks, by reinforcement learning, which is not part of this file.
    Without a policy the most confident position commits in each step.

    Source: apple/ml-rl-dllm: common/generation/generation.py ("bernoulli-argmax"), read in a public
    copy of the repository (orkunkinay/ml-rl-dllm).

    Args:
        policy: safetensors file of a policy, see `Policy` and `mmdlm.decoding.aux_network`; None:
            none.
        temperature: 0 takes what is likelier than not; above, each position is drawn with its
            probability at that temperature. Published evaluations use 0.5 with blocks of 32 and 1
            without blocks.
    """

    paper: ClassVar[str] = "Learned unmasking policies, arXiv 2512.09106"
    sees: ClassVar = "answer"
    may_idle: ClassVar = True

    policy: str | Path | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"LearnedPolicy.temperature is {self.temperature}, expected 0 or more")

    def begin(self, state: DecodeState) -> None:
        """Loads the policy."""
        if self.policy is not None:
            network = aux_network.load(self.policy, KIND, Policy).to(state.tokens.device)
            shape = (*state.tokens[:, state.prompt :].shape, network.top)
            state.memory[(self, "policy")] = network
            state.memory[(self, "confidences")] = torch.zeros(shape, device=state.tokens.device)

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """The logits as they are; their best probabilities are kept."""
        if self.policy is None:
            return logits
        count = state.memory[(self, "policy")].top
        top = logits.topk(min(count, logits.shape[-1]), -1).values  # `columns` may be fewer
        top = F.pad(top, (0, count - top.shape[-1]), value=-torch.inf)
        best = (top - logits.logsumexp(-1, keepdim=True)).exp()  # [B R top]
        # A row that waits for others must know what it knows alone. So must one whose own blocks
        # begin elsewhere, as blocks ahead of it are scored for the others' sake.
        own = (
            state.within() if state.model.spec.attention == "block_causal" else state.sequence.mask
        )
        fresh = state.here(own) & state.open.any(1, keepdim=True)
        kept = state.memory[(self, "confidences")]
        for place in range(kept.shape[-1]):
            state.put(kept[..., place], fresh, best[..., place], state.prompt)
        return logits

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        if self.policy is None:
            return rank(state.confidence) < 1
        odds = self._odds(state).gather(1, state.at - state.prompt)
        odds = odds.masked_fill(~state.open, -torch.inf)
        if self.temperature:
            taken = state.uniform() < (odds / self.temperature).sigmoid()
        else:
            taken = odds > 0
        none = ~taken.any(1, keepdim=True)
        return taken | (none & (rank(odds) < 1))

    def _odds(self, state: DecodeState) -> Tensor:
        """[B G] what the policy says."""
        network = state.memory[(self, "policy")]
        answer, masked = state.sequence.mask[:, state.prompt :], state.masked[:, state.prompt :]
        if not network.whole:
            answer = answer & state.within()[:, state.prompt :]
            masked = masked & answer
        # The row's own steps: in each it commits something, in others it waits for other rows.
        steps = state.commit_step.sort(1).values
        steps = (steps >= 0) & (steps != F.pad(steps[:, :-1], (1, 0), value=-1))
        length = state.sequence.mask[:, state.prompt :].sum(1, keepdim=True)
        progress = steps.sum(1, keepdim=True) / length
        return network(masked, state.memory[(self, "confidences")], progress, answer)


def waves(progress: Tensor, width: int, period: float) -> Tensor:
    """[B 1 width] cosines and sines of [B 1], rounded to bfloat16 as the policy was trained."""
    half = width // 2
    step = torch.arange(half, device=progress.device, dtype=torch.float32) / half
    angles = progress[..., None].float() * float(period) ** -step
    found = torch.cat([angles.cos(), angles.sin()], -1)
    return F.pad(found, (0, width % 2)).to(torch.bfloat16).float()


def turned(x: Tensor) -> Tensor:
    """Queries or keys [B H G hd], neighbouring channels rotated by the place in the answer.

    The channels come out with the even ones first, which scores do not notice.
    """
    length, width = x.shape[-2:]
    step = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    place = torch.arange(length, device=x.device, dtype=torch.float32)
    angles = place[:, None] / 10_000.0**step  # [G hd/2]
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)
