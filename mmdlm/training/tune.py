"""Which parameters are trained, and how fast: freezing and learning rates by name pattern.

    tune:
      "encoders.*": frozen
      "backbone.*": {lr: 1.0e-5}
      "*.norm.weight": {lr: 1.0e-4, weight_decay: 0.0}

    tune:
      "*": frozen
      "backbone.blocks.*": {lora: {rank: 8, alpha: 16}, lr: 1.0e-3}

A pattern is compared with the whole name of a parameter in the model, such as
`encoders.image.blocks.0.norm1.weight`; `*` matches any text, dots included. If several patterns
match a parameter, the last one decides about it alone: nothing is merged. Parameters that no
pattern matches are trained with the settings of the optimizer.

With `lora`, the matched parameters are frozen, and the linear layers among them get low-rank
adapters, which are trained instead (`mmdlm.training.lora`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Annotated, Any, Literal

from torch import nn

from encoders.checks import AtLeast, Below, Checked, Count, NonNegativeFloat, PositiveFloat

FROZEN = "frozen"
OPTIONAL = ("encoders.*", "adapters.*")
"""Patterns that may match nothing: a text model has no such parts."""
DEFAULT = "default"
"""Name of the group of parameters that no pattern matches."""


@dataclass(frozen=True)
class Lora(Checked):
    """Low-rank adapters of linear layers (LoRA, arXiv 2106.09685), made by peft.

    The head of the backbone gets none, as with peft's "all-linear".

    Args:
        rank: of the product that is added to a weight.
        alpha: the product is scaled by alpha / rank.
        dropout: share of inputs of the product that are set to zero in training.
        dora: also train the length of each row of the sum (DoRA, arXiv 2402.09353).
        rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: Count = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True)
class Rate(Checked):
    """How the parameters of a pattern are trained.

    Args:
        lr: peak learning rate; None for the optimizer's.
        weight_decay: weight decay of the matrices among them; None for the optimizer's.
        lora: train low-rank adapters of the linear layers among them, not the parameters; None to
            train the parameters.
    """

    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    lora: Lora | None = None


Rule = Literal["frozen"] | Rate


def assign(names: Iterable[str], tune: Mapping[str, Rule]) -> dict[str, str]:
    """The pattern that decides about each parameter, `DEFAULT` where none matches.

    Args:
        names: names of parameters.
        tune: rules by pattern; the last pattern that matches a name decides.

    Raises:
        ValueError: a pattern matches no name (except those of `OPTIONAL`), or only names that later
            patterns decide about; or a rule is neither "frozen" nor a `Rate`.
    """
    names = list(names)
    result, absent = dict.fromkeys(names, DEFAULT), set()
    for pattern, rule in tune.items():
        if rule != FROZEN and not isinstance(rule, Rate):
            raise ValueError(
                f"tune: {pattern!r} is {rule!r}, expected 'frozen' or lr, weight_decay and lora"
            )
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched and pattern in OPTIONAL:
            absent.add(pattern)
        elif not matched:
            near = difflib.get_close_matches(pattern.rstrip("*."), _prefixes(names), 1, 0.5)
            hint = f"did you mean '{near[0]}.*'?" if near else f"expected, e.g., {names[0]!r}"
            raise ValueError(f"tune: {pattern!r} matches no parameter of the model; {hint}")
        result.update(dict.fromkeys(matched, pattern))
    if unused := [p for p in tune if p not in result.values() and p not in absent]:
        raise ValueError(
            f"tune: {unused[0]!r} has no effect, as later patterns match the same parameters; the "
            "last match decides, so write general patterns first"
        )
    return result


def freeze(model: nn.Module, tune: Mapping[str, Rule]) -> None:
    """Excludes from training what the rules freeze, or train by LoRA.

    Args:
        model: its parameters are matched by name.
        tune: rules by pattern, see `assign`.

    Raises:
        ValueError: see `assign`; or nothing is left to train.
    """
    patterns = assign((name for name, _ in model.named_parameters()), tune)
    for name, parameter in model.named_parameters():
        if lora_of(tune.get(patterns[name])) or tune.get(patterns[name]) == FROZEN:
            parameter.requires_grad_(False)
    if not any(map(lora_of, tune.values())) and not any(
        parameter.requires_grad for parameter in model.parameters()
    ):
        raise ValueError(f"tune: {list(tune)} freeze every parameter; nothing is left to train")


def lora_of(rule: Rule | None) -> Lora | None:
    """The low-rank adapters that a rule asks for, if it does."""
    return rule.lora if isinstance(rule, Rate) else None


def original(name: str) -> str:
    """Name of the weight that a parameter of peft's is or changes; any other name as it is.

    Args:
        name: for example `blocks.0.attn.o.lora_A.default.weight` or
            `blocks.0.attn.o.base_layer.weight`, which both give `blocks.0.attn.o.weight`.
    """
    name = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
    module, found, _ = re.match(r"(.*?)(\.lora_|\.trainable_tokens_|$)(.*)", name).groups()
    return f"{module}.weight" if found else name


def set_frozen_to_eval(model: nn.Module) -> None:
    """Puts every module all of whose parameters are frozen into eval mode (no dropout)."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def groups(
    model: nn.Module,
    tune: Mapping[str, Rule],
    lr: float | None,
    weight_decay: float | None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; frozen parameters are left out.

    Each pattern gives up to two: "<pattern>" with the matrices, and "<pattern> (no decay)" with
    vectors and scalars (norms, biases), whose weight decay is 0. With `layer_decay` it gives them
    for each depth of the backbone.

    Args:
        model: the model; `freeze` has run.
        tune: rules by pattern, see `assign`.
        lr: learning rate where the rule has none; None for the optimizer's own.
        weight_decay: of matrices where the rule has none; None for the optimizer's own.
        layer_decay: see `mmdlm.training.optimizer.AdamW`; needs a learning rate.

    Raises:
        ValueError: `layer_decay` has no effect, as neither blocks nor embedding are trained.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    patterns = assign({original(name): None for name, _ in model.named_parameters()}, tune)
    share = dict.fromkeys(trained, 1.0)
    if layer_decay is not None:
        share = {
            name: layer_share(name, len(model.backbone.blocks), layer_decay) for name in trained
        }
        if set(share.values()) <= {1.0}:
            raise ValueError(
                f"optimizer.layer_decay={layer_decay} has no effect, as tune trains neither the "
                "blocks of the backbone nor its embedding; leave it out"
            )
    found = []
    for pattern, factor in product((DEFAULT, *tune), sorted(set(share.values()))):
        rule = tune.get(pattern)
        rule = rule if isinstance(rule, Rate) else Rate()
        mine = [
            p
            for name, p in trained.items()
            if patterns[original(name)] == pattern and share[name] == factor
        ]
        matrices = [parameter for parameter in mine if parameter.ndim > 1]
        vectors = [parameter for parameter in mine if parameter.ndim <= 1]
        rate = lr if rule.lr is None else rule.lr
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        label = pattern if factor == 1 else f"{pattern}, rate * {factor:.3g}"
        for name, params, each in ((label, matrices, decay), (f"{label} (no decay)", vectors, 0.0)):
            if params:
                given = {"lr": None if rate is None else rate * factor, "weight_decay": each}
                given = {key: value for key, value in given.items() if value is not None}
                found.append({"name": name, "params": params, **given})
    return found


def layer_share(name: str, blocks: int, layer_decay: float) -> float:
    """Share of the learning rate that a parameter has with layer-wise decay.

    Args:
        name: of the parameter in a `MultimodalDLM`.
        blocks: number of blocks of the backbone.
        layer_decay: factor from a block to the one before it.
    """
    if name.startswith("backbone.embed."):
        return layer_decay ** (blocks + 1)
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return 1.0 if block is None else layer_decay ** (blocks - int(block[1]))


def _prefixes(names: Iterable[str]) -> list[str]:
    """Every dotted prefix of some names, for suggestions."""
    parts = (name.split(".") for name in names)
    return sorted({".".join(each[:n]) for each in parts for n in range(1, len(each))})
