"""Weights split over processes: FSDP2 through Lightning's `ModelParallelStrategy`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from mmdlm.data.collate import Collated
from mmdlm.model import MultimodalDLM


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Splits the weights of each backbone block, and all others together.

    A process holds a whole block only while it computes it. Encoders and adapters are gathered at
    the start of a step, because a process whose batch lacks a modality does not call its encoder.

    Args:
        module: with a `model` and a method `losses`, which computes the forward pass; changed in
            place, unless it is split already.
        mesh: of the strategy.

    Raises:
        ValueError: the strategy also splits single layers (tensor parallelism).
    """
    if isinstance(module, FSDPModule):
        return
    if mesh["tensor_parallel"].size() != 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {mesh['tensor_parallel'].size()}, expected "
            f"1; give data_parallel_size: {mesh.size()} and tensor_parallel_size: 1"
        )
    replicas = mesh["data_parallel"]
    for block in module.model.backbone.blocks:
        fully_shard(block, mesh=replicas)
    fully_shard(module, mesh=replicas)
    register_fsdp_forward_method(module, "losses")


def zero_of_used(
    model: MultimodalDLM, batches: Iterable[Collated], module: LightningModule
) -> Tensor:
    """0, with a gradient of 0 for the parts of every modality that any process encodes.

    All processes must then reduce the gradients of the same parameters. Those of a modality that no
    process has get none, so that weight decay leaves them as they are.

    Args:
        model: with encoders and adapters by modality.
        batches: of this process.
        module: for communication.
    """
    kinds = sorted(model.encoders)
    mine = {item.kind for each in batches for row in each.packed.rows for item in row.items}
    flags = torch.tensor(
        [kind in mine for kind in kinds], device=module.device, dtype=torch.float32
    )
    used = module.all_gather(flags).reshape(-1, len(kinds)).amax(0).tolist() if kinds else []
    parts: list[nn.Module] = []
    for kind, is_used in zip(kinds, used, strict=True):
        parts += [model.encoders[kind], model.adapters[kind]] if is_used else []
    weights = [p for part in parts for p in part.parameters() if p.requires_grad]
    return 0 * sum((p.sum() for p in weights), torch.zeros((), device=module.device))


def add_missing(state: dict[str, Any], module: nn.Module) -> None:
    """Adds a fresh optimizer state for each parameter that was never trained, such as an encoder's.

    When a run is resumed, torch expects a state of every parameter.

    Args:
        state: "state" by name and "param_groups", changed in place.
        module: whose parameters are meant.
    """
    known: dict[str, dict[str, Any]] = state["state"]
    some = next(iter(known.values()), {})
    for group in state["param_groups"]:
        for name in set(group["params"]) - known.keys():
            like = module.get_parameter(name)
            known[name] = {
                key: torch.zeros_like(like if value.ndim else value)
                for key, value in some.items()
                if isinstance(value, Tensor)
            }
