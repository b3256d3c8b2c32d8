"""What a checkpoint folder holds, before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mmdlm.blueprint import Blueprint
from mmdlm.loading.keymap import Places, Report, Table, dropped, expand, locate, resolve, shapes
from mmdlm.loading.shards import TYPES, Stored
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

TIED = "the head is tied to the embedding, which wins"


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
        config: config.json and the files a system reads beside it, see `Report`.
    """

    blueprint: Blueprint
    tokenizer: Tokenizer | None
    stored: dict[str, Stored]
    tables: dict[str, Table] | None = None
    prefix: str = ""
    config: dict[str, Any] = field(default_factory=dict, repr=False)

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
        before, keys = self.tables["backbone"]
        head = keys.get("out.weight")
        tied = config.tied and isinstance(head, str)
        unused = {self._as_stored(f"{before}{head}"): TIED} if tied else {}
        report = resolve(self.stored, places, known, unused)
        return places, replace(report, prefix=self.prefix, config=self.config)

    def _as_stored(self, name: str) -> str:
        """A published name without the wrapper's prefix where only that is in the files."""
        bare = name.removeprefix(self.prefix)
        return bare if name not in self.stored and bare in self.stored else name
