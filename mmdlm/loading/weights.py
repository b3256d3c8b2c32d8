"""Weights from files into a model, part by part, and out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mmdlm.backbones.transformer import Transformer
from mmdlm.files import preview
from mmdlm.loading.keymap import FLOATS, Places, allocate, shapes, views
from mmdlm.loading.placement import parts, spread, weight_type
from mmdlm.loading.quantize import check as check_quantize
from mmdlm.loading.quantize import is_quantized
from mmdlm.loading.quantize import quantize as quantize_block
from mmdlm.loading.shards import Stored, copy
from mmdlm.model import MultimodalDLM


def fill(
    model: MultimodalDLM,
    stored: Mapping[str, Stored],
    places: Places,
    over: list[torch.device],
    dtype: str | torch.dtype,
    kind: str | None = None,
    kept: tuple[str, ...] = (),
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
            allocate(part, over[0], own)
            part.to(over[0], own)  # what was not on the meta device
    where = spread(model.backbone, over)
    for name, part in parts(model.backbone).items():
        allocate(part, where[name], kinds["backbone"], kept, name)
        inside = {n: p for n, p in places.items() if p.ours.startswith(f"backbone.{name}.")}
        copy(stored, views(model, inside))
        if kind is not None and name.startswith("blocks."):
            quantize_block(part, kind)
    rest = {n: p for n, p in places.items() if not p.ours.startswith("backbone.")}
    copy(stored, views(model, rest))


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
        expected = shapes(Transformer(model.spec.transformer))
    has = shapes(model.backbone)
    differ = sorted(n for n in {*has, *expected} if has.get(n) != expected.get(n))
    if differ:
        raise ValueError(
            f"the backbone's {preview(differ)} do not match its spec; merge adapters such as "
            "LoRA, and save the model itself rather than its compiled form"
        )
