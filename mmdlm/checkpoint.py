"""Checkpoints: any source to a model that runs, and a model back to a folder.

A folder is in our own layout (`mmdlm.loading.own`) or in the one a model was published in
(`mmdlm.loading.published`). Either way it becomes a `Blueprint`, a tokenizer and a table of names;
the model is built without memory and filled tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from encoders.checks import check_arguments, shown
from mmdlm.backbones.linear import pack as pack_weights
from mmdlm.blueprint import Budget, build, describe
from mmdlm.decoding import preset
from mmdlm.decoding.pruning import option
from mmdlm.decoding.pruning.option import Prune
from mmdlm.files import blaming, find, present, read_json
from mmdlm.loading import own, publish, published
from mmdlm.loading.contents import CONFIG, Contents, with_overrides
from mmdlm.loading.keymap import tensors
from mmdlm.loading.lora import CONFIG as ADAPTER
from mmdlm.loading.lora import LoraAdapter
from mmdlm.loading.lora_changes import attach
from mmdlm.loading.overrides import check as check_overrides
from mmdlm.loading.overrides import override, replaced
from mmdlm.loading.shards import write
from mmdlm.loading.weights import Device, check_savable, devices, file_types, fill, weight_type
from mmdlm.model import MultimodalDLM

PACKED_BYTES = 2**31
"""Backbones up to this size are packed by default, see `load`."""


def load(
    source: str | Path,
    *,
    device: Device = "auto",
    dtype: str | torch.dtype = "auto",
    family: str | None = None,
    quantize: str | None = None,
    pack: bool | None = None,
    compile: bool = False,
    config: Mapping[str, Any] | None = None,
    adapter: str | Path | LoraAdapter | None = None,
    prune: Prune = None,
    **overrides: Any,
) -> MultimodalDLM:
    """The model of a checkpoint, ready to use (eval mode); `model.report` lists what was read.

    Weights go from the file straight into the model, converted on the way: memory peaks at the size
    of the model and a few MB, with `quantize` at the size of the quantized model and one block.

    Args:
        source: name of a bundled model ("tiny"), folder, or hub id ("GSAI-ML/LLaDA-8B-Instruct").
        device: "auto" is the GPU if there is one. Several, ["cuda:0", "cuda:1"], share the blocks
            of the backbone, consecutive ones on each.
        dtype: "float32", "bfloat16" or "float16"; "stored" is the checkpoint's, for each encoder,
            adapter and the backbone; "auto" is the backbone's stored type on a GPU and float32 on
            a CPU.
        family: family or system of a published checkpoint that config.json does not identify, e.g.
            "llada". A family reads the language model of a multimodal checkpoint alone.
        quantize: "int8" or "int4" quantizes the weights of the blocks, see
            `mmdlm.loading.quantize`.
        pack: on a CPU in float32, keep a second copy of the backbone's large weights in the layout
            oneDNN multiplies fastest (`mmdlm.backbones.linear`), made when first used. None: for
            backbones of at most 2 GB.
        compile: compile the backbone and record its short steps, for GPUs; see
            `MultimodalDLM.compile`.
        config: keys that complete or replace those of a published config.json, such as
            {"unnorm_key": "bridge_orig"} for a policy with statistics of several data sets.
        adapter: folder or hub id of a LoRA adapter in peft's format, of `mmdlm fit` or of another
            program, see `mmdlm.loading.lora`. It is merged into the weights as they are read.
        prune: how the tokens of images are reduced, such as "divprune@0.25", see
            `mmdlm.decoding.pruning.option.read`.
        **overrides: what config.json leaves out or gets wrong: mask_id, eos_id, pad_id, stop_ids,
            shift, attention, block_size, template and context of `Spec`; theta and theta_scale of
            `TransformerConfig`. Ids and theta that they replace are not looked at; `eos_id` takes
            the place of the ends in config.json and generation_config.json, `stop_ids` that of all
            further ends. theta_scale stretches the context; LLaDA-8B reads 8k tokens with
            4, 16k with 14, 24k with 31 and 32k with 55 (OpenMOSS/LongLLaDA:
            llada/llada_wrapper.py).

    Raises:
        FileNotFoundError: there is no such model, or files of it are missing.
        ValueError: the checkpoint is damaged, its files contradict each other, no family or system
            fits, its tensors or its tokenizer do not fit, its decoding.yaml is wrong; or an option
            has no such value.
        TypeError: there is no such override.
        ImportError: `quantize` needs torchao.
    """
    _check_options(overrides, {"family": family, "pack": pack, "compile": compile}, config)
    over = devices(device)
    method = None if prune is None else option.read(prune)
    if not isinstance(adapter, LoraAdapter | None):
        adapter = LoraAdapter.read(find(adapter))
    folder = find(source)
    with blaming(folder / CONFIG):
        contents = _read(folder, family, overrides, config)
    blueprint = contents.blueprint
    if overrides:
        blueprint = replace(blueprint, spec=override(blueprint.spec, overrides))
    if blueprint.tasks:
        preset.check(blueprint.tasks, folder)
    with blaming(folder / CONFIG):
        budget = Budget.of(each.shape for each in contents.stored.values())
        model = build(blueprint, contents.tokenizer, budget)
        _check_tokenizer(model, folder)
        places, report = contents.resolve(model)
    change = None
    if adapter is not None:
        places, changes = attach(adapter, model, contents, places)
        change = changes.apply
        preset.check(adapter.tasks, Path(adapter.source))
    model.published = with_overrides(contents.published, model.spec, overrides)
    kept = published.kept(model.spec.family)
    fill(model, contents.stored, places, over, dtype, quantize, kept, change)
    model.report = report
    size = sum(weight.nbytes for weight in model.backbone.parameters())
    if pack or (pack is None and size <= PACKED_BYTES):
        pack_weights(model.backbone)
    if compile:
        model.compile()
    if method is not None:
        option.apply(model, method)
    return model.eval()


def _check_options(overrides: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> None:
    """Raises if options of `load` have an unknown name or a wrong value.

    Args:
        overrides: see `load`.
        given: options by name.
        config: see `load`.
    """
    if overrides:
        known = (
            "device",
            "dtype",
            "family",
            "quantize",
            "pack",
            "compile",
            "config",
            "adapter",
            "prune",
        )
        check_overrides(overrides, known)
    check_arguments(load, given)
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config is {shown(config)}, expected a table of keys of config.json")


def _read(
    folder: Path,
    family: str | None,
    overrides: Mapping[str, Any],
    given: Mapping[str, Any] | None,
) -> Contents:
    """What a folder holds, in whichever layout it is."""
    if not present(folder / CONFIG) and present(folder / ADAPTER):
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder} holds a LoRA adapter of {base!r}, not a model; load that model, and give "
            "this folder as its adapter (adapter=, --adapter)"
        )
    config = read_json(folder / CONFIG)
    if "format" not in config:
        return published.read(folder, config | dict(given or {}), family, overrides)
    if given:
        raise ValueError(
            f"config={dict(given)} has no effect on {folder}, which is in our own layout"
        )
    return own.read(folder, replaced(config, overrides), family)


def _check_tokenizer(model: MultimodalDLM, folder: Path) -> None:
    """Raises if the tokenizer has tokens without a row in the embedding."""
    if model.tokenizer is None:
        return
    rows, vocabulary = model.spec.transformer.vocab, model.tokenizer.backend.get_vocab()
    if len(vocabulary) > rows:
        raise ValueError(
            f"{folder}: tokenizer.json has {len(vocabulary)} tokens, the embedding {rows} "
            "rows; they are of different checkpoints"
        )
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary and vocabulary[last] >= rows:
        raise ValueError(
            f"{folder}: {last!r} has id {vocabulary[last]} in the tokenizer's files, but the "
            f"embedding has {rows} rows; they are of different checkpoints"
        )


def save(
    model: MultimodalDLM,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Writes a model as a folder in our own layout; an earlier save there is replaced.

    Args:
        model: the model.
        folder: made when it does not exist.
        dtype: type of the weights in the file ("bfloat16" halves float32); None for the model's.
        card: text of README.md; None leaves the file alone.

    Raises:
        ValueError: the backbone does not match its spec; such a folder could not be loaded.
    """
    check_savable(model)
    blueprint = describe(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = None if dtype is None else weight_type(dtype, model.device, model.dtype)
    weights = tensors(model)
    fixed = {name for name in weights if name.endswith(published.kept(model.spec.family))}
    write(folder, weights, file_types(weights, kind, fixed))
    own.write(folder, blueprint, model.tokenizer, publish.beside(model))
    if card is not None:
        (folder / own.CARD).write_text(card, encoding="utf-8")


def save_published(
    model: MultimodalDLM,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: float = 5e9,
    family: str | None = None,
) -> None:
    """Writes a model in the layout of the system or family it was published in.

    Args:
        model: the model.
        folder: made when it does not exist.
        dtype: type of the weights in the files; None for the model's.
        shard_bytes: most bytes per file; more than one file comes with an index.
        family: family or system whose layout it is; None for the model's own.

    Raises:
        FileNotFoundError: the folder it was loaded from is gone, and with it tensors that the
            layout has and the model has not.
        ValueError: the layout has no place for the model's encoders, or cannot say its spec; or
            the model is not of a published family.
    """
    check_savable(model)
    folder = Path(folder)
    publish.write(model, folder, dtype=dtype, shard_bytes=shard_bytes, family=family)
    own.write_tokenizer(folder, model.tokenizer)
