"""The tensors of a checkpoint, streamed into the parameters of a module and written back.

A table of names (see `mmdlm.backbones.family.Keys`) is expanded into places, one per published
tensor: which tensor of ours it belongs to, and which part of it. Reading copies each published
tensor into its place, writing copies each place out; nothing is held twice.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Keys
from mmdlm.files import preview
from mmdlm.loading.shards import TYPES, Stored

Shapes = Mapping[str, tuple[int, ...]]
Table = tuple[str, Keys]
"""What stands in front of the published names of a part of a model, and its table of names."""

FLOATS = {name: dtype for name, dtype in TYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True)
class Place:
    """Where a published tensor belongs.

    Args:
        ours: name of our tensor.
        index: the part of it, `()` for all.
        shape: shape of that part.
    """

    ours: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What became of each tensor of a checkpoint.

    Args:
        loaded: published names that were read.
        ignored: published names that were not, with the reason.
        missing: published names that were expected and absent; loading raises when there are any.
        prefix: what stood in front of the published names of the language model.
        held: where the ignored tensors are, for writing them back.
        files: number of tensors that were read from each file.
        sources: by field of `Spec` and id, the files that give a special id ("load": the caller
            did); an id without an entry is the published one of the family. None for our layout.
        spelling: beginnings of the names above to those in the files, where they differ; see
            `mmdlm.systems.system.System.SPELLINGS`.
    """

    loaded: tuple[str, ...]
    ignored: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    prefix: str = ""
    held: dict[str, Stored] = field(default_factory=dict, compare=False, repr=False)
    files: dict[Path, int] = field(default_factory=dict, compare=False, repr=False)
    sources: dict[tuple[str, int], str] | None = field(default=None, compare=False, repr=False)
    spelling: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


Places = Mapping[str, Place]
"""Published names to where they belong."""


def expand(
    keys: Keys | None, ours: Shapes, rows: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Place]:
    """The place of every published tensor that a module's tensors are made of.

    Args:
        keys: table of names, see `mmdlm.backbones.family.Keys`; None when the published names are
            ours.
        ours: our tensors.
        rows: lengths of the stacked parts, for those of our names that contain the key; parts are
            equal for the others.

    Raises:
        ValueError: the table has no published name for one of our tensors, or for a part of it.
    """
    if keys is None:
        return {name: Place(name, (), shape) for name, shape in ours.items()}
    table = [(*_pattern(template), to) for template, to in keys.items() if to is not None]
    places: dict[str, Place] = {}
    for name, shape in ours.items():
        found = [(match, at, to) for pattern, at, to in table if (match := pattern.fullmatch(name))]
        if not found:
            raise ValueError(f"the published layout has no tensor for {name}")
        if found[0][1] is None:
            found = found[:1]
        elif sorted(at for _, at, _ in found) != list(range(shape[0])):
            parts = [at for _, at, _ in found]
            raise ValueError(f"{name} is {list(shape)}, but the published layout fills {parts}")
        lengths = next((n for part, n in (rows or {}).items() if part in name), None)
        for match, at, to in found:
            templates = _numbered((to,) if isinstance(to, str) else to, match.groups())
            index, inside = ((), shape) if at is None else ((at,), shape[1:])
            for where, one, names in _experts(templates, index, inside):
                places |= _stack(name, names, one, where, lengths)
    return places


def _pattern(template: str) -> tuple[re.Pattern[str], int | None]:
    """What our names of a table entry look like, and the `n` of `name[n]`."""
    bare, _, number = template.removesuffix("]").partition("[")
    pattern = re.compile(re.escape(bare).replace(r"\{i\}", r"(\d+)"))
    return pattern, int(number) if number else None


def _numbered(templates: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[str, ...]:
    """Published names with the layer numbers of ours; the only one stands wherever `{i}` does."""
    for number in numbers:
        most = -1 if len(numbers) == 1 else 1
        templates = tuple(t.replace("{i}", number, most) for t in templates)
    return templates


def _experts(
    templates: tuple[str, ...], index: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], list[str]]]:
    """Index, shape and published names of each expert, or of the whole tensor without experts."""
    if "{e}" not in templates[0]:
        yield index, shape, list(templates)
        return
    for e in range(shape[0]):
        yield (*index, e), shape[1:], [t.replace("{e}", str(e)) for t in templates]


def _stack(
    ours: str,
    published: list[str],
    shape: tuple[int, ...],
    index: tuple[int, ...],
    lengths: tuple[int, ...] | None,
) -> dict[str, Place]:
    """Published tensors stacked along the first axis of `ours[index]`, which has this shape."""
    if len(published) == 1:
        return {published[0]: Place(ours, index, shape)}
    lengths = lengths or (shape[0] // len(published),) * len(published)
    if len(lengths) != len(published) or sum(lengths) != shape[0]:
        raise ValueError(f"{ours} has {shape[0]} rows, expected {lengths} of {published}")
    places, start = {}, 0
    for name, length in zip(published, lengths, strict=True):
        part = (*index, slice(start, start + length))
        places[name] = Place(ours, part, (length, *shape[1:]))
        start += length
    return places


def locate(ours: Shapes, tables: Mapping[str, Table], config: TransformerConfig) -> Places:
    """The place of every published tensor of a model, part by part.

    Args:
        ours: the model's tensors.
        tables: by part ("backbone", "encoders.image", "adapters.image"), what stands in front of
            its published names, and its table.
        config: sizes of the backbone.

    Raises:
        ValueError: a tensor of ours is in no part or has no published name, or two have the same.
    """
    places: dict[str, Place] = {}
    left = set(ours)
    for part, (prefix, keys) in tables.items():
        inside = {n.removeprefix(f"{part}."): n for n in ours if n.startswith(f"{part}.")}
        left -= set(inside.values())
        shapes = {bare: ours[full] for bare, full in inside.items()}
        for name, place in expand(keys, shapes, rows(config) if part == "backbone" else {}).items():
            if prefix + name in places:
                taken = places[prefix + name].ours
                raise ValueError(f"{prefix + name} is published for {taken} and {part} alike")
            places[prefix + name] = replace(place, ours=f"{part}.{place.ours}")
    if left:
        raise ValueError(
            f"no table of published names for {preview(sorted(left))}; tables: {', '.join(tables)}"
        )
    return places


def rows(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Lengths of the parts of a backbone's tensors that are stacked of unequal ones."""
    q, kv = config.heads * config.head_width, config.keys_heads * config.head_width
    return {"attn.qkv.": (q, kv, kv)}


def dropped(tables: Mapping[str, Table]) -> list[str]:
    """Published names, with `*`, that are known and have no counterpart in a model."""
    return [
        prefix + name for prefix, keys in tables.values() for name, to in keys.items() if not to
    ]


def prefix_of(names: Iterable[str], key: str) -> str:
    """What stands in front of a published name in a checkpoint, "" when the name is absent.

    Args:
        names: the checkpoint's tensors.
        key: a published name that occurs once, such as the embedding.

    Raises:
        ValueError: the name occurs after several prefixes.
    """
    found = sorted(n.removesuffix(key) for n in names if n == key or n.endswith("." + key))
    if len(found) > 1:
        raise ValueError(
            f"tensor {key} occurs after several prefixes, {found}; expected one language model"
        )
    return found[0] if found else ""


def resolve(
    stored: Mapping[str, Stored],
    places: Places,
    known: Iterable[str] = (),
    unused: Mapping[str, str] | None = None,
    types: Collection[str] = FLOATS,
) -> Report:
    """What becomes of each tensor of a checkpoint; raises unless everything fits.

    Args:
        stored: the checkpoint's tensors.
        places: where its tensors belong.
        known: names, with `*`, of tensors that have no counterpart in the model.
        unused: names that may be there and are not read, with the reason.
        types: types that tensors may have, as safetensors spells them.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or of an unsupported type.
    """
    ignored, unexpected = {}, []
    for name in sorted(stored.keys() - places.keys()):
        if "rotary_emb." in name:
            ignored[name] = "rotary table, computed from config.json"
        elif name in (unused or {}):
            ignored[name] = unused[name]
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in known):
            ignored[name] = "known, and not part of this model"
        elif 0 in stored[name].shape:  # such as a shared expert of width 0
            ignored[name] = "holds no numbers"
        else:
            unexpected.append(name)
    missing = sorted(places.keys() - stored.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({preview(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected ({preview(unexpected)})")
    for name in sorted(places.keys() & stored.keys()):
        seen, place = stored[name], places[name]
        if seen.shape != place.shape:
            problems.append(f"{name} is {list(seen.shape)}, expected {list(place.shape)}")
        elif seen.dtype not in types:
            problems.append(f"{name} is {seen.dtype} (quantized?), expected {', '.join(types)}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        folder = next(iter(stored.values())).file.parent
        raise ValueError(
            f"{folder}: {'; '.join(problems[:8])}{more}. "
            "Do config.json and the weights belong together?"
        )
    loaded = tuple(sorted(places))
    files = dict(Counter(stored[name].file for name in loaded))
    return Report(loaded, ignored, held={n: stored[n] for n in ignored}, files=files)


def views(module: nn.Module, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The part of a module that each published tensor fills, sharing its memory."""
    ours = tensors(module)
    return {name: ours[place.ours][place.index] for name, place in places.items()}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, outside of the graph and sharing memory."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and persistent buffers by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors(module).items()}


def allocate(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    keep: tuple[str, ...] = (),
    prefix: str = "",
) -> None:
    """Gives tensors on the meta device memory, without values.

    Args:
        module: may hold tensors elsewhere too; they stay.
        device: where to.
        dtype: of floating tensors.
        keep: ends of names that keep their type.
        prefix: what the module is called where those names begin.
    """
    for path, part in module.named_modules():
        for group in (part._parameters, part._buffers):
            for name, old in group.items():
                if old is None or not old.is_meta:
                    continue
                full = ".".join(filter(None, (prefix, path, name)))
                fixed = not old.is_floating_point() or full.endswith(keep)
                new = torch.empty(old.shape, device=device, dtype=old.dtype if fixed else dtype)
                is_weight = group is part._parameters
                group[name] = nn.Parameter(new, old.requires_grad) if is_weight else new
