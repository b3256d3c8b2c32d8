"""Checkpoints: any source to a model that runs, and a model back to a folder.

A folder is either in a published layout (a `Family` of `mmdlm.backbones` reads it) or in ours:

    config.json         format, spec, and how to build the encoders and adapters
    model.safetensors   every weight, under backbone., encoders. and adapters.
    tokenizer.json      when the model has a tokenizer
    statistics.json     when it drives a robot: action ids and normalisation
    decoding.yaml       default strategies by task, when it has some
    README.md           what it was trained on, and its scores
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoders.rebuild import Rebuildable, rebuild
from mmdlm import discover, preset
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Family, Spec
from mmdlm.backbones.linear import pack as pack_weights
from mmdlm.backbones.moe import MoEConfig
from mmdlm.backbones.transformer import Transformer
from mmdlm.loading import published
from mmdlm.loading.keymap import (
    FLOATS,
    Place,
    Report,
    allocate,
    expand,
    resolve,
    shapes,
    tensors,
    views,
)
from mmdlm.loading.overrides import check as check_overrides
from mmdlm.loading.overrides import override
from mmdlm.loading.placement import Device, devices, parts, spread, weight_type
from mmdlm.loading.quantize import check as check_quantize
from mmdlm.loading.quantize import is_quantized
from mmdlm.loading.quantize import quantize as quantize_block
from mmdlm.loading.shards import Stored, copy, read_json, some, survey, write, write_json
from mmdlm.loading.source import find
from mmdlm.model import MultimodalDLM
from mmdlm.text import BESIDE, CHAT, Tokenizer

if TYPE_CHECKING:
    from adapters.robot import Robot

FORMAT = "mmdlm-1"
# What a tokenizer is read from, see `mmdlm.text`.
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", *BESIDE, CHAT)


PACKED_BYTES = 2**31
"""A backbone of this size is packed without being asked, see `load`."""


def load(
    source: str | Path,
    *,
    device: Device = "auto",
    dtype: str | torch.dtype = "auto",
    family: str | None = None,
    quantize: str | None = None,
    pack: bool | None = None,
    compile: bool = False,
    **overrides: Any,
) -> MultimodalDLM:
    """The model of a checkpoint, ready to use (eval mode); `model.report` says what was read.

    Weights go from the file straight into the model, in the asked type: memory peaks at the size
    of the model and a few MB, with `quantize` at the size of the rounded model and one block.

    Args:
        source: name of a bundled model ("tiny"), folder, or hub id ("GSAI-ML/LLaDA-8B-Instruct").
        device: "auto" is the GPU if there is one. Several, ["cuda:0", "cuda:1"], share the blocks
            of the backbone, one run of them each.
        dtype: "float32", "bfloat16" or "float16"; "stored" is the checkpoint's; "auto" is that on
            a GPU and float32 on a CPU.
        family: family of a published checkpoint whose config.json does not tell, e.g. "llada".
        quantize: "int8" or "int4" rounds the weights of the blocks, see `mmdlm.loading.quantize`.
        pack: on a CPU in float32, keep a second copy of the backbone's large weights in the layout
            oneDNN multiplies fastest (`mmdlm.backbones.linear`), made when first used. None: for
            backbones of at most 2 GB.
        compile: compile the backbone and record its short steps, for GPUs; see
            `MultimodalDLM.compile`.
        **overrides: what config.json leaves out or gets wrong: mask_id, eos_id, pad_id, stop_ids,
            shift, attention, block_size, template and context of `Spec`; theta and theta_scale of
            `TransformerConfig`. theta_scale stretches the context; LLaDA-8B reads 8k tokens with
            4, 16k with 14, 24k with 31 and 32k with 55 (OpenMOSS/LongLLaDA:
            llada/llada_wrapper.py).

    Raises:
        FileNotFoundError: there is no such model, or files of it are missing.
        ValueError: the checkpoint is damaged, of no known family, or its tensors do not fit; or an
            option has no such value.
        TypeError: there is no such override.
        ImportError: `quantize` needs torchao.
    """
    check_overrides(overrides, ("device", "dtype", "family", "quantize", "pack", "compile"))
    over = devices(device)
    folder = find(source)
    config = read_json(folder / "config.json")
    stored = survey(folder)
    model, places, report = _empty(folder, config, stored, family, overrides)
    _check_tokenizer(model, folder)
    embedding = next(stored[n] for n, p in places.items() if p.ours == "backbone.embed.weight")
    kind = weight_type(dtype, over[0], FLOATS.get(embedding.dtype, torch.float32))
    _fill(model, stored, places, over, kind, quantize)
    model.report = report
    size = sum(weight.nbytes for weight in model.backbone.parameters())
    if pack or (pack is None and size <= PACKED_BYTES):
        pack_weights(model.backbone)
    if compile:
        model.compile()
    return model.eval()


def _check_tokenizer(model: MultimodalDLM, folder: Path) -> None:
    """Refuses a tokenizer with tokens the embedding has no rows for."""
    rows = model.spec.transformer.vocab
    if model.tokenizer is not None and len(model.tokenizer) > rows:
        raise ValueError(
            f"{folder}: tokenizer.json has {len(model.tokenizer)} tokens, the embedding {rows} "
            "rows; they are of different checkpoints"
        )


def _empty(
    folder: Path,
    config: dict[str, Any],
    stored: dict[str, Stored],
    family: str | None,
    overrides: dict[str, Any],
) -> tuple[MultimodalDLM, dict[str, Place], Report]:
    """The model of a folder, its backbone on the meta device, and where its tensors go."""
    if "format" not in config:
        return published.build(folder, config, stored, family, overrides)
    if family is not None:
        raise ValueError(
            f"family={family!r} has no effect on {folder}, which is in our own layout; leave it out"
        )
    model = _own(folder, config, overrides)
    return model, *resolve(stored, expand(None, shapes(model)))


def _fill(
    model: MultimodalDLM,
    stored: dict[str, Stored],
    places: dict[str, Place],
    over: list[torch.device],
    dtype: torch.dtype,
    kind: str | None,
) -> None:
    """Gives a model its weights part by part, so that rounding never sees more than one block."""
    if kind is not None:
        if model.spec.transformer.moe is not None:
            raise ValueError(
                f"quantize={kind!r} rounds linear layers only, and the experts of "
                f"{model.spec.family}, nearly all of its weights, are none; leave it out"
            )
        for each in over:
            check_quantize(kind, each, dtype)
    model.encoders.to(over[0], dtype)
    model.adapters.to(over[0], dtype)
    kept, where = published.kept(model.spec.family), spread(model.backbone, over)
    for name, part in parts(model.backbone).items():
        allocate(part, where[name], dtype, kept, name)
        inside = {n: p for n, p in places.items() if p.ours.startswith(f"backbone.{name}.")}
        copy(stored, views(model, inside))
        if kind is not None and name.startswith("blocks."):
            quantize_block(part, kind)
    rest = {n: p for n, p in places.items() if not p.ours.startswith("backbone.")}
    copy(stored, views(model, rest))


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
        ValueError: the backbone is not what the spec says; such a folder could not be loaded.
    """
    _check(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = None if dtype is None else weight_type(dtype, model.device, model.dtype)
    weights = tensors(model)
    fixed = {name for name in weights if name.endswith(published.kept(model.spec.family))}
    write(folder, weights, _types(weights, kind, fixed))
    config = {
        "format": FORMAT,
        "spec": dataclasses.asdict(model.spec),
        "encoders": {name: _recipe(part) for name, part in model.encoders.items()},
        "adapters": {name: _recipe(part) for name, part in model.adapters.items()},
    }
    write_json(folder / "config.json", config)
    # What the model no longer has must not be found by the next load.
    for name in ("statistics.json", "decoding.yaml"):
        (folder / name).unlink(missing_ok=True)
    _write_tokenizer(model, folder)
    if model.robot is not None:
        write_json(folder / "statistics.json", model.robot.to_dict())
    if model.preset:
        preset.write(folder / "decoding.yaml", model.preset)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_published(
    model: MultimodalDLM,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: float = 5e9,
    family: str | None = None,
) -> None:
    """Writes a text model in the published layout of a family.

    Args:
        model: the model.
        folder: made when it does not exist.
        dtype: type of the weights in the files; None for the model's.
        shard_bytes: most bytes per file; more than one file comes with an index.
        family: whose layout; None for the model's own.

    Raises:
        ValueError: the layout has no place for the model's encoders, or cannot say its spec; or
            the model is of no published family.
    """
    name, known = family or model.spec.family, discover.names(published.FAMILIES, Family)
    if family is None and name not in known:
        raise ValueError(
            f"the model is of no published family ({name!r}); give family=, one of "
            f"{', '.join(known)}, or use save"
        )
    if len(model.encoders):
        raise ValueError(
            f"the published layout of {name} holds text models only, this one has "
            f"encoders ({', '.join(model.encoders)}); use save"
        )
    _check(model)
    chosen = discover.find(published.FAMILIES, name, Family)
    kind = weight_type(dtype or model.dtype, model.device, model.dtype)
    config = chosen.write(model.spec) | {"torch_dtype": str(kind).removeprefix("torch.")}
    places = expand(chosen.KEYS, shapes(model.backbone), published.rows(model.spec.transformer))
    again = chosen.read(config, set(places))
    if again.template != model.spec.template:
        raise ValueError(
            f"who reads the {name} layout takes the chat template {again.template!r}, this model "
            f"has {model.spec.template!r}; load it with template={again.template!r}, or use save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = views(model.backbone, places)
    fixed = {name for name, place in places.items() if place.ours.endswith(chosen.FLOAT32)}
    write(folder, weights, _types(weights, kind, fixed), shard_bytes)
    write_json(folder / "config.json", config)
    _write_tokenizer(model, folder)


def _write_tokenizer(model: MultimodalDLM, folder: Path) -> None:
    """The model's tokenizer in place of any other that is there."""
    for name in TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _check(model: MultimodalDLM) -> None:
    """Raises unless the backbone has the tensors its spec says, in full precision."""
    if is_quantized(model):
        raise ValueError(
            "rounded weights are not saved; load the checkpoint without quantize= and save that, "
            "or copy its folder"
        )
    with torch.device("meta"):
        expected = shapes(Transformer(model.spec.transformer))
    has = shapes(model.backbone)
    differ = sorted(n for n in {*has, *expected} if has.get(n) != expected.get(n))
    if differ:
        raise ValueError(
            f"the backbone's {some(differ)} differ from what its spec says; merge adapters such as "
            "LoRA, and save the model itself rather than its compiled form"
        )


def _own(folder: Path, config: dict[str, Any], overrides: dict[str, Any]) -> MultimodalDLM:
    """The model of a folder in our layout, its backbone on the meta device."""
    if config["format"] != FORMAT:
        raise ValueError(
            f"{folder}: config.json has format {config['format']!r}, expected {FORMAT!r}; a newer "
            "mmdlm may have written it"
        )
    missing = {"spec", "encoders", "adapters"} - set(config)
    if missing:
        raise ValueError(f"{folder}: config.json lacks {sorted(missing)}; export it again")
    spec = override(spec_of(config["spec"], folder), overrides)
    # Their random weights are overwritten, and must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        encoders = {name: rebuild(recipe) for name, recipe in config["encoders"].items()}
        adapters = {name: rebuild(recipe) for name, recipe in config["adapters"].items()}
    tokenizer = Tokenizer.from_folder(folder)
    robot = _robot(folder)
    with torch.device("meta"):
        model = MultimodalDLM(spec, encoders, adapters, tokenizer, robot)
    if (folder / "decoding.yaml").exists():
        model.preset = preset.read(folder / "decoding.yaml")
    return model


def spec_of(given: dict[str, Any], source: Path | str) -> Spec:
    """A spec from its plain types.

    Args:
        given: what `dataclasses.asdict` made of it.
        source: where it is from, for errors.

    Raises:
        ValueError: an entry is unknown or missing.
    """
    sizes = dict(given.get("transformer", {}))
    if sizes.get("moe") is not None:
        sizes["moe"] = _build(MoEConfig, sizes["moe"], source)
    sizes = _build(TransformerConfig, sizes, source)
    return _build(Spec, {**given, "transformer": sizes}, source)


def _build(kind: type, given: dict[str, Any], source: Path | str) -> Any:
    """A dataclass from its dictionary."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(given) - set(known))
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
    if unknown or missing:
        raise ValueError(
            f"{source}: {kind.__name__} has unknown {unknown} and lacks {missing}; "
            "a newer mmdlm may have written it"
        )
    # JSON has no tuples, and our dataclasses no lists.
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _robot(folder: Path) -> Robot | None:
    file = folder / "statistics.json"
    if not file.exists():
        return None
    from adapters.robot import Robot

    return Robot.from_dict(read_json(file))


def _recipe(part: Rebuildable) -> dict[str, Any]:
    """How to build an encoder or adapter again; its weights are in the checkpoint."""
    recipe = part.recipe()
    if "pretrained" in recipe["init_args"]:
        recipe["init_args"]["pretrained"] = False
    return recipe


def _types(
    weights: dict[str, Tensor], dtype: torch.dtype | None, fixed: set[str]
) -> dict[str, torch.dtype]:
    """Type of each tensor in a file."""
    return {
        name: dtype if dtype and weight.is_floating_point() and name not in fixed else weight.dtype
        for name, weight in weights.items()
    }
