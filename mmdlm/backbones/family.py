"""What a family of checkpoints says about itself: sizes, key table, special ids, conventions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from mmdlm.backbones.config import TransformerConfig

Keys = dict[str, str | tuple[str, ...] | None]
"""Our tensor name to the published one, `{i}` for the layer. A tuple is stacked along the first
axis (fused projections). `{e}` in published names only is an expert: our tensor has one more axis
in front, [experts ...], and each entry is filled as above. `name[0]` is the first entry of our
tensor, such as a position table [1 N E] that is published as [N E]; entries together must fill it.
Published names that are known and have no counterpart stand as keys with the value None and may
hold `*`: `{"model.vision_tower.*": None}`. One table names every tensor the family ever has; the
spec decides which of them a model has."""


@dataclass(frozen=True)
class Spec:
    """Everything about a model that is not a weight.

    Args:
        family: name of the family file.
        transformer: sizes and switches.
        mask_id: id of the mask token.
        eos_id: id that ends an answer; later positions hold it too.
        pad_id: id that stands in padding.
        stop_ids: further ids that end an answer.
        shift: the network's row i scores token i + 1; undone before anything leaves the model.
        attention: "full", "prefix", "cascade" or "block_causal", see `mmdlm.layout`.
        block_size: tokens per block where blocks matter.
        template: chat template, "plain" for none.
        context: most tokens of prompt and answer together the weights were trained for, None for
            no limit.
    """

    family: str
    transformer: TransformerConfig
    mask_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...] = ()
    shift: bool = False
    attention: str = "full"
    block_size: int | None = None
    template: str = "plain"
    context: int | None = None

    def __post_init__(self) -> None:
        vocab = self.transformer.vocab
        for name in ("mask_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < vocab:
                raise ValueError(
                    f"{name} is {value}, expected an id below the {vocab} rows of the "
                    "embedding; correct it in config.json"
                )

    @property
    def reach(self) -> int | None:
        """The context, stretched by `theta_scale`; None for no limit.

        s times as many tokens need the rotary base at s ** (d / (d - 2)) times its value, for a
        rotary width of d (NTK-aware scaling, arXiv 2309.00071, section 3.1).
        """
        if self.context is None:
            return None
        return int(self.context * self.transformer.theta_scale**self._power)

    def fits(self, tokens: int) -> None:
        """Raises unless so many tokens, prompt and answer together, are within reach.

        Reach is what the theory allows; LongLLaDA (OpenMOSS/LongLLaDA) needed larger scales.
        """
        reach = self.reach
        if reach is not None and tokens > reach:
            scale = math.ceil(100 * (tokens / self.context) ** (1 / self._power)) / 100
            raise ValueError(
                f"{tokens} tokens of prompt and answer, but this model's context is {reach}; "
                "shorten the prompt or the answer's length, or stretch it: load(..., theta_scale="
                f"{scale} or more) scales the rotary base (NTK); LLaDA took 4 for twice its "
                "context and 14 for four times"
            )

    @property
    def _power(self) -> float:
        width = int(self.transformer.head_width * self.transformer.rotary)
        return (width - 2) / width if width > 2 else 1.0


class Family:
    """One published layout. Subclasses are the family files of this folder.

    Attributes:
        KEYS: our names to the published ones.
        FLOAT32: ends of our names that stay float32 whatever the model's type (router biases).
        TYPES: lower-case architectures and model types by which config.json names the family.
            Where config.json has one that some family lists, only such families are tried.
        ON_REQUEST: model types that other systems use as well; read only with `family=`.
    """

    KEYS: ClassVar[Keys] = {}
    FLOAT32: ClassVar[tuple[str, ...]] = ()
    TYPES: ClassVar[tuple[str, ...]] = ()
    ON_REQUEST: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether a checkpoint with this config.json and these tensor names is of the family."""
        raise TypeError(f"{cls.__name__} does not define matches(config, names)")

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec of a checkpoint.

        Raises:
            ValueError: the config asks for something this family never published.
        """
        raise TypeError(f"{cls.__name__} does not define read(config, names)")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec; `read` takes it back.

        Raises:
            ValueError: the published config has no way to say what the spec asks for.
        """
        raise ValueError(
            f"{cls.__name__} checkpoints are read only; save in our own layout (checkpoint.save)"
        )


def architecture(config: dict[str, Any]) -> str:
    """First entry of "architectures", "" when config.json names none."""
    return (config.get("architectures") or [""])[0]


def end_ids(value: int | list[int]) -> tuple[int, tuple[int, ...]]:
    """The end id, and further ids that end an answer, of an `eos_token_id`."""
    first, *rest = value if isinstance(value, list) else [value]
    return first, tuple(rest)


def special(config: dict[str, Any], key: str, published: int, vocab: int) -> Any:
    """The id config.json gives, else the published one, or the last row where that is too high.

    Args:
        config: config.json.
        key: such as "mask_token_id"; null counts as absent.
        published: id in the published tokenizer.
        vocab: rows of the embedding.
    """
    if config.get(key) is not None:
        return config[key]
    return published if published < vocab else vocab - 1


def rotary_base(config: dict[str, Any], default: float) -> float:
    """The rotary base; transformers 5 re-saves it as `rope_parameters["rope_theta"]`.

    Raises:
        ValueError: the config asks for rotary scaling, which no family here was published with.
    """
    inside = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for table in (inside, scaling):
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"config.json: rotary scaling {kind!r} is not supported, expected none; "
                "set TransformerConfig.theta_scale for longer contexts"
            )
    theta = config.get("rope_theta")
    theta = inside.get("rope_theta") if theta is None else theta
    return float(default if theta is None else theta)


def require(family: str, config: dict[str, Any], expected: dict[str, tuple[Any, ...]]) -> None:
    """Raises unless each key, absent or not, has one of the values a family was published with.

    Args:
        family: name for the message.
        config: config.json with the defaults of absent keys filled in.
        expected: key to the values that are supported.

    Raises:
        ValueError: a key has another value.
    """
    wrong = {k: config.get(k) for k, allowed in expected.items() if config.get(k) not in allowed}
    if wrong:
        wanted = {k: expected[k][0] for k in wrong}
        raise ValueError(
            f"{family}: config.json has (or defaults to) {wrong}, expected {wanted}; "
            "no published checkpoint uses this and it is not supported"
        )


def expressible(family: str, switches: dict[str, tuple[Any, Any]]) -> None:
    """Raises unless each switch has the value its family's config.json takes for granted.

    Args:
        family: name for the message.
        switches: name to (value of the spec, value the published config implies).

    Raises:
        ValueError: a switch differs.
    """
    wrong = {name: has for name, (has, implied) in switches.items() if has != implied}
    if wrong:
        raise ValueError(
            f"the published {family} config cannot say {wrong}; save in our own layout instead "
            "(checkpoint.save)"
        )
