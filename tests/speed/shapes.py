"""Shapes for speed measurements: sizes of published models with random weights.

They reproduce a measurement anywhere, offline and without checkpoints.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.linear import pack
from mmdlm.model import MultimodalDLM
from tests.speed.plain import Schedule

ACTION_IDS = 256
CHUNK = 8
"""Actions per query: 8 x 7 numbers are 56 tokens."""

Size = tuple[int, int, int, int, int]


def _llada(width: int, layers: int, heads: int, inner: int, vocab: int) -> TransformerConfig:
    """A LLaDA of the given sizes; base and eps of GSAI-ML/LLaDA-8B-Base: config.json."""
    return TransformerConfig(
        *(width, layers, heads, inner, vocab), eps=1e-5, theta=500_000.0, rotary_float32=True
    )


TINY = _llada(128, 2, 4, 352, 1024)
SMALL = _llada(512, 8, 8, 1408, 32_768)
WIDE = _llada(512, 8, 8, 1408, 126_464)
LLADA_8B = _llada(4096, 32, 32, 12_288, 126_464)
# Dream-org/Dream-v0-Base-7B: config.json. Its shift does not change the sizes and is omitted.
DREAM_7B = TransformerConfig(
    *(3584, 28, 28, 18_944, 152_064), kv_heads=4, qkv_bias=True, theta=1_000_000.0
)


@dataclass(frozen=True)
class Shape:
    """One measurement: model sizes, prompts and schedule.

    Args:
        name: name on the command line.
        transformer: sizes of the model.
        prompts: length of each row's prompt.
        length: positions G of the answer.
        block: positions per block.
        steps: for the whole answer.
        threshold: probability at which tokens commit, instead of steps.
        limited: only `ACTION_IDS` ids may be committed.
        device: intended device; a GPU shape takes hours on a CPU.
    """

    name: str
    transformer: TransformerConfig
    prompts: tuple[int, ...]
    length: int
    block: int
    steps: int | None = None
    threshold: float | None = None
    limited: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def columns(self) -> slice | None:
        """Ids that may be committed, None for all."""
        first = self.transformer.vocab // 2
        return slice(first, first + ACTION_IDS) if self.limited else None

    @property
    def schedule(self) -> Schedule:
        """The decoding schedule."""
        return Schedule(self.length, self.block, self.steps, self.threshold, self.columns)

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return len(self.prompts)


def _decodes() -> Items[Shape]:
    """Captions and answers."""
    shapes = [
        Shape("tiny", TINY, (32,), 32, 16, 8),
        Shape("cap256", SMALL, (256,), 64, 32, 16),
        Shape("cap768", SMALL, (768,), 64, 32, 8),
        Shape("cap256v126", WIDE, (256,), 64, 32, 8),
        Shape("thr256", SMALL, (256,), 64, 32, threshold=0.2),
        Shape("bat4", SMALL, (128,) * 4, 64, 32, 8),
        Shape("bat4r", SMALL, (64, 96, 160, 192), 64, 32, 8),
    ]
    for name, prompt in {"499": 499, "793": 793, "3709": 3709, "3709-keep25": 975}.items():
        for rows, end in ((1, ""), (8, "-b8")) if "keep" not in name else ((1, ""),):
            prompts = (prompt,) * rows
            shapes.append(
                Shape(f"llada8b-{name}{end}", LLADA_8B, prompts, 64, 32, 16, device="cuda")
            )
    return shapes


def _actions() -> Items[Shape]:
    """Chunks of robot actions."""
    shapes = []
    for prompt in (178, 562):
        for steps in (1, 4):
            for is_limited, end in ((False, ""), (True, "-ids256")):
                name = f"act{prompt}-{steps}{end}"
                shapes.append(Shape(name, SMALL, (prompt,), 56, 56, steps, limited=is_limited))
    for prompt in (178, 562):
        for steps in (1, 4):
            for rows, end in ((1, ""), (16, "-b16")):
                sizes = ((prompt,) * rows, 58, 58, steps)
                name = f"dream7b-{prompt}-{steps}{end}"
                shapes.append(Shape(name, DREAM_7B, *sizes, limited=True, device="cuda"))
    return shapes


SHAPES = {shape.name: shape for shape in (*_decodes(), *_actions())}


def find(names: Items[str]) -> list[Shape]:
    """Shapes by name; a name with variants, such as act178, selects all of them.

    Raises:
        ValueError: there is no such shape.
    """
    found: dict[str, Shape] = {}
    for name in names:
        variants = [n for n in SHAPES if n.startswith(f"{name}-")]
        variants = [name] if name in SHAPES else variants
        if not variants:
            near = difflib.get_close_matches(name, SHAPES, 2, 0.6)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"there is no shape {name!r}; {hint}known: {', '.join(SHAPES)}")
        found |= {variant: SHAPES[variant] for variant in variants}
    if not found:
        raise ValueError(f"no shape is named; known: {', '.join(SHAPES)}")
    return list(found.values())


def synthetic(
    config: TransformerConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MultimodalDLM:
    """A text model with full attention and random weights, in eval mode.

    The scales make attention differ between masked positions, keep the best probability of most
    positions below 0.5 and far from the second, so that there are no ties, and never predict the
    mask. Each tensor has a separate random stream on its device: CPU and GPU weights differ.

    Args:
        config: sizes.
        seed: seed of the weights.
        device: device of the model.
        dtype: dtype of the weights, drawn in float32 and cast.
    """
    spec = Spec("llada", config, mask_id=config.vocab - 1, eos_id=0, pad_id=1)
    with torch.device("meta"):
        model = MultimodalDLM(spec)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.backbone.named_parameters():
        _draw(name, weight, spec, seed)
    pack(model.backbone)
    return model


@torch.no_grad()
def _draw(name: str, weight: Tensor, spec: Spec, seed: int) -> None:
    """Fills one tensor."""
    if weight.ndim == 1:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    config = spec.transformer
    scale = 1.0 if name == "embed.weight" else weight.shape[1] ** -0.5
    if name.endswith(("attn.o.weight", "mlp.down.weight")):
        scale *= 0.5
    if name == "out.weight":
        scale *= 4.0
    stream = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(weight.shape, generator=stream, device=weight.device) * scale
    if name.endswith("qkv.weight"):
        drawn[: (config.heads + config.keys_heads) * config.head_width] *= 1.6
    if name == "out.weight":
        drawn[spec.mask_id] = 0.0
    weight.copy_(drawn)


def prompts(shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """One random prompt [1 P] per row, equal on every device."""
    stream = torch.Generator().manual_seed(seed)
    high = shape.transformer.vocab - 1
    return [
        torch.randint(2, high, (1, length), generator=stream).to(device) for length in shape.prompts
    ]


def padded(rows: Items[Tensor], pad: int) -> tuple[Tensor, Tensor | None]:
    """Prompts of several lengths as one batch [B P], padded on the left, and its mask [B P].

    The mask is None where nothing is padded.
    """
    longest = max(row.shape[1] for row in rows)
    tokens = torch.full((len(rows), longest), pad, device=rows[0].device)
    for i, row in enumerate(rows):
        tokens[i, longest - row.shape[1] :] = row[0]
    lengths = torch.tensor([row.shape[1] for row in rows], device=tokens.device)
    mask = torch.arange(longest, device=tokens.device) >= longest - lengths[:, None]
    return tokens, None if bool(mask.all()) else mask
