"""Matrix products with weights that may also be held in the layout a CPU multiplies fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**18
"""Weights with fewer numbers are not packed: the call costs more than the product saves."""

MOST = 4
"""Packed copies per weight: of all its rows, and of the parts that were asked for last."""


class Packs(dict):
    """Packed copies of a weight by the rows they hold; a pickled or copied weight comes without."""

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        """Leaves out the copies, which oneDNN cannot write."""
        return Packs, ()


def pack(module: nn.Module) -> None:
    """Lets the large float32 weights of a module on a CPU be packed when they are next used.

    oneDNN's blocked layout makes products with few rows up to three times as fast and takes as much
    memory again. A copy is made at the first product in inference mode, and made anew after the
    weight was changed in place (by `load_state_dict`, `copy_`) or used with a gradient, as not
    every optimizer says that it changes weights; a change through `weight.data` goes unseen, call
    `pack` again after it. A deep copy of a module is not packed.
    """
    for weight in module.parameters():
        is_plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
        if is_plain and weight.ndim == 2 and weight.dtype == torch.float32:
            weight.packs = Packs()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice | None = None
) -> Tensor:
    """X @ weight.T + bias, [... N] for x [... K].

    Args:
        x: [... K].
        weight: [N K].
        bias: [N].
        rows: only these rows of weight and bias.
    """
    cut = weight if rows is None else weight[rows]
    if bias is not None and rows is not None:
        bias = bias[rows]
    if torch.compiler.is_compiling():
        return F.linear(x, cut, bias)
    packs = getattr(weight, "packs", None)
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    if packs and (is_trained or weight.device.type != "cpu"):
        packs.clear()  # fused optimizers change weights without a trace
    # Nor does a weight that was made in inference mode tell when it changes.
    if packs is None or cut.numel() < SMALLEST or not _takes(x) or weight.is_inference():
        return F.linear(x, cut, bias)
    key = None if rows is None else (rows.start, rows.stop)
    storage = weight.untyped_storage()
    now = (weight._version, weight.data_ptr(), storage._cdata)
    known, packed, _ = packs.get(key, (None, None, None))
    if known != now:
        packed = torch.ops.mkldnn._reorder_linear_weight(cut.detach())
        packs.pop(key, None)
        for old in list(packs)[: max(0, len(packs) + 1 - MOST)]:
            packs.pop(old, None)
        # The weak reference keeps the number of a storage from being given to another one, as it
        # else is when a module changes its type and back.
        packs[key] = now, packed, StorageWeakRef(storage)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _takes(x: Tensor) -> bool:
    """Whether a packed weight may be used: in inference only, as it has no gradient."""
    return (
        torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """`nn.Linear` whose weight may be packed."""

    def forward(self, x: Tensor) -> Tensor:
        """[... N] for x [... K]."""
        return linear(x, self.weight, self.bias)
