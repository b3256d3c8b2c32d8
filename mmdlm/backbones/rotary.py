"""Rotary position embedding (rotate-half form), and its settings in config.json.

The settings are read with the precedence of transformers 5. Scaled frequencies come from its
functions, so that they are equal to those of its models.

Source: huggingface/transformers: src/transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from encoders.checks import Above, AtLeast, Below, Checked, PositiveInt

FiniteFloat = Annotated[float, Above(0), Below(math.inf)]

THETA = 10_000.0
KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
# Keys without a default in transformers; "max_position_embeddings" is that of config.json.
REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True)
class RopeScaling(Checked):
    """Scaling of the rotary frequencies, under the names transformers gives the settings.

    Args:
        rope_type: method.
        factor: multiple of the trained context; longrope: None for the ratio of both lengths.
        original_max_position_embeddings: trained context (yarn, longrope, llama3).
        max_position_embeddings: context in config.json (dynamic, longrope).
        attention_factor: factor on cosines and sines (yarn, longrope); None for the method's.
        beta_fast: rotations above which yarn extrapolates.
        beta_slow: rotations below which yarn interpolates.
        mscale: numerator of yarn's attention factor.
        mscale_all_dim: denominator of yarn's attention factor.
        truncate: yarn rounds the bounds of its ramp.
        low_freq_factor: llama3: longer wavelengths are divided by `factor`.
        high_freq_factor: llama3: shorter wavelengths are kept.
        short_factor: longrope: divisor per frequency up to the trained context.
        long_factor: longrope: divisor per frequency beyond it.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: FiniteFloat | None = None
    original_max_position_embeddings: Annotated[int, AtLeast(2)] | None = None
    max_position_embeddings: PositiveInt | None = None
    attention_factor: FiniteFloat | None = None
    beta_fast: FiniteFloat | None = None
    beta_slow: FiniteFloat | None = None
    mscale: FiniteFloat | None = None
    mscale_all_dim: FiniteFloat | None = None
    truncate: bool | None = None
    low_freq_factor: FiniteFloat | None = None
    high_freq_factor: FiniteFloat | None = None
    short_factor: tuple[FiniteFloat, ...] | None = None
    long_factor: tuple[FiniteFloat, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lacks = [name for name in REQUIRED[self.rope_type] if getattr(self, name) is None]
        if lacks:
            raise ValueError(f"rotary scaling {self.rope_type!r} lacks {', '.join(lacks)}")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            smaller, larger = getattr(self, low), getattr(self, high)
            if smaller is not None and larger is not None and smaller >= larger:
                raise ValueError(f"{low} is {smaller}, expected less than {high}, {larger}")

    @property
    def constant_up_to(self) -> int | None:
        """Number of positions up to which the frequencies do not change; None if they never do."""
        if self.rope_type == "dynamic":
            return self.max_position_embeddings
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None

    def settings(self) -> dict[str, Any]:
        """The entry `rope_parameters` of config.json, without the base."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del given["max_position_embeddings"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value is not None
        }

    def frequencies(self, dim: int, base: float, length: int | None) -> tuple[Tensor, float]:
        """Frequencies float32 [dim / 2] on the CPU, and the factor on cosines and sines.

        Args:
            dim: channels of a head that are rotated.
            base: theta.
            length: number of positions where it exceeds `constant_up_to`, else None.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = SimpleNamespace(
            head_dim=dim,
            hidden_size=dim,
            num_attention_heads=1,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=self.settings() | {"rope_theta": base},
            standardize_rope_params=lambda: None,  # it is standard already
        )
        given = None if length is None else torch.tensor(length)
        return ROPE_INIT_FUNCTIONS[self.rope_type](config, torch.device("cpu"), seq_len=given)


class Rotary(nn.Module):
    """Cosines and sines of absolute positions for the rotated channels of a head.

    Args:
        dim: channels of a head that are rotated.
        base: theta; channel pair i rotates by position * base ** (-2 i / dim).
        scaling: how config.json scales these frequencies; None for not at all. Where they depend
            on the length, it is that of the longest batch row of a forward, as in transformers.
    """

    def __init__(self, dim: int, base: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        self.frequency: Tensor | None = None  # not a buffer: it would be cast with the weights
        self.factor = 1.0
        self.length: int | None = None

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 tensors [B 1 M dim] for positions [B M]: cosines, and sines for `rotate`.

        The sines of the first half are negated, as in rotate-half.
        """
        length = self._length(positions)
        is_known = self.frequency is not None and length == self.length
        if not is_known or self.frequency.device != positions.device:
            with torch.inference_mode(False):
                self._compute(positions.device, length)
        angles = positions[:, None, :, None].float() * self.frequency  # [B 1 M dim/2]
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _length(self, positions: Tensor) -> int | None:
        """Number of positions, where the frequencies depend on it."""
        bound = None if self.scaling is None else self.scaling.constant_up_to
        if bound is None or not positions.numel():
            return None
        length = int(positions.max()) + 1
        return length if length > bound else None

    def _compute(self, device: torch.device, length: int | None) -> None:
        """Sets the frequencies for a length, see `_length`."""
        self.length = length
        if self.scaling is not None:
            found, self.factor = self.scaling.frequencies(self.dim, self.base, length)
            self.frequency = found.to(device)
            return
        step = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        # In the published order of operations: base ** -x differs in the last bit, which shows
        # after thousands of positions.
        self.frequency = 1.0 / self.base ** (step / self.dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, float32: bool) -> Tensor:
    """Rotated queries or keys [B H M hd]; channels beyond the rotary width are not rotated."""
    dim = cos.shape[-1]
    rest = None
    if dim < x.shape[-1]:
        x, rest = x.split([dim, x.shape[-1] - dim], -1)
    head = x
    if x.dtype != torch.float32:
        if float32:
            head = x.float()
        else:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    low, high = head.chunk(2, -1)
    # In place where autograd allows it, to keep peak memory low for long prompts.
    head = (head * cos).add_(torch.cat([high, low], -1).mul_(sin)).to(x.dtype)
    return head if rest is None else torch.cat([head, rest], -1)


def read_rope(
    config: Mapping[str, Any], theta: float = THETA, rotary: float | None = None
) -> dict[str, Any]:
    """The fields `theta`, `rotary` and `rope` of `TransformerConfig`.

    `rope_scaling` replaces `rope_parameters`; within either, a value replaces the one beside it in
    config.json. Tables by layer type are read where all layers have the same.

    Args:
        config: config.json.
        theta: rotary base where config.json has none.
        rotary: the same for the rotated fraction of a head; None if the family has no such setting.

    Raises:
        ValueError: a value is not valid, or the scaling is not supported.
    """
    name, table, is_nested = _table(config)
    beside = {key: config[key] for key in ("rope_theta",) if config.get(key) is not None}
    if config.get("partial_rotary_factor") is not None:
        beside["partial_rotary_factor"] = config["partial_rotary_factor"]
    given = beside | {key: value for key, value in table.items() if value is not None}
    base = _number("rope_theta", given.get("rope_theta", theta), "theta")
    part = _number("partial_rotary_factor", given.get("partial_rotary_factor", rotary or 1.0))
    if part > 1 or (rotary is None and part != 1):
        raise ValueError(
            f"config.json: partial_rotary_factor is {part}, expected "
            f"{'1, as all channels are rotated' if rotary is None else 'at most 1'}"
        )
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return {"theta": base, "rotary": part, "rope": None}
    if kind not in KINDS:
        raise ValueError(
            f"config.json: rotary scaling {kind!r} in {name} is not supported, expected one of "
            f"default, {', '.join(KINDS)}; for a fixed NTK factor, load(theta_scale=...)"
        )
    length = config.get("max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3"):
        own = None if is_nested else config.get("original_max_position_embeddings")
        at = "original_max_position_embeddings"
        given[at] = given.get(at, length) if own is None else own
    if kind in ("dynamic", "longrope"):
        given["max_position_embeddings"] = length
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    fields = {key: value for key, value in given.items() if key in known}
    try:
        return {
            "theta": base,
            "rotary": part,
            "rope": RopeScaling(**{**fields, "rope_type": kind}),
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {name}: {error}; correct it") from error


def with_theta(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """A config.json whose rotary base is replaced wherever it may be."""
    changed = {**config, "rope_theta": theta}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(name), Mapping):
            changed[name] = _without_theta(config[name])
    return changed


def _without_theta(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of rotary settings, nested or not, without the base."""
    return {
        key: _without_theta(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if key != "rope_theta"
    }


def _table(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], bool]:
    """Name and entries of the table in force, and whether it was one by layer type."""
    for name in ("rope_scaling", "rope_parameters"):
        table = config.get(name)
        if not isinstance(table, Mapping | None):
            raise ValueError(f"config.json: {name} is {table!r}, expected an object or null")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = config.get(name) or {}
    if not any(isinstance(value, Mapping) for value in table.values()):
        return name, table, False
    kinds = dict.fromkeys(config.get("layer_types") or ("full_attention",))
    tables = [table.get(kind) for kind in kinds]
    if not isinstance(tables[0], Mapping) or any(each != tables[0] for each in tables):
        raise ValueError(
            f"config.json: {name} has entries for {', '.join(map(str, table))}, and the layers are "
            f"of types {', '.join(map(str, kinds))}; expected equal settings for all layers"
        )
    return name, tables[0], True


def _number(key: str, value: Any, override: str | None = None) -> float:
    """A finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        move = f", or give load({override}=...)" if override else ""
        raise ValueError(
            f"config.json: {key} is {value!r}, expected a finite number above 0; correct it{move}"
        )
    return float(value)
