"""Cross entropy of chosen tokens without the logits of all of them at once.

With V = 126,464 the float32 logits of 4,096 positions take 2 GB, and as much for each copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdlm.backbones.linear import is_plain

if TYPE_CHECKING:
    from mmdlm.backbones.transformer import Transformer
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM


class Scores(NamedTuple):
    """How well N tokens are predicted.

    Args:
        losses: [N] float32 cross entropy.
        right: [N] float32, 1 where the most probable token is the target.
    """

    losses: Tensor
    right: Tensor


def weighted_cross_entropy(
    model: MultimodalDLM,
    sequence: Sequence,
    at: Tensor,
    target: Tensor,
    weights: Tensor | float,
    chunk: int,
) -> tuple[Tensor, Scores]:
    """Weighted sum of the cross entropy at some positions, with gradient, and `Scores` without.

    As the weights are known, the gradient of a chunk is computed beside its loss: no logits are
    kept, and none are computed twice. A head that is not a plain linear layer (LoRA, quantized) is
    scored by `cross_entropy`.

    Args:
        model: the model that scores.
        sequence: input of the model.
        at: bool [B L], N positions whose tokens are predicted.
        target: int64 [N], their tokens, sequence by sequence.
        weights: [N] float32 weight of each loss, or one for all.
        chunk: positions whose logits exist at a time.
    """
    return weighted_score(model, model.hidden_at(sequence, at), target, weights, chunk)


def weighted_score(
    model: MultimodalDLM,
    hidden: Tensor,
    target: Tensor,
    weights: Tensor | float,
    chunk: int,
    fused: bool | None = None,
) -> tuple[Tensor, Scores]:
    """Weighted sum of the cross entropy of tokens from hidden states; see there.

    Args:
        model: the model that scores.
        hidden: [N D] states that score the tokens.
        target: int64 [N].
        weights: see `weighted_cross_entropy`.
        chunk: positions per chunk.
        fused: the gradient is computed beside the loss; None: where the head is a plain linear
            layer.
    """
    fused = _is_plain(model.backbone) if fused is None else fused
    weights = torch.as_tensor(weights, dtype=torch.float32, device=target.device).expand(
        len(target)
    )
    if not (torch.is_grad_enabled() and fused):
        scores = score(model, hidden, target, chunk)
        return (weights * scores.losses).sum(), Scores(scores.losses.detach(), scores.right)
    out = model.backbone.out
    weight, bias = (model.backbone.embed.weight, None) if out is None else (out.weight, out.bias)
    total, losses, right = _Weighted.apply(
        hidden, weight, bias, target, weights, model.backbone, chunk
    )
    return total, Scores(losses, right)


def cross_entropy(
    model: MultimodalDLM, sequence: Sequence, at: Tensor, target: Tensor, chunk: int
) -> Scores:
    """Cross entropy of the tokens at some positions, with gradient, `chunk` positions at a time.

    For losses that are not a weighted sum, see `weighted_cross_entropy`. At most [chunk V] logits
    exist at a time: the backward pass computes them again, chunk by chunk. If all positions fit
    into one chunk, its logits are kept and nothing is computed twice.

    Args:
        model: the model that scores.
        sequence: input of the model.
        at: bool [B L], N positions whose tokens are predicted.
        target: int64 [N], their tokens, sequence by sequence.
        chunk: positions per chunk.
    """
    return score(model, model.hidden_at(sequence, at), target, chunk)


def score(model: MultimodalDLM, hidden: Tensor, target: Tensor, chunk: int) -> Scores:
    """Cross entropy of tokens from hidden states, see `cross_entropy`.

    Args:
        model: the model that scores.
        hidden: [N D] states that score the tokens.
        target: int64 [N].
        chunk: positions per chunk.
    """
    if len(hidden) <= chunk or not torch.is_grad_enabled():
        parts = [
            _scores(model, part, tokens)
            for part, tokens in zip(hidden.split(chunk), target.split(chunk), strict=True)
        ]
    else:
        parts = [
            checkpoint(_scores, model, part, tokens, use_reentrant=False)
            for part, tokens in zip(hidden.split(chunk), target.split(chunk), strict=True)
        ]
    losses, right = (torch.cat(each) for each in zip(*parts, strict=True))
    return Scores(losses, right)


def _scores(model: MultimodalDLM, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of a chunk, see `Scores`; hidden is [N D]."""
    logits = model.backbone.head(hidden).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses, (logits.detach().argmax(-1) == target).float()


def _is_plain(backbone: Transformer) -> bool:
    """Whether logits are the product with one ordinary matrix, whose gradient is known."""
    is_linear = backbone.out is None or is_plain(backbone.out)
    head = backbone.embed if backbone.out is None else backbone.out
    return is_linear and type(head.weight) is nn.Parameter


class _Weighted(torch.autograd.Function):
    """The weighted sum of losses, whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weights: Tensor,
        backbone: Transformer,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total, losses [N] and hits [N]; hidden is [N D], weight [V D], bias [V]."""
        ctx.set_materialize_grads(False)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight and not len(hidden) else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        parts = [(weights.new_zeros(0), weights.new_zeros(0))]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = backbone.head(hidden[part])
            dtype, logits = logits.dtype, logits.float()
            parts.append(_differentiate(logits, target[part], weights[part]))
            logits = logits.mul_(backbone.config.logit_scale).to(dtype)
            with torch.autocast(logits.device.type, enabled=False):
                if wants_hidden:
                    of_hidden[part] = logits @ weight.to(dtype)
                if wants_weight:
                    of_weight = _add_product(of_weight, logits.T, hidden[part].to(dtype))
            if wants_bias:
                of_bias += logits.sum(0, dtype=torch.float32)
            del logits  # or those of two chunks would exist at a time
        losses, right = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.mark_non_differentiable(losses, right)
        ctx.gradients = (of_hidden, of_weight, of_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return (weights * losses).sum(), losses, right

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times that of the total."""
        if ctx.gradients is None:
            raise RuntimeError(
                "this is the second backward pass through the same weighted cross entropy, which "
                "keeps its gradients for one; compute the loss again"
            )
        # Nothing else may hold the [V D] gradient, so that autograd takes it without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if scale is None:
            return (None,) * 7
        found = [
            None if x is None else x.mul_(scale).to(dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None, None)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Float32 total + a @ b, in place; None is zero."""
    if total is None:
        return (a @ b).float()
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def _differentiate(logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of a chunk; logits [n V] become the gradient of the weighted losses."""
    best, index = logits.max(-1, keepdim=True)
    chosen = logits.gather(-1, target[:, None])
    total = logits.sub_(best).exp_().sum(-1, keepdim=True)
    losses = (total.log() + best - chosen)[:, 0]
    logits *= weights[:, None] / total
    logits.scatter_add_(-1, target[:, None], -weights[:, None])
    return losses, (index[:, 0] == target).float()
