"""What the vision towers of Qwen share: rotary positions, attention of images, merged tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from encoders.attention import received, recording
from encoders.encoder import Encoder
from encoders.features import Features, Prepared

THETA = 10000.0


def angles_of(grid: tuple[int, ...], merge: int, quarter: int) -> Tensor:
    """[N 4*quarter] rotary angles of the patches of one image, in their order.

    Args:
        grid: frames, rows and columns in patches.
        merge: patches per side of a token.
        quarter: frequencies of the rows, and as many of the columns.
    """
    t, rows, columns = grid
    speed = THETA ** -(torch.arange(quarter) / quarter)
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # [rows*columns 2]
    at = rearrange(
        at.view(rows, columns, 2),
        "(Y a) (X b) two -> (Y X a b) two 1",
        a=merge,
        b=merge,
    )
    return (at * speed).flatten(1).repeat(t, 2)


def attend(qkv: Tensor, turn: tuple[Tensor, Tensor], lengths: list[int], heads: int) -> Tensor:
    """Attention within consecutive stretches of patches, [n width].

    Args:
        qkv: [n 3*width] queries, keys and values.
        turn: cosines and sines [n head_dim] of the rotary positions.
        lengths: patches of each stretch; those of equal length are computed together.
        heads: attention heads.
    """
    q, k, v = rearrange(qkv, "n (three h d) -> three h n d", three=3, h=heads)
    parts = [each.split(lengths, dim=1) for each in (_rotated(q, *turn), _rotated(k, *turn), v)]
    mixed: dict[int, Tensor] = {}
    for length in dict.fromkeys(lengths):
        same = [i for i, other in enumerate(lengths) if other == length]
        found = F.scaled_dot_product_attention(
            *(torch.stack([each[i] for i in same]) for each in parts)
        )
        mixed |= dict(zip(same, found, strict=True))
    return rearrange(torch.cat([mixed[i] for i in range(len(lengths))], 1), "h n d -> n (h d)")


def note_units(
    encoder: Encoder,
    block: nn.Module,
    x: Tensor,
    turn: tuple[Tensor, Tensor],
    lengths: list[int],
    items: Sequence[Prepared],
    order: Tensor | None = None,
) -> None:
    """Fills `encoders.attention.recording`, if attention is recorded, before a block runs.

    The attention that a token receives is the sum over its merge x merge patches of what the
    patches of its image or frame pay to them. Its key is the mean over patches and heads, before
    the rotation, so that it does not depend on the place.

    Args:
        encoder: with `heads` and `merge`.
        block: with full attention.
        x: [n width] patches before the block.
        turn: see `attend`.
        lengths: see `attend`.
        items: the images.
        order: row-major place of each token, if the patches are in another order.
    """
    found = recording()
    if found is None:
        return
    qkv = block.qkv(block.norm1(x)).detach()
    q, k, _ = rearrange(qkv, "n (three h d) -> three h n d", three=3, h=encoder.heads)
    turned = (_rotated(each, *turn).split(lengths, 1) for each in (q, k))
    paid = torch.cat([received(*part) for part in zip(*turned, strict=True)])  # [n]
    unit = encoder.merge**2
    paid = paid.unflatten(0, (-1, unit)).sum(1, keepdim=True)  # [N 1]
    values = torch.cat([paid, k.float().mean(0).unflatten(0, (-1, unit)).mean(1)], 1)
    values = values if order is None else values[order.argsort()]
    tokens = merged(values, items, encoder.merge).tokens  # [B N 1+d]
    found.received, found.keys = tokens[..., 0], tokens[..., 1:]


def merged(tokens: Tensor, items: Sequence[Prepared], merge: int) -> Features:
    """Tokens [sum of N E] of several images as features, padded at the end.

    Args:
        tokens: one per merge x merge patches, image after image.
        items: the images.
        merge: patches per side of a token.
    """
    counts = torch.tensor([len(item.tensor) for item in items]) // merge**2
    padded = pad_sequence(tokens.split(counts.tolist()), batch_first=True)  # [B N E]
    mask = torch.arange(padded.shape[1]) < counts[:, None]
    sizes = tuple((t * y // merge, x // merge) for t, y, x in (item.grid for item in items))
    return Features(padded, mask.to(padded.device), sizes)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [h n d] turned by their angles, computed in float32."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
