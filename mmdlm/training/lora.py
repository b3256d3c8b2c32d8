"""Low-rank adapters in a model that is trained: peft's layers, put in and taken out."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from mmdlm.backbones.moe import Stack
from mmdlm.files import preview
from mmdlm.loading.lora import NAME, LoraAdapter, exported
from mmdlm.model import MultimodalDLM
from mmdlm.training.tune import FROZEN, Lora, Rule, assign, lora_of, original

HEAD = "backbone.out"
# Modules whose fused kernels read the weights of their linear layers without calling them.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def inject(model: MultimodalDLM, tune: Mapping[str, Rule], new: int, source: str) -> None:
    """Adds low-rank adapters where the rules ask for them, in place; without such rules nothing.

    The new rows of a vocabulary that has grown are trained too, where the embedding and the head
    are frozen.

    Args:
        model: `mmdlm.training.tune.freeze` has run.
        tune: rules by pattern.
        new: number of tokens that were added, see `mmdlm.training.vocabulary.grow`.
        source: where the model is from, for other programs.

    Raises:
        ValueError: a rule matches no linear layer, or weights that LoRA cannot train; or rules
            that must agree differ.
        ImportError: peft is not installed.
    """
    if not any(map(lora_of, tune.values())):
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "mmdlm[train]"') from error
    layers = _layers(model, tune)
    _check_quantized(model, tune)
    rules = [*dict.fromkeys(layers.values())]
    for name in ("dropout", "dora", "rslora"):
        if len(values := {getattr(rule, name) for rule in rules}) > 1:
            raise ValueError(
                f"tune: the lora rules have {name} {' and '.join(map(repr, values))}; an adapter "
                "has one, only rank and alpha may differ"
            )
    first = rules[0]
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    tokens = {name: _rows(model, new) for name in _vocabulary(model, trained)} if new else None
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        use_dora=first.dora,
        use_rslora=first.rslora,
        target_modules=list(layers),
        rank_pattern={n: each.rank for n, each in layers.items() if each.rank != first.rank},
        alpha_pattern={n: each.alpha for n, each in layers.items() if each.alpha != first.alpha},
        trainable_token_indices=tokens or None,
        base_model_name_or_path=source,
    )
    with warnings.catch_warnings():  # we never merge these layers in place
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")
        inject_adapter_in_model(config, model, NAME)
    for name, weight in model.named_parameters():
        if name in trained:  # peft freezes all that is not its own
            weight.requires_grad_(True)
    model.peft_config[NAME].modules_to_save = _owners(model, trained) or None


def _layers(model: MultimodalDLM, tune: Mapping[str, Rule]) -> dict[str, Lora]:
    """The linear layers that get adapters, by name, and their settings."""
    patterns = assign((name for name, _ in model.named_parameters()), tune)
    rules = {name: lora for name, at in patterns.items() if (lora := lora_of(tune.get(at)))}
    found, refused = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Stack) and f"{name}.weight" in rules:
            refused[f"{name}.weight"] = "experts, which are no linear layers"
        if isinstance(module, FUSED):
            inside = {f"{name}.{n}": "read by a fused kernel" for n, _ in module.named_parameters()}
            refused |= {n: reason for n, reason in inside.items() if n in rules}
        if isinstance(module, nn.Linear) and f"{name}.weight" in rules and name != HEAD:
            found[name] = rules[f"{name}.weight"]
    if refused:
        raise ValueError(
            f"tune: LoRA cannot train {preview(refused)} ({next(iter(refused.values()))}); freeze "
            "them by a later pattern"
        )
    used = {patterns[f"{name}.weight"] for name in found}
    asked = [at for at, rule in tune.items() if lora_of(rule) and at in patterns.values()]
    if unused := [at for at in asked if at not in used]:
        raise ValueError(
            f"tune: {unused[0]!r} asks for LoRA and matches no linear layer but the head; expected "
            "a pattern such as 'backbone.blocks.*'"
        )
    return found


def _check_quantized(model: MultimodalDLM, tune: Mapping[str, Rule]) -> None:
    """Raises ValueError if rules ask to train quantized weights, or their rows' lengths."""
    patterns = assign((name for name, _ in model.named_parameters()), tune)
    for name, weight in model.named_parameters():
        rule, is_plain = tune.get(patterns[name]), type(weight) is nn.Parameter
        if not is_plain and rule != FROZEN and not lora_of(rule):
            raise ValueError(
                f"tune: {patterns[name]!r} trains {name}, which is quantized; train it by LoRA or "
                "freeze it, or leave quantize out"
            )
        if not is_plain and lora_of(rule) and lora_of(rule).dora:
            raise ValueError("tune: dora needs weights that are not quantized; leave one out")


def _vocabulary(model: MultimodalDLM, trained: Iterable[str]) -> Iterator[str]:
    """Embedding and head, unless they are trained as a whole."""
    for name in ("backbone.embed", *([] if model.backbone.out is None else [HEAD])):
        if f"{name}.weight" not in trained:
            yield name


def _rows(model: MultimodalDLM, new: int) -> list[int]:
    """Ids of the last tokens of a vocabulary."""
    vocab = model.spec.transformer.vocab
    return list(range(vocab - new, vocab))


def _owners(model: nn.Module, trained: Iterable[str]) -> list[str]:
    """The modules that own parameters which are trained as a whole."""
    return sorted({name.rpartition(".")[0] for name in trained})


def extract(model: MultimodalDLM) -> LoraAdapter:
    """The adapter of a model in training: all that was trained, and the tokenizer if it grew.

    Args:
        model: with adapters of `inject`.
    """
    named = {exported(name): each.detach() for name, each in trainable(model)}
    return LoraAdapter.trained(settings(model), named, model)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by name."""
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def check_reached(model: nn.Module) -> bool:
    """Whether every part of a model that has low-rank adapters was used in a backward pass.

    Args:
        model: after a backward pass.

    Raises:
        ValueError: some layers of a part have no gradient: its code reads their weights and does
            not call them, or does not use them at all.
    """
    parts: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    for name, each in model.named_parameters():
        if ".lora_B." in name:
            kind, part, _ = name.split(".", 2)
            part = kind if kind == "backbone" else f"{kind}.{part}"
            parts[part][each.grad is not None].append(original(name))
    for part, layers in parts.items():
        if layers[True] and layers[False]:
            raise ValueError(
                f"tune: {part} does not call {preview(layers[False])}, so LoRA cannot train them; "
                "freeze them by a later pattern"
            )
    return all(layers[True] for layers in parts.values())


def settings(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json."""
    found = model.peft_config[NAME].to_dict()
    found |= {"inference_mode": True, "peft_type": str(found["peft_type"].value)}
    return {name: sorted(v) if isinstance(v, set) else v for name, v in found.items()}
