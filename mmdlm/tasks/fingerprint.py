"""What determines a result besides its input, to recognise it in a later process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.blueprint import describe
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import Settings

SAMPLES = 64  # values of each tensor


def made_with(
    model: MultimodalDLM, settings: Settings | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Model, prompt, length, decoding and other options as plain values, for `Results`.

    Args:
        model: model.
        settings: of the task; None for tasks without decoding.
        options: other options that change results; None stands for a default.
    """
    made: dict[str, Any] = {"model": fingerprint(model)}
    if model.pruner is not None:
        made["prune"] = repr(model.pruner)
    if settings is not None:
        # The address of an object, which differs between processes, does not describe it.
        decoding = re.sub(" at 0x[0-9a-f]+", "", ", ".join(map(repr, settings.strategies)))
        made |= {"prompt": settings.prompt, "length": settings.length, "decoding": decoding}
    return {name: value for name, value in {**made, **options}.items() if value is not None}


def fingerprint(model: MultimodalDLM) -> str:
    """Name of a model's family or system, and 16 hex digits of a digest.

    The digest is of the sizes, preprocessing and template, and of up to 64 values of each weight
    tensor at fixed positions. Reading all weights of a large model would take longer than a small
    job. Default prompts and strategies do not count.
    """
    found = hashlib.blake2b(digest_size=8)
    plan = describe(model).to_dict()
    plan.pop("tasks")
    found.update(json.dumps(plan, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _plain(weight):
            values = part.reshape(-1)
            count = min(SAMPLES, len(values))
            at = torch.linspace(0, len(values) - 1, count, dtype=torch.float64).long()
            sample = values[at.to(values.device)].cpu()
            found.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{model.system or model.spec.family} {found.hexdigest()}"


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a quantized weight, or the weight itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain(getattr(weight, name))
