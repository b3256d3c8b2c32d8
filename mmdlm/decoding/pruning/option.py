"""The option `prune`: how a model reduces the tokens of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from adapters.pruner import Pruner
from encoders.attention import require_attention
from mmdlm import discover, recipe
from mmdlm.decoding import preset
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM

Prune = str | Mapping[str, Any] | Pruner | Strategy | None
"""What `read` takes."""
RANKS = ("attention", "raters", "random")
"""Names by which text asks for `PruneMedia`."""


def read(given: Prune) -> Pruner | Strategy | None:
    """The method an option names.

    Args:
        given: "METHOD@KEEP" with a share ("divprune@0.25", "divprune@25%") or a number of tokens
            ("visionzip@64"); methods are the pruners of `adapters`, which act before the language
            model, and the ranks of `PruneMedia`, which acts inside it ("attention@0.35"). Another
            number is given by its name ("tome-tower@r=8"). Or the arguments of `PruneMedia` as a
            table, {"rank": "attention", "layer": 16, "step": 1, "keep": 0.35}, or a recipe
            `{class_path, init_args}` of either kind; a table may be YAML text. Or an instance.
            None: nothing is dropped.

    Raises:
        ValueError: there is no such method, or it does not take these arguments.
    """
    if given is None or isinstance(given, Pruner | Strategy):
        return given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise ValueError(f"prune is {given!r}, which is not a YAML table: {error}") from error
    if isinstance(given, Mapping):
        if "class_path" not in given:
            return _made(PruneMedia, given)
        if str(given["class_path"]).startswith("adapters."):
            return recipe.build(given, ["adapters"], Pruner)
        return preset.strategy(given)
    return _of_text(str(given))


def methods() -> list[str]:
    """Names that "METHOD@KEEP" may have."""
    pruners = (name.removeprefix("prune_") for name in discover.names("adapters", Pruner))
    return [*sorted(pruners), *RANKS]


def apply(model: MultimodalDLM, given: Prune) -> None:
    """Lets a model prune from now on, in every task.

    Args:
        model: changed in place.
        given: see `read`.

    Raises:
        ValueError: see `read`; or the model takes no images, reads them as token ids, or has an
            encoder or adapter that the method does not support.
    """
    method = read(given)
    if method is not None:
        model.processor.require("image")
        if model.adapters["image"].gives_ids:
            raise ValueError(
                f"prune is {given!r}, but this model reads images as the token ids of an image "
                "tokenizer, not as embeddings, and cannot prune them"
            )
        if isinstance(method, Pruner) and method.needs_attention:
            require_attention(model.encoders["image"])
        if isinstance(method, Pruner) and method.in_tower:
            _check_tower(model, method)
    model.pruner = method if isinstance(method, Pruner) else None
    model.strategies = (method,) if isinstance(method, Strategy) else ()


def _check_tower(model: MultimodalDLM, method: Pruner) -> None:
    """Raises ValueError unless tokens of images can be merged inside the tower."""
    name, encoder, adapter = type(method).__name__, model.encoders["image"], model.adapters["image"]
    if not encoder.can_merge:
        raise ValueError(
            f"prune: {name} needs a vision transformer without class token, such as SigLIP; "
            f"{type(encoder).__name__} cannot merge tokens between its blocks; use tome, which "
            "merges them after the adapter"
        )
    if adapter.needs_grid:
        raise ValueError(
            f"prune: with {name} the tokens of an image are not a grid any more, which "
            f"{type(adapter).__name__} needs; use tome, which merges them after the adapter"
        )


def _of_text(given: str) -> Pruner | Strategy:
    """The method of "METHOD@KEEP" or "METHOD@NAME=NUMBER"."""
    name, at, rest = given.partition("@")
    option, equals, value = rest.rpartition("=")
    option = option if equals else "keep"
    options = {option: _number(given, value)} if at else {}
    if name in RANKS:
        kind, options = PruneMedia, {"rank": name, **options}
    else:
        try:
            kind = discover.find("adapters", name, Pruner)
        except ValueError as error:
            known = ", ".join(methods())
            raise ValueError(
                f"prune is {given!r}; expected METHOD@KEEP with one of {known}"
            ) from error
    numbers = [field.name for field in fields(kind)]
    if option not in numbers:
        raise ValueError(
            f"prune is {given!r}, but {kind.__name__} has no {option!r}, only {', '.join(numbers)}"
        )
    return kind(**options)


def _made(kind: type, given: Mapping[str, Any]) -> Any:
    """A strategy of a table of arguments."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return preset.strategy({"class_path": path, "init_args": dict(given)})


def _number(given: str, keep: str) -> float | int:
    """What follows the "@" or "=": a share or a number of tokens."""
    try:
        if keep.endswith("%"):
            return float(keep[:-1]) / 100
        return float(keep) if "." in keep or "e" in keep else int(keep)
    except ValueError:
        raise ValueError(
            f"prune is {given!r}; expected a share such as 0.25 or 25%, or a number of tokens, "
            "after the @"
        ) from None
