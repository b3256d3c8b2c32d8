"""Find files by a text or another file, among vectors that were computed before."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdlm.media import media_kind
from mmdlm.model import MultimodalDLM
from mmdlm.representation import similarity
from mmdlm.tasks.embed import embed


@dataclass(frozen=True)
class Index:
    """Vectors of files.

    Args:
        files: N names.
        vectors: [N K D] float32 of unit length.
        options: keyword arguments of `mmdlm.embed` that they were made with.
    """

    files: tuple[str, ...]
    vectors: Tensor
    options: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Index:
        """The index that `mmdlm index` wrote; of repeated files the last counts.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no vectors, or vectors of several shapes or settings.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no index {path}; make it with mmdlm index FILES --out {path}"
            )
        records: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.strip() else {}
            if "embedding" in record:
                records[record["file"]] = record
        if not records:
            raise ValueError(
                f"{path} holds no vectors; make them with mmdlm index FILES --out {path}"
            )
        settings = {json.dumps(_options(record), sort_keys=True) for record in records.values()}
        shapes = {torch.tensor(record["embedding"]).shape for record in records.values()}
        if len(settings) > 1 or len(shapes) > 1:
            raise ValueError(
                f"{path} holds vectors of different models or settings; make it anew with --redo"
            )
        table = torch.tensor([record["embedding"] for record in records.values()])
        table = table if table.ndim == 3 else table[:, None]
        return cls(tuple(records), table, json.loads(settings.pop()))


def _options(record: dict[str, Any]) -> dict[str, Any]:
    """Options of `embed` among the settings of a record."""
    settings = record.get("settings") or {}
    return {name: settings[name] for name in ("masks", "pooling") if name in settings}


def search(
    model: MultimodalDLM, index: Index, queries: Items[str], top: int = 5
) -> list[list[tuple[str, float]]]:
    """The files most like each query, with their similarity, -1 to 1.

    Args:
        model: the model that made the index.
        index: see `Index`.
        queries: texts, or names of media files.
        top: files per query.

    Raises:
        ValueError: the vectors of the model have another width than those of the index.
    """
    found = []
    for query in queries:
        kind = media_kind(query) if Path(query).is_file() else None
        vector = embed(model, **{kind or "text": query}, **index.options)
        vector = vector if vector.ndim == 2 else vector[None]
        if vector.shape[1] != index.vectors.shape[2]:
            raise ValueError(
                f"the model's vectors have {vector.shape[1]} numbers, those of the index "
                f"{index.vectors.shape[2]}; search with the model that made it (--model)"
            )
        scores = similarity(vector[None], index.vectors)[0]
        best = scores.topk(min(top, len(scores)))
        names = [index.files[i] for i in best.indices.tolist()]
        found.append(list(zip(names, best.values.tolist(), strict=True)))
    return found
