"""Base class of the checkpoint families: sizes, key table, special ids, conventions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from encoders.checks import AtLeast, AtMost, Checked, Count, shown
from mmdlm.backbones.config import TransformerConfig

LARGEST = 2**40  # of the numbers in a config.json
MOST_TOKENS = 2**20
"""Maximum length of an answer, for models without a context as well."""
Keys = dict[str, str | tuple[str, ...] | None]
"""Maps our tensor names to published ones; `{i}` is the layer. A tuple is concatenated along the
first axis (fused projections). `{e}`, in published names only, is the expert: our tensor has an
additional first axis [experts ...]. `name[0]` is the first entry of our tensor, such as a position
table [1 N E] that is published as [N E]; the entries together must fill it. Published names to
ignore map to None and may contain `*`: `{"model.vision_tower.*": None}`. A table lists every tensor
that any model of the family has; the spec determines which of them a model needs."""


@dataclass(frozen=True)
class Spec(Checked):
    """Everything about a model that is not a weight.

    Args:
        family: name of the family file.
        transformer: sizes and switches.
        mask_id: id of the mask token; None where nothing says which it is. Such a model has logits,
            and whatever fills in masks raises `unknown_mask`.
        eos_id: id that ends an answer; it also fills the positions after it.
        pad_id: id of padding.
        stop_ids: further ids that end an answer.
        shift: position i of the network scores token i + 1; the model realigns all its outputs.
        attention: "full", "prefix", "cascade", "block_causal" or "canvas", see `mmdlm.layout`.
        block_size: tokens per block of block-wise attention; None otherwise.
        template: chat template; "plain" for none.
        context: maximum number of tokens of prompt and answer together; None for no limit.
        noise: what stands at undecided positions of an answer: the mask token, or "uniform": random
            tokens that change in every step. There is no mask token then, and `mask_id` is the
            number of rows of the embedding, which marks undecided positions and is never embedded.
    """

    family: str
    transformer: TransformerConfig
    mask_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...] = ()
    shift: bool = False
    attention: Literal["full", "prefix", "cascade", "block_causal", "canvas"] = "full"
    block_size: Count | None = None
    template: str = "plain"
    context: Annotated[int, AtLeast(1), AtMost(2**40)] | None = None
    noise: Literal["mask", "uniform"] = "mask"

    def __post_init__(self) -> None:
        bound = self.transformer.rope and self.transformer.rope.constant_up_to
        if bound and (self.context is None or self.context > bound):
            raise ValueError(
                f"context is {self.context}, expected at most {bound}: beyond it the rotary "
                f"frequencies depend on the length ({self.transformer.rope.rope_type}), and cached "
                "keys would have other ones"
            )
        vocab = self.transformer.vocab
        ids = {name: getattr(self, name) for name in ("mask_id", "eos_id", "pad_id")}
        if self.noise == "uniform":
            object.__setattr__(self, "mask_id", vocab)
            del ids["mask_id"]
            ids = {"mask_id": 0, **ids}
        wrong = [name for name, i in ids.items() if not is_id(i, vocab)]
        for name in wrong if self.mask_id is not None else wrong[1:]:
            raise ValueError(
                f"{name} is {ids[name]}, expected an id below the {vocab} rows of the "
                f"embedding; correct it in config.json, or give load({name}=...)"
            )
        if unknown := [i for i in self.stop_ids if not is_id(i, vocab)]:
            raise ValueError(
                f"stop_ids has {unknown}, expected ids below the {vocab} rows of the embedding; "
                "correct eos_token_id in config.json, or give load(stop_ids=...)"
            )
        super().__post_init__()

    def require_masks(self, what: str) -> None:
        """Checks that undecided tokens are masks.

        Args:
            what: what needs them, for the error.

        Raises:
            ValueError: the mask id is unknown, or the model has random tokens instead.
        """
        if self.mask_id is None:
            raise self.unknown_mask()
        if self.noise != "mask":
            raise ValueError(
                f"{what} needs a model with a mask token; this one has {self.noise} noise, random "
                "tokens in place of masks"
            )

    def unknown_mask(self) -> ValueError:
        """The error for filling in masks where `mask_id` is None."""
        return ValueError(
            "this model fills in masks, and no file of its folder gives the id of the mask token "
            "(mask_token_id in config.json, or mask_token of a tokenizer); give load(mask_id=...)"
        )

    @property
    def reach(self) -> int | None:
        """Context length extended by `theta_scale`; None for no limit.

        A context s times as long needs a rotary base s ** (d / (d - 2)) times as large, for a
        rotary width d (NTK-aware scaling, arXiv 2309.00071, section 3.1).
        """
        if self.context is None:
            return None
        return int(self.context * self.transformer.theta_scale**self._power)

    def fits(self, tokens: int) -> None:
        """Checks that `tokens` of prompt and answer together are within `reach`.

        `reach` is the theoretical limit; LongLLaDA (OpenMOSS/LongLLaDA) needed larger scales.

        Raises:
            ValueError: there are more tokens; the error names a `theta_scale` that is sufficient.
        """
        reach = self.reach
        if reach is not None and tokens > reach:
            scale = math.ceil(100 * (tokens / self.context) ** (1 / self._power)) / 100
            raise ValueError(
                f"{tokens} tokens of prompt and answer, but this model's context is {reach}; "
                "shorten the prompt or the answer, or extend the context: load(..., theta_scale="
                f"{scale} or more) scales the rotary base (NTK); LLaDA needed 4 for twice its "
                "context and 14 for four times"
            )

    @property
    def _power(self) -> float:
        width = self.transformer.rotary_width
        return (width - 2) / width if width > 2 else 1.0


class Family:
    """One published checkpoint layout; each file of this folder defines a subclass.

    Attributes:
        KEYS: our tensor names to the published ones.
        FLOAT32: suffixes of our tensor names that stay float32 in every dtype (router biases).
        TYPES: lower-case architectures and model types by which config.json names the family.
            Where config.json has one that some family lists, only such families are tried.
        ON_REQUEST: model types shared with other systems; read only with `family=`.
    """

    KEYS: ClassVar[Keys] = {}
    FLOAT32: ClassVar[tuple[str, ...]] = ()
    TYPES: ClassVar[tuple[str, ...]] = ()
    ON_REQUEST: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether a checkpoint with this config.json and these tensor names is of this family."""
        raise TypeError(f"{cls.__name__} does not define matches(config, names)")

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec of a checkpoint.

        Raises:
            ValueError: the config has a setting that no published checkpoint uses.
        """
        raise TypeError(f"{cls.__name__} does not define read(config, names)")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec; the inverse of `read`.

        Raises:
            ValueError: the published config.json cannot express the spec.
        """
        raise ValueError(
            f"{cls.__name__} checkpoints are read only; save in our own layout (checkpoint.save)"
        )


def is_id(value: Any, vocab: int) -> bool:
    """Whether a value is a token id of a vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab


def architecture(config: dict[str, Any]) -> str:
    """First entry of "architectures" in config.json, or ""."""
    return (config.get("architectures") or [""])[0]


def end_ids(value: int | list[int] | None) -> tuple[int | None, tuple[int, ...]]:
    """Splits an `eos_token_id` into the end id and further stop ids; None where it is empty."""
    first, *rest = (value or [None]) if isinstance(value, list) else [value]
    return first, tuple(rest)


def special(config: dict[str, Any], key: str, published: int, vocab: int) -> Any:
    """The id in config.json, else the published one; None where the vocabulary is smaller.

    Args:
        config: config.json.
        key: for example "mask_token_id"; null and an empty list count as absent.
        published: id in the published tokenizer.
        vocab: rows of the embedding.
    """
    if config.get(key) not in (None, []):
        return config[key]
    return published if published < vocab else None


def filled(family: str, defaults: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of absent keys, whose values are of the defaults' kinds.

    Args:
        family: name for the error.
        defaults: usual value of each key that is read; None for any kind.
        config: config.json.

    Raises:
        ValueError: a value is of another kind, or a number that is not finite. Null is of any.
    """
    full = defaults | config
    for key, usual in defaults.items():
        value = full[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or usual is None or key.endswith("token_id"):
            continue
        if isinstance(usual, bool):
            fits, kind = isinstance(value, bool), "true or false"
        elif isinstance(usual, int | float):
            fits, kind = is_number and abs(value) < LARGEST, "a number"
        else:
            fits, kind = isinstance(value, type(usual)), f"a {type(usual).__name__}"
        if not fits:
            raise ValueError(
                f"{family}: {key} is {shown(value)}, expected {kind} such as {usual!r}"
            )
    return full


def require(family: str, config: dict[str, Any], expected: dict[str, tuple[Any, ...]]) -> None:
    """Checks that each key has one of the values that published checkpoints use.

    Args:
        family: name for the error.
        config: config.json with the defaults of absent keys filled in.
        expected: supported values of each key.

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
    """Checks that each setting has the value that the family's config.json implies.

    Args:
        family: name for the error.
        switches: name to (value of the spec, value implied by the published config.json).

    Raises:
        ValueError: a setting differs.
    """
    wrong = {name: has for name, (has, implied) in switches.items() if has != implied}
    if wrong:
        raise ValueError(
            f"the published {family} config.json cannot express {wrong}; save in our own layout "
            "(checkpoint.save)"
        )
