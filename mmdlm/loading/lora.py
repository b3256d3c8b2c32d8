"""LoRA adapters in peft's format: a folder that peft and `mmdlm.load` open.

adapter_config.json, adapter_model.safetensors   as peft writes them
tokenizer.json and its files                     when the vocabulary grew
decoding.yaml                                    when the adapter has its own defaults
statistics.json                                  of a policy, those of the data it was trained on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mmdlm.files import read_json
from mmdlm.loading.keymap import FLOATS
from mmdlm.loading.own import DECODING, STATISTICS, read_tasks
from mmdlm.loading.shards import copy, index, write_json
from mmdlm.text import Tokenizer

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft writes in front of the names of a model's modules."""

NAME = "default"
"""Peft's name of the only adapter of a model."""

# Settings of peft that change what the tensors mean, with the values that are read.
READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("target_parameters", "layer_replication", "alora_invocation_tokens", "use_bdlora"),
            *("arrow_config", "kasa_config", "velora_config", "monteclora_config"),
        ),
        (None,),
    ),
}


@dataclass(frozen=True)
class LoraAdapter:
    """What an adapter folder holds.

    Args:
        settings: adapter_config.json.
        tensors: by peft's names, without `PREFIX`.
        tokenizer: None where the folder has none.
        tasks: default prompts, lengths and strategies by task; empty for those of the model.
        outputs: see `mmdlm.blueprint.Blueprint`; empty for those of the model.
        source: the folder, for errors.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: Path | str = "the adapter"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The adapter in a folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds a whole model, not an adapter; give it as the model itself"
            )
        settings = read_json(folder / CONFIG)
        if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
            raise FileNotFoundError(
                f"{folder} holds adapter_model.bin, a pickle, which is not read; load it with peft "
                f"and save it again as {WEIGHTS}"
            )
        stored = index(folder / WEIGHTS)
        if wrong := [name for name, each in stored.items() if each.dtype not in FLOATS]:
            raise ValueError(
                f"{folder / WEIGHTS}: {wrong[0]} is {stored[wrong[0]].dtype}, expected "
                f"{', '.join(FLOATS)}"
            )
        values = {
            n: torch.empty(each.shape, dtype=FLOATS[each.dtype]) for n, each in stored.items()
        }
        copy(stored, values)
        named = {name.removeprefix(PREFIX): tensor for name, tensor in values.items()}
        file = folder / DECODING
        tasks = read_tasks(file) if file.is_file() else {}
        file = folder / STATISTICS
        outputs = read_json(file) if file.is_file() else {}
        return cls(settings, named, Tokenizer.from_folder(folder), tasks, outputs, folder)

    @classmethod
    def trained(
        cls,
        settings: Mapping[str, Any],
        named: Mapping[str, Tensor],
        model: MultimodalDLM,
    ) -> Self:
        """The adapter of a training; it has a tokenizer if rows of the embedding were trained.

        Args:
            settings: adapter_config.json.
            named: tensors by peft's names, see `exported`.
            model: it has the tokenizer, defaults and statistics.
        """
        embeds = any(name.startswith("backbone.embed.") for name in named)
        tokenizer = model.tokenizer if embeds else None
        outputs = {} if model.robot is None else {"actions": model.robot.to_dict()}
        return cls(settings, named, tokenizer, model.preset, outputs)

    def write(self, folder: Path) -> None:
        """Writes the adapter as a folder that peft and `mmdlm.load` open.

        Args:
            folder: existing folder.
        """
        write_json(folder / CONFIG, dict(self.settings))
        named = {PREFIX + name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # save_file makes files that only their owner can read
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        if self.tasks:
            text = yaml.safe_dump(self.tasks, sort_keys=False)
            (folder / DECODING).write_text(text, encoding="utf-8")
        if self.outputs:
            write_json(folder / STATISTICS, self.outputs)

    def set_outputs(self, model: MultimodalDLM) -> None:
        """Gives a model the adapter's statistics of actions and states, if it has any.

        Raises:
            ValueError: they are of other action tokens than those of the model.
        """
        if "actions" not in self.outputs:
            return
        from adapters.robot import Robot

        robot = Robot.from_dict(self.outputs["actions"])
        if model.robot is None or robot.to_dict()["bins"] != model.robot.to_dict()["bins"]:
            raise ValueError(f"{STATISTICS} has other action tokens than the model")
        model.robot = robot

    def check(self) -> None:
        """Raises ValueError for settings that give the tensors a meaning that is not supported."""
        for name, allowed in READ.items():
            value = self.settings.get(name)
            if value not in allowed and value != []:
                more = (
                    "; such a start changes the base weights too: convert it to plain LoRA "
                    "(path_initial_model_for_weight_conversion of peft's save_pretrained)"
                    if name == "init_lora_weights"
                    else ""
                )
                raise ValueError(f"{CONFIG} has {name}={value!r}, expected {allowed[-1]!r}{more}")


def exported(name: str) -> str:
    """Peft's name in a file of a parameter in a model, without `PREFIX`."""
    name = name.replace(f".{NAME}.", ".").removesuffix(f".{NAME}")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name
