"""Plain training step: masked diffusion as in the published trainers, the baseline of ours.

As published, every position goes through all blocks and the head, the logits [B L V] of the whole
batch exist at once, and the cross entropy of every position is computed and multiplied by the mask.
Queries, keys and values, and the two inputs of the MLP, are separate projections. It shares no code
with `mmdlm.objectives` or `Transformer.forward`, so equal losses are independent results.

Source: ZHZisZZ/dllm: dllm/core/trainers/mdlm.py (loss weight 1/p, normalised by the answer tokens
of the batch), with a fused AdamW. Two differences, in favour of the baseline: gradients are not
clipped, and no metrics are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.model import MultimodalDLM
from tests.speed.plain import Plain, _norm


class PlainTrainer(Plain):
    """A plain trainer with a copy of the weights of one of our models.

    Args:
        model: text model with full attention.
        lr: learning rate of AdamW.
    """

    def __init__(self, model: MultimodalDLM, lr: float) -> None:
        super().__init__(model)
        self.weights: list[nn.Parameter] = []
        self.embed = self._own(self.embed)
        tied = model.backbone.out is None
        self.head = (self.embed, None) if tied else tuple(map(self._own, self.head))
        self.norm.weight = self._own(self.norm.weight)
        for layer in self.layers:
            for name, part in layer.items():
                if isinstance(part, tuple):
                    layer[name] = tuple(map(self._own, part))
                else:
                    part.weight = self._own(part.weight)
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=0.0, fused=True)

    def _own(self, weight: Tensor | None) -> nn.Parameter | None:
        """A separate copy of a weight that is trained."""
        if weight is None:
            return None
        self.weights.append(nn.Parameter(weight.detach().clone()))
        return self.weights[-1]

    def step(self, tokens: Tensor, answer: Tensor, masked: Tensor, p: Tensor) -> float:
        """One training step; returns the loss before it.

        Args:
            tokens: [B L] int64 clean tokens.
            answer: [B L] bool, the tokens that may be masked.
            masked: [B L] bool, the tokens that are.
            p: [B L] float32 mask probability.
        """
        loss = self.loss(tokens, answer, masked, p)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def exact(self, tokens: Tensor, answer: Tensor, masked: Tensor, p: Tensor) -> float:
        """The same loss with a float64 cross entropy, see `step`.

        The published one sums along a transposed axis of 126,464 numbers in float32, which is off
        by 1e-5.
        """
        logits = self.logits(torch.where(masked, self.mask_id, tokens))[masked]
        losses = F.cross_entropy(logits.double(), tokens[masked], reduction="none")
        return float((losses / p[masked]).sum() / answer.sum().clamp(min=1))

    def loss(self, tokens: Tensor, answer: Tensor, masked: Tensor, p: Tensor) -> Tensor:
        """The loss of a batch, see `step`."""
        logits = self.logits(torch.where(masked, self.mask_id, tokens))
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")  # [B L]
        return (losses / p * masked / answer.sum().clamp(min=1)).sum()

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B L V] of a batch of equal lengths."""
        self.cos, self.sin = self._angles(ids.shape[1], ids.device)
        x = F.embedding(ids, self.embed) * self.config.embed_scale
        group = self.config.heads // self.config.keys_heads
        for layer in self.layers:
            h = _norm(x, layer["attn_norm"])
            q, k, v = (self._heads(F.linear(h, *layer[name])) for name in ("q", "k", "v"))
            q, k = self._rotate(q, 0), self._rotate(k, 0)
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + F.linear(y.transpose(1, 2).reshape(*ids.shape, -1), *layer["o"])
            h = _norm(x, layer["mlp_norm"])
            h = F.silu(F.linear(h, *layer["gate"])) * F.linear(h, *layer["up"])
            x = x + F.linear(h, *layer["down"])
        return F.linear(_norm(x, self.norm), *self.head) * self.config.logit_scale
