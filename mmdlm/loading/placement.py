"""Where a model's weights go, and in which type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmdlm.backbones.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Device = str | torch.device | Sequence[str | torch.device]


def devices(device: Device) -> list[torch.device]:
    """The devices a user named, one or several.

    Args:
        device: "auto" is the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if not isinstance(device, str | torch.device):
        if not device:
            raise ValueError("device=[] names no device; expected one or several")
        return [devices(each)[0] for each in device]
    if device == "auto":
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but torch finds no GPU; use device='cpu'")
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ValueError(f"device={str(device)!r}, but there are {count} GPUs, from cuda:0 on")
    return [chosen]


def weight_type(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type of weights on a device.

    Args:
        dtype: a type, its name, "stored", or "auto": the stored one on a GPU, float32 on a CPU.
        device: where the weights go.
        stored: type in the checkpoint.

    Raises:
        ValueError: there is no such type.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype == "stored":
        return stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, expected auto, stored, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def parts(backbone: Transformer) -> dict[str, nn.Module]:
    """The pieces of a backbone that are filled one after another: blocks, then the rest."""
    blocks = {f"blocks.{i}": block for i, block in enumerate(backbone.blocks)}
    return blocks | {n: part for n, part in backbone.named_children() if n != "blocks"}


def spread(backbone: Transformer, over: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of each of `parts`: runs of blocks of about as many bytes on each device.

    Embedding and head are on the first device, so that only hidden states travel, which are a
    tiny part of the size of logits, and a tied head needs no second copy.

    Args:
        backbone: may be on the meta device.
        over: devices in the order in which the blocks run.

    Raises:
        ValueError: there are more devices than blocks.
    """
    pieces = parts(backbone)
    count = len(backbone.blocks)
    if len(over) > count:
        raise ValueError(f"device names {len(over)} devices for {count} blocks; name fewer")
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in pieces.items()}
    places = {name: over[0] for name in pieces}
    if len(over) == 1:
        return places
    share = sum(sizes.values()) / len(over)
    before = sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    at = -1
    for i in range(count):
        size = sizes[f"blocks.{i}"]
        reached = int((before + size / 2) / share)
        # No device is passed over, and each of those left gets a block.
        at = max(min(reached, at + 1), len(over) - (count - i))
        places[f"blocks.{i}"] = over[at]
        before += size
    return places | {"norm": over[-1]}
