"""Weights of 8 or 4 bits: less memory for the same model, at some loss of precision.

The linear layers of the blocks are quantized; embedding, head and norms keep their type, as do
activations. Without torch.compile the quantized weights are converted back to the activations'
type in each forward, so this saves memory, not time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KINDS = ("int8", "int4")
GROUP = 32  # weights that share a scale in int4; the smallest, hence most precise, torchao has


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises unless weights can be quantized in this way here; call it before they are read.

    Args:
        kind: "int8" or "int4".
        device: where the weights are.
        dtype: type of the model.

    Raises:
        ValueError: there is no such kind, or not for this device and type.
        ImportError: torchao is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}, expected {' or '.join(map(repr, KINDS))}, or None")
    _config(kind, device, dtype)


def quantize(module: nn.Module, kind: str) -> None:
    """Quantizes the linear layers inside a module, in place.

    Args:
        module: a block with its weights in place.
        kind: see `check`.

    Raises:
        ValueError: a layer cannot be split into groups.
    """
    from torchao.quantization import quantize_

    layers = {n: part for n, part in module.named_modules() if isinstance(part, nn.Linear)}
    for name, layer in layers.items():
        if kind == "int4" and layer.in_features % GROUP:
            raise ValueError(
                f"quantize='int4': {name} has {layer.in_features} inputs, which is not a multiple "
                f"of {GROUP}; use int8"
            )
        quantize_(layer, _config(kind, layer.weight.device, layer.weight.dtype))


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight of a module is quantized."""
    return any(type(weight) not in (nn.Parameter, torch.Tensor) for weight in module.parameters())


def _config(kind: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The torchao configuration of a kind."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(f'quantize={kind!r} needs torchao: pip install "mmdlm[quant]"') from error
    # set_inductor_config would change the precision of float32 products of the whole process.
    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    if device.type == "cuda" and dtype == torch.bfloat16:
        return Int4WeightOnlyConfig(
            group_size=GROUP,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    raise ValueError(
        f"quantize='int4' runs on a CPU, or on a GPU in bfloat16, not on {device.type} in "
        f"{str(dtype).removeprefix('torch.')}; give dtype='bfloat16', or use int8"
    )
