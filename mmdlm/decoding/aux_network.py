"""Files of auxiliary networks (learned filters and policies)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mmdlm.atomic import replacing

ENTRY = "mmdlm"  # one entry, as several are written in an order that differs from run to run
Network = TypeVar("Network", bound=nn.Module)


def save(
    path: str | Path, kind: str, network: nn.Module, sizes: Mapping[str, Any], **notes: Any
) -> None:
    """Writes a network as safetensors that say what they are and how large.

    Args:
        path: file to write; its folder is made.
        kind: what the network is, which `load` asks for.
        network: its weights are written in float32.
        sizes: what is needed to build it again, in plain types.
        notes: anything a reader of the file may want to know, in plain types.
    """
    weights = {name: w.detach().float().cpu().clone() for name, w in network.state_dict().items()}
    said = {"kind": kind, "sizes": dict(sizes), "notes": notes}
    with replacing(path) as new:
        save_file(weights, new, {ENTRY: json.dumps(said)})


def load(path: str | Path, kind: str, build: type[Network]) -> Network:
    """The network of a file, in float32, for inference.

    Args:
        path: a file of `save`.
        kind: what it has to be.
        build: the class, which takes the sizes by name.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds something else, or lacks weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a safetensors file ({kind})")
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    if said.get("kind") != kind:
        raise ValueError(
            f"{path} holds: {said.get('kind', 'weights without a description')}; expected: {kind}"
        )
    with torch.device("meta"):  # draws no random numbers
        network = build(**said["sizes"])
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its description: {error}") from error
    return network.to(torch.float32).eval().requires_grad_(False)
