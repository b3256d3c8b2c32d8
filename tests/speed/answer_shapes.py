"""Checkpoints of LaViDa at small sizes with random weights, and questions about images."""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmdlm.blueprint import build
from mmdlm.loading.keymap import locate, shapes
from mmdlm.systems.lavida import LaViDa
from tests.systems.llava_golden import with_tokenizer


@dataclass(frozen=True)
class AnswerShape:
    """Sizes of a checkpoint, of its images and answers.

    Args:
        name: name on the command line.
        width: of the language model.
        layers: of the language model.
        vocab: ids of the language model.
        tower: width of the vision tower.
        tower_layers: layers of the tower that are run.
        patch: side of a patch in pixels; 384 pixels in patches of 14 are 27x27.
        side: side of a view in pixels.
        image: (width, height) of the image in pixels.
        length: positions G of an answer, in one block; half as many steps.
        batch: number of questions about the image.
        again: ours keeps the features of the image from one round to the next.
    """

    name: str
    width: int = 512
    layers: int = 8
    vocab: int = 126_464
    tower: int = 384
    tower_layers: int = 6
    patch: int = 14
    side: int = 384
    image: tuple[int, int] = (640, 480)
    length: int = 32
    batch: int = 1
    again: bool = False

    @property
    def block(self) -> int:
        """Positions per block."""
        return self.length

    @property
    def steps(self) -> int:
        """For an answer: LaViDa's half of its tokens."""
        return self.length // 2

    @property
    def questions(self) -> list[str]:
        """Different questions of equal length."""
        return [f"What is shown in part {i} of this image?" for i in range(self.batch)]

    @property
    def ids(self) -> dict[str, int]:
        """Control tokens of the tokenizer, the last ids before the mask."""
        names = ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>")
        names = (*names, "<|eot_id|>", "<|mdm_mask|>")
        return {name: self.vocab - len(names) + i for i, name in enumerate(names)}

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json, as published."""
        side, ids = self.side, self.ids
        return {
            "architectures": ["LlavaLladaForMaskedDiffusion"],
            "model_type": "llava_llada",
            **{"d_model": self.width, "n_layers": self.layers, "n_heads": 8, "n_kv_heads": 8},
            **{"mlp_hidden_size": self.width * 11 // 4, "vocab_size": self.vocab},
            **{"embedding_size": self.vocab, "max_sequence_length": 4096, "rope": True},
            **{"rope_full_precision": True, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
            **{"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms"},
            **{"weight_tying": False, "mask_token_id": ids["<|mdm_mask|>"]},
            **dict.fromkeys(("eos_token_id", "pad_token_id"), ids["<|endoftext|>"]),
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [
                [a * side, b * side] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            ],
            **{"mm_hidden_size": self.tower, "mm_patch_merge_type": "spatial_unpad"},
            **{"mm_projector_type": "mlp2x_gelu", "mm_spatial_pool_mode": "bilinear"},
            "mm_vision_tower": "siglip",
            "vision_config": {
                **{"hidden_size": self.tower, "image_size": side, "patch_size": self.patch},
                **{"intermediate_size": 4 * self.tower, "num_attention_heads": 6},
                "num_hidden_layers": self.tower_layers + 1,
            },
        }


_SMALL = {"patch": 8, "side": 56, "image": (120, 90), "length": 16}
_SHAPES = (
    AnswerShape("lavida-tiny", 64, 2, 512, 48, 2, **_SMALL),
    AnswerShape("lavida-tiny-x2", 64, 2, 512, 48, 2, **_SMALL, batch=2),
    AnswerShape("lavida-tiny-again", 64, 2, 512, 48, 2, **_SMALL, again=True),
    AnswerShape("lavida", vocab=32_768),
    AnswerShape("lavida-again", vocab=32_768, again=True),
    AnswerShape("lavida-x3", vocab=32_768, batch=3),
    AnswerShape("lavidav126"),
    AnswerShape("lavidav126-again", again=True),
    AnswerShape("lavidav126-x3", batch=3),
)
SHAPES = {shape.name: shape for shape in _SHAPES}


def find(names: Items[str]) -> list[AnswerShape]:
    """Shapes by name.

    Raises:
        ValueError: there is no such shape.
    """
    for name in names:
        if name not in SHAPES:
            near = difflib.get_close_matches(name, SHAPES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no shape {name!r}; {hint}known: {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names]


def write(shape: AnswerShape, folder: Path, seed: int) -> Path:
    """A checkpoint folder and an image, image.png, in it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    blueprint = LaViDa.read(shape.config, set())
    with torch.device("meta"):
        made = build(blueprint)
    places = locate(shapes(made), LaViDa.keys(blueprint), made.spec.transformer)
    weights = {name: _drawn(name, tuple(place.shape), seed) for name, place in places.items()}
    weights["model.transformer.ff_out.weight"][made.spec.mask_id] = 0.0
    save_file(weights, folder / "model.safetensors")
    with_tokenizer(folder, shape.ids)
    wide, high = shape.image
    coarse = np.random.default_rng(seed).integers(0, 256, (high // 20, wide // 20, 3), np.uint8)
    image = Image.fromarray(coarse).resize(shape.image, Image.Resampling.BICUBIC)
    image.save(folder / "image.png")
    return folder


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A random weight of a published name, scaled as those of `tests.speed.shapes`."""
    if "norm" in name or "ln_f" in name or name.endswith("bias"):
        return torch.full(shape, float(name.endswith("weight")))
    stream = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(shape, generator=stream)
    if name.endswith(("wte.weight", "image_newline")):
        return drawn
    drawn *= drawn[0].numel() ** -0.5
    if name == "model.transformer.ff_out.weight":
        drawn *= 4.0
    elif name.endswith(("ff_out.weight", "attn_out.weight", "out_proj.weight", "fc2.weight")):
        drawn *= 0.5
    elif "q_proj" in name or "k_proj" in name:
        drawn *= 1.6
    return drawn
