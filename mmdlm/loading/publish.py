"""A model written in a published layout, so that other tools can read it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.arguments import Recorded
from mmdlm import discover, recipe
from mmdlm.backbones.family import Family
from mmdlm.blueprint import PARTS, Blueprint, build, describe
from mmdlm.files import preview
from mmdlm.loading.carried import beside, merged
from mmdlm.loading.contents import BESIDE, CONFIG
from mmdlm.loading.keymap import Places, Table, locate, shapes, views
from mmdlm.loading.published import FAMILIES, SYSTEMS, kept
from mmdlm.loading.shards import TYPES, Stored, copy, write_json
from mmdlm.loading.shards import write as write_weights
from mmdlm.loading.weights import file_types, weight_type
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import Beside, System, respelled

NAMED = ("architectures", "model_type")


@dataclass(frozen=True)
class Layout:
    """How a model is published.

    Args:
        config: config.json, with what the source says beyond the model.
        places: published names, and where each tensor is in the model.
        fixed: ends of our names that keep their type.
        files: further JSON files by path.
        weights: what is written beside the weights of the folder, see `System.WEIGHTS`.
        held: tensors that were in the checkpoint and have no counterpart in the model.
    """

    config: dict[str, Any]
    places: Places
    fixed: tuple[str, ...] = ()
    files: dict[str, Any] = field(default_factory=dict)
    weights: tuple[Beside, ...] = ()
    held: dict[str, Stored] = field(default_factory=dict)


def write(
    model: MultimodalDLM,
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: float = 5e9,
    family: str | None = None,
) -> None:
    """Writes config.json and weights, see `mmdlm.checkpoint.save_published`.

    Raises:
        FileNotFoundError: the folder the model was loaded from is gone, and with it tensors that
            the layout has and the model has not.
        ValueError: the layout has no place for what the model is.
    """
    is_system = model.system is not None and family in (None, model.system)
    layout = _of_system(model) if is_system else _of_family(model, family)
    kind = None if dtype is None else weight_type(dtype, model.device, model.dtype)
    tensors = views(model, layout.places) | _read(layout.held)
    fixed = {name for name, place in layout.places.items() if place.ours.endswith(layout.fixed)}
    types = file_types(tensors, kind, fixed)
    folder.mkdir(parents=True, exist_ok=True)
    for place in layout.weights:
        apart = {n: inside for n in tensors if (inside := place.inside(n)) is not None}
        if apart:
            kinds = {inside: types[n] for n, inside in apart.items()}
            path = folder / place.path
            _write_beside(path, {inside: tensors.pop(n) for n, inside in apart.items()}, kinds)
    if tensors:
        write_weights(folder, tensors, types, shard_bytes)
    stored = [key for key in ("dtype", "torch_dtype") if key in layout.config] or ["torch_dtype"]
    kinds = dict.fromkeys(stored, str(kind or model.dtype).removeprefix("torch."))
    for name in BESIDE:  # of an earlier model
        (folder / name).unlink(missing_ok=True)
    config = layout.config | kinds
    others = {name: each for name, each in beside(model, config).items() if name in BESIDE}
    for path, contents in {**others, **layout.files, CONFIG: config}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / path, contents)


def _of_system(model: MultimodalDLM) -> Layout:
    """The layout of a multimodal system, which must read back what the model is."""
    system = discover.find(SYSTEMS, str(model.system), System)
    ours = describe(model)
    places = locate(shapes(model), system.keys(ours), model.spec.transformer)
    report = getattr(model, "report", None)
    held = {n: s for n, s in report.held.items() if n not in places} if report else {}
    # Tensors of checkpoints that are merged into this layout are not part of it.
    inside = [f"{place.path}/" for place in system.WEIGHTS]
    held = {n: s for n, s in held.items() if "/" not in n or n.startswith(tuple(inside))}
    names = {*places, *held}

    def reread(config: dict[str, Any]) -> dict[str, Any]:
        again = build(system.read(config, names), model.tokenizer)
        again.published = model.published
        return system.write(again)

    config = system.write(model)
    if CONFIG in model.published:
        files = {f: model.published[f] for f in system.FILES if f in model.published}
        config = merged(model.published[CONFIG] | files, config, reread)
    again = replace(system.read(config, names), system=model.system)
    # Ends that config.json does not name are in other files, see `beside`.
    again = replace(again, spec=replace(again.spec, stop_ids=model.spec.stop_ids))
    if differ := _differences(ours, again):
        raise ValueError(
            f"the published layout of {model.system} cannot express this model; it would be "
            f"read back with other {', '.join(differ)}; use save"
        )
    files = {name: config.pop(name) for name in system.FILES if name in config}
    if report is not None:
        places, held = (respelled(each, report.spelling) for each in (places, held))
    return Layout(config, places, kept(model.spec.family), files, system.apart(model), held)


def _differences(ours: Blueprint, again: Blueprint) -> list[str]:
    """Names of the entries that differ; tasks are ours alone and do not count."""

    def complete(parts: dict[str, Any]) -> dict[str, Any]:
        return {name: recipe.complete(each, PARTS, Recorded) for name, each in parts.items()}

    same = {
        "spec": ours.spec == again.spec,
        "encoders": complete(ours.encoders) == complete(again.encoders),
        "adapters": complete(ours.adapters) == complete(again.adapters),
        "outputs": ours.outputs == again.outputs,
        "template": ours.template == again.template,
    }
    return [name for name, equal in same.items() if not equal]


def _of_family(model: MultimodalDLM, family: str | None) -> Layout:
    """The layout of a text model."""
    name, known = family or model.spec.family, discover.names(FAMILIES, Family)
    if family is None and name not in known:
        raise ValueError(
            f"the model is not of a published family ({name!r}); give family=, one of "
            f"{', '.join(known)}, or use save"
        )
    if len(model.encoders):
        raise ValueError(
            f"the published layout of {name} holds text models only, this one has "
            f"encoders ({', '.join(model.encoders)}); use save"
        )
    chosen = discover.find(FAMILIES, name, Family)
    config = chosen.write(model.spec)
    tables: dict[str, Table] = {"backbone": ("", chosen.KEYS)}
    places = locate(shapes(model), tables, model.spec.transformer)
    names = set(places)
    if CONFIG in model.published and name == model.spec.family:
        source = model.published[CONFIG]
        config = merged(source, config, lambda config: chosen.write(chosen.read(config, names)))
        if not chosen.matches(config, names):  # the user said what it is
            config |= {key: said for key, said in chosen.write(model.spec).items() if key in NAMED}
    again = chosen.read(config, names)
    if again.template != model.spec.template:
        raise ValueError(
            f"whoever reads the {name} layout takes the chat template {again.template!r}, this "
            f"model has {model.spec.template!r}; load it with template={again.template!r}, or use "
            "save"
        )
    return Layout(config, places, chosen.FLOAT32)


def _read(held: dict[str, Stored]) -> dict[str, Tensor]:
    """Tensors out of the files of the checkpoint a model was loaded from."""
    if absent := sorted({str(each.file) for each in held.values() if not each.file.is_file()}):
        raise FileNotFoundError(
            f"{preview(held)} are part of the published layout but not of this model, and the "
            f"files they were in are gone: {preview(absent)}; put them back, or use save"
        )
    found = {n: torch.empty(each.shape, dtype=TYPES[each.dtype]) for n, each in held.items()}
    copy(held, found)
    return found


def _write_beside(path: Path, tensors: dict[str, Tensor], types: dict[str, torch.dtype]) -> None:
    """Weights of a sub-folder, or of one further file."""
    is_file = path.suffix == ".safetensors"
    (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
    if is_file:
        write_weights(path.parent, tensors, types, single=path.name)
    else:
        write_weights(path, tensors, types)
