"""Weights from files into a model, part by part, and out of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from encoders.checks import shown
from mmdlm.backbones.transformer import Transformer
from mmdlm.files import preview
from mmdlm.loading.keymap import FLOATS, Places, allocate, shapes, views
from mmdlm.loading.quantize import check as check_quantize
from mmdlm.loading.quantize import is_quantized
from mmdlm.loading.quantize import quantize as quantize_block
from mmdlm.loading.shards import Stored, copy
from mmdlm.model import MultimodalDLM, backbone

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
        if not isinstance(device, Sequence):
            raise TypeError(f"device is {shown(device)}, expected a name such as 'cpu', or a list")
        if not device:
            raise ValueError("device=[] names no device; expected one or several")
        return [devices(each)[0] for each in device]
    if device == "auto":
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} does not exist; expected 'auto', 'cpu', 'cuda' or 'cuda:0'"
        ) from error
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


def fill(
    model: MultimodalDLM,
    stored: Mapping[str, Stored],
    places: Places,
    over: list[torch.device],
    dtype: str | torch.dtype,
    kind: str | None = None,
    kept: tuple[str, ...] = (),
    change: Callable[[MultimodalDLM, str], None] | None = None,
) -> None:
    """Reads the weights of a model part by part, so that quantizing sees one block at a time.

    Args:
        model: weights on the meta device get memory.
        stored: tensors in files.
        places: where each of them belongs in the model.
        over: devices that share the blocks of the backbone; encoders and adapters are on the first.
        dtype: see `mmdlm.checkpoint.load`. "stored" is each part's own type.
        kind: "int8" or "int4" quantizes the blocks.
        kept: ends of names that keep their type.
        change: called with the model and the start of the names of each part that was read, before
            it is quantized.

    Raises:
        ValueError: the model cannot be quantized in this way.
        ImportError: quantizing needs torchao.
    """
    kinds = _types(stored, places, over[0], dtype)
    if kind is not None:
        if model.spec.transformer.moe is not None:
            raise ValueError(
                f"quantize={kind!r} changes linear layers only; nearly all weights of "
                f"{model.spec.family} are experts, which are not linear layers; leave it out"
            )
        for each in over:
            check_quantize(kind, each, kinds["backbone"])
    for group in ("encoders", "adapters"):
        for name, part in getattr(model, group).items():
            own = kinds.get(f"{group}.{name}", kinds["backbone"])
            own = torch.float32 if getattr(part, "float32", False) else own
            allocate(part, over[0], own)
            part.to(over[0], own)  # what was not on the meta device
    where = spread(model.backbone, over)
    for name, part in parts(model.backbone).items():
        allocate(part, where[name], kinds["backbone"], kept, name)
        inside = {n: p for n, p in places.items() if p.ours.startswith(f"backbone.{name}.")}
        copy(stored, views(model, inside))
        if change is not None:
            change(model, f"backbone.{name}.")
        if kind is not None and name.startswith("blocks."):
            quantize_block(part, kind)
    rest = {n: p for n, p in places.items() if not p.ours.startswith("backbone.")}
    copy(stored, views(model, rest))
    if change is not None:
        for group in ("encoders.", "adapters."):
            change(model, group)


def _types(
    stored: Mapping[str, Stored], places: Places, device: torch.device, dtype: str | torch.dtype
) -> dict[str, torch.dtype]:
    """Type of the weights of each part: "backbone", "encoders.image" and so on."""
    embedding = next(stored[n] for n, p in places.items() if p.ours == "backbone.embed.weight")
    common = weight_type(dtype, device, FLOATS.get(embedding.dtype, torch.float32))
    kinds = {"backbone": common}
    if dtype == "stored":
        for name, place in places.items():
            part = ".".join(place.ours.split(".")[:2])
            if not part.startswith("backbone.") and stored[name].dtype in FLOATS:
                kinds.setdefault(part, FLOATS[stored[name].dtype])
    return kinds


def file_types(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None, fixed: Collection[str]
) -> dict[str, torch.dtype]:
    """Type of each tensor in a file.

    Args:
        weights: what is written.
        dtype: type of floating tensors; None for their own.
        fixed: names that keep their own.
    """
    return {
        name: dtype if dtype and weight.is_floating_point() and name not in fixed else weight.dtype
        for name, weight in weights.items()
    }


def check_savable(model: MultimodalDLM) -> None:
    """Raises unless the backbone has the tensors of its spec, in full precision.

    Raises:
        ValueError: it does not; such a folder could not be loaded.
    """
    if is_quantized(model):
        raise ValueError(
            "quantized weights cannot be saved; load the checkpoint without quantize= and save "
            "that, or copy its folder"
        )
    with torch.device("meta"):
        expected = shapes(backbone(model.spec.transformer))
    has = shapes(model.backbone)
    differ = sorted(n for n in {*has, *expected} if has.get(n) != expected.get(n))
    if differ:
        raise ValueError(
            f"the backbone's {preview(differ)} do not match its spec; merge adapters such as "
            "LoRA, and save the model itself rather than its compiled form"
        )
