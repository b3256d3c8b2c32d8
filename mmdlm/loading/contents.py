"""What a checkpoint folder holds, before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdlm.backbones.family import Spec
from mmdlm.blueprint import Blueprint
from mmdlm.files import present, read_json
from mmdlm.loading.keymap import Places, Report, Table, dropped, expand, locate, resolve, shapes
from mmdlm.loading.shards import TYPES, Stored
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
# What other programs read beside config.json and the files of the tokenizer.
BESIDE = (
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Entries of config.json and generation_config.json by the override of `load` that replaces them.
IDS = {
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
    "stop_ids": "eos_token_id",
    "pad_id": "pad_token_id",
}
TIED = "the head is tied to the embedding, and equal to it"


@dataclass(frozen=True)
class Contents:
    """A folder's files in our terms.

    Args:
        blueprint: what to build.
        tokenizer: None when the folder has none.
        stored: every tensor in its files, by name.
        tables: published names by part, see `mmdlm.loading.keymap.locate`; None when the names in
            the files are ours.
        prefix: a wrapper's prefix in front of the published names of a text model. Single tensors
            may lack it.
        published: see `MultimodalDLM.published`.
        sources: files that give the special ids, see `Report`.
        spelling: see `Report`.
    """

    blueprint: Blueprint
    tokenizer: Tokenizer | None
    stored: dict[str, Stored]
    tables: dict[str, Table] | None = None
    prefix: str = ""
    published: dict[str, Any] = field(default_factory=dict, repr=False)
    sources: dict[tuple[str, int], str] | None = None
    spelling: dict[str, str] = field(default_factory=dict)

    def resolve(self, model: MultimodalDLM) -> tuple[Places, Report]:
        """Where each stored tensor goes in the model built from the blueprint, and the report.

        Raises:
            ValueError: tensors are missing, unexpected, of another shape or an unsupported type.
        """
        if self.tables is None:
            places = expand(None, shapes(model))
            return places, resolve(self.stored, places, types=TYPES)
        config = self.blueprint.spec.transformer
        found = locate(shapes(model), self.tables, config)
        places = {self._as_stored(name): place for name, place in found.items()}
        known = dropped(self.tables)
        known += [pattern.removeprefix(self.prefix) for pattern in known]
        unused = {}
        embedding, head = self.published_name("embed.weight"), self.published_name("out.weight")
        if config.tied and head is not None:
            if head in self.stored and embedding not in self.stored:
                places[head] = places.pop(embedding)  # the one tensor that is both
            else:
                unused[head] = TIED
        report = resolve(self.stored, places, known, unused)
        found = {"prefix": self.prefix, "sources": self.sources, "spelling": self.spelling}
        return places, replace(report, **found)

    def published_name(self, ours: str) -> str | None:
        """The name in the files of a tensor of the backbone; None if it has no single one."""
        before, keys = ("", {}) if self.tables is None else self.tables["backbone"]
        name = keys.get(ours)
        return self._as_stored(f"{before}{name}") if isinstance(name, str) else None

    def _as_stored(self, name: str) -> str:
        """A published name without the wrapper's prefix where only that is in the files."""
        bare = name.removeprefix(self.prefix)
        return bare if name not in self.stored and bare in self.stored else name


def beside(folder: Path, files: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON files of a folder that only other programs read, and further ones, by name.

    Raises:
        ValueError: one is damaged.
    """
    names = dict.fromkeys((*BESIDE, *files))
    return {name: read_json(folder / name) for name in names if present(folder / name)}


def check_published(published: Mapping[str, Any]) -> None:
    """Raises unless each file is a JSON object.

    Raises:
        ValueError: one is not.
    """
    for name, found in published.items():
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is a {type(found).__name__}, expected a JSON object")


def with_overrides(
    published: Mapping[str, Any], spec: Spec, overrides: Iterable[str]
) -> dict[str, Any]:
    """The published files with the special ids that the user gave.

    Args:
        published: see `MultimodalDLM.published`.
        spec: with these ids.
        overrides: names of what the user gave, see `mmdlm.loading.overrides`.
    """
    ends = [spec.eos_id, *spec.stop_ids]
    values = {
        "mask_token_id": spec.mask_id,
        "eos_token_id": ends if len(ends) > 1 else spec.eos_id,
        "pad_token_id": spec.pad_id,
    }
    given = {key: values[key] for key in {IDS[name] for name in overrides if name in IDS}}
    return {
        file: {key: given.get(key, value) for key, value in found.items()}
        for file, found in published.items()
    }
