"""The tensors of a checkpoint, streamed into the parameters of a module and written back.

A table of names (see `mmdlm.backbones.family.Keys`) is expanded into places, one per published
tensor: which tensor of ours it belongs to, and which part of it. Reading copies each published
tensor into its place, writing copies each place out; nothing is held twice.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmdlm.backbones.family import Keys
from mmdlm.loading.shards import TYPES, Stored, some

Shapes = Mapping[str, tuple[int, ...]]

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
        prefix: what stood in front of the published names and was stripped.
    """

    loaded: tuple[str, ...]
    ignored: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    prefix: str = ""


def expand(
    keys: Keys | None, ours: Shapes, rows: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Place]:
    """The place of every published tensor that a module's tensors are made of.

    Args:
        keys: table of names; None when the published names are ours.
        ours: our tensors.
        rows: lengths of the stacked parts, for those of our names that contain the key; parts are
            equal for the others.

    Raises:
        ValueError: the table has no published name for one of our tensors.
    """
    if keys is None:
        return {name: Place(name, (), shape) for name, shape in ours.items()}
    table = [
        (re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)")), published)
        for template, published in keys.items()
        if published is not None
    ]
    places: dict[str, Place] = {}
    for name, shape in ours.items():
        found = ((m, to) for pattern, to in table if (m := pattern.fullmatch(name)))
        match, published = next(found, (None, ()))
        if match is None:
            raise ValueError(f"the published layout has no tensor for {name}")
        templates = (published,) if isinstance(published, str) else published
        lengths = next((n for part, n in (rows or {}).items() if part in name), None)
        for number in match.groups():
            templates = tuple(t.replace("{i}", number) for t in templates)
        experts = range(shape[0]) if "{e}" in templates[0] else (None,)
        for e in experts:
            names = [t.replace("{e}", str(e)) for t in templates]
            one = shape if e is None else shape[1:]
            places |= _stack(name, names, one, () if e is None else (e,), lengths)
    return places


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


def prefix_of(names: Iterable[str], key: str) -> str:
    """What stands in front of a published name in a checkpoint, "" when the name is absent.

    Args:
        names: the checkpoint's tensors.
        key: a published name that occurs once, such as the embedding.

    Raises:
        ValueError: the name occurs behind several prefixes.
    """
    found = sorted(n.removesuffix(key) for n in names if n == key or n.endswith("." + key))
    if len(found) > 1:
        raise ValueError(
            f"tensor {key} occurs behind several prefixes, {found}; expected one language model"
        )
    return found[0] if found else ""


def resolve(
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    keys: Keys | None = None,
    prefix: str = "",
    unused: Mapping[str, str] | None = None,
) -> tuple[dict[str, Place], Report]:
    """Which tensor of a checkpoint goes where; raises unless everything fits.

    Args:
        stored: the checkpoint's tensors.
        places: where the published ones belong.
        keys: table whose None entries are dropped.
        prefix: stands in front of published names.
        unused: published names that may be there and are not read, with the reason.

    Returns:
        the checkpoint's names with their places, and the report.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or of an unsupported type.
    """
    # A wrapper's prefix may leave out the head, so the bare name is tried as well.
    found = {prefix + n if prefix + n in stored else n: p for n, p in places.items()}
    dropped = [name for name, to in (keys or {}).items() if to is None]
    ignored, unexpected = {}, []
    for name in sorted(stored.keys() - found.keys()):
        bare = name.removeprefix(prefix)
        if "rotary_emb." in name:
            ignored[name] = "rotary table, computed from config.json"
        elif bare in (unused or {}):
            ignored[name] = unused[bare]
        elif any(fnmatch.fnmatchcase(n, d) for n in (name, bare) for d in dropped):
            ignored[name] = "known, and no part of this model"
        elif 0 in stored[name].shape:  # such as a shared expert of width 0
            ignored[name] = "holds no numbers"
        else:
            unexpected.append(name)
    missing = sorted(found.keys() - stored.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected ({some(unexpected)})")
    for name in sorted(found.keys() & stored.keys()):
        seen, place = stored[name], found[name]
        if seen.shape != place.shape:
            problems.append(f"{name} is {list(seen.shape)}, expected {list(place.shape)}")
        elif keys is not None and seen.dtype not in FLOATS:
            problems.append(f"{name} is {seen.dtype} (quantised?), expected {', '.join(FLOATS)}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        folder = next(iter(stored.values())).file.parent
        raise ValueError(
            f"{folder}: {'; '.join(problems[:8])}{more}. "
            "Do config.json and the weights belong together?"
        )
    return found, Report(tuple(sorted(found)), ignored, (), prefix)


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
