"""Tiny folders of the systems in LLaVA's layout, with random weights and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmdlm.blueprint import build
from mmdlm.loading.keymap import locate, shapes
from mmdlm.systems.lavida import LaViDa
from mmdlm.systems.lavida_dream import LaViDaDream
from mmdlm.systems.llada_v import LLaDAV
from mmdlm.systems.sdar_vl import SDARVL
from mmdlm.systems.system import System
from tests.systems import test_lavida, test_lavida_dream, test_llada_v, test_sdar_vl
from tests.systems.llava_golden import with_tokenizer

SMALL = {"vision_config": {**test_lavida.SIZES, "patch_size": 9, "num_hidden_layers": 2}}
"""Views of 6x6 tokens."""


def folder_of(
    system: type[System], config: dict[str, Any], folder: Path, control: dict[str, int]
) -> Path:
    """A published folder of this configuration, with random weights and a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    blueprint = system.read(config, set())
    made = build(blueprint)
    places = locate(shapes(made), system.keys(blueprint), made.spec.transformer)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(place.shape, generator=generator) * 0.1 + float("norm" in name)
        for name, place in places.items()
    }
    save_file(weights, folder / "model.safetensors")
    return with_tokenizer(folder, control)


def lavida(folder: Path, **changes: Any) -> Path:
    config = {**test_lavida.flat(), **SMALL, **changes}
    return folder_of(LaViDa, config, folder, test_lavida.CONTROL)


def lavida_dream(folder: Path) -> Path:
    config = {**test_lavida_dream.GOLDEN.flat(), **SMALL}
    return folder_of(LaViDaDream, config, folder, test_lavida_dream.CONTROL)


def llada_v(folder: Path) -> Path:
    return folder_of(LLaDAV, {**test_llada_v.GOLDEN.flat(), **SMALL}, folder, test_llada_v.CONTROL)


def sdar_vl(folder: Path) -> Path:
    config = test_sdar_vl.config_of(test_sdar_vl.reference(-1))
    return folder_of(SDARVL, config, folder, test_sdar_vl.CONTROL)
