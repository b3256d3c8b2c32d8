"""LLaVA's JSON: "conversations" of human and gpt with <image> marks; and mixture YAML."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mmdlm.data.chat import placed
from mmdlm.data.conversations import Conversations, Row
from mmdlm.data.records import Entry, entries, first

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}
STRATEGIES = ("all", "first", "end", "random")


class LLaVA(Conversations):
    """LLaVA's data format (haotian-liu/LLaVA: docs/Finetune_Custom_Data.md).

    A YAML file mixes several JSON files: `datasets: [{json_path: a.json, sampling_strategy:
    "first:10%"}]`, with all, first:N, end:N or random:N (N a number or a percentage), as in
    LLaVA-VL/LLaVA-NeXT: scripts/train/*.yaml. JSON paths are relative to the YAML file.

    Args:
        path: `.json` or `.jsonl` with "conversations", or such a YAML file.
        images: folder of the images; None: that of `path`.
        length: see `Conversations`.
        prompt: see `Conversations`.
        seed: of "random".
    """

    EXAMPLE: ClassVar[str] = (
        '[{"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"'
        '}, {"from": "gpt", "value": "A cat."}]}]'
    )

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        length: int | None = None,
        prompt: str | None = None,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(path, length, prompt)
        if images is not None:
            self.root = Path(images)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Conversations.matches`."""
        suffix = path.suffix.lower()
        if suffix in (".yaml", ".yml") and path.is_file():
            return "json_path" in path.read_text(encoding="utf-8-sig", errors="replace")
        return suffix in (".json", ".jsonl") and "conversations" in first(path)

    def entries(self) -> Iterator[Entry]:
        """See `Conversations.entries`."""
        if self.path.suffix.lower() not in (".yaml", ".yml"):
            yield from entries(self.path)
            return
        for file, strategy in mixture(self.path):
            if file.is_file():
                yield from chosen(list(entries(file)), strategy, self.seed, str(self.path))
            else:
                yield str(self.path), ValueError(f"{self.path}: {file} does not exist")

    def row(self, entry: dict[str, Any], place: str) -> Row:
        """See `Conversations.row`."""
        return conversation(entry, place)


def mixture(path: Path) -> list[tuple[Path, str]]:
    """(file, sampling strategy) of each entry of a mixture file.

    Raises:
        ValueError: the file is not a valid mixture.
    """
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["datasets"]
        return [
            (path.parent / entry["json_path"], str(entry.get("sampling_strategy", "all")))
            for entry in listed
        ]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a valid mixture ({error!r}); expected datasets: [{{json_path: ..., "
            "sampling_strategy: all}]"
        ) from error


def chosen(found: list[Any], strategy: str, seed: int, place: str) -> list[Any]:
    """Some of the rows.

    Args:
        found: all of them.
        strategy: "all", or "first", "end" or "random" with ":N" or ":N%".
        seed: of "random".
        place: for errors.

    Raises:
        ValueError: the strategy is unknown.
    """
    kind, _, amount = strategy.partition(":")
    if kind not in STRATEGIES or (kind != "all" and not amount.removesuffix("%").isdigit()):
        raise ValueError(
            f"{place}: sampling_strategy is {strategy!r}, expected all, first:N, end:N or random:N "
            "with a number or a percentage"
        )
    if kind == "all":
        return found
    number = int(amount.removesuffix("%"))
    count = -(-len(found) * number // 100) if amount.endswith("%") else number
    if kind == "random":
        found = random.Random(seed).sample(found, len(found))
    return found[-count:] if kind == "end" and count else found[:count]


def conversation(row: dict[str, Any], place: str) -> Row:
    """A row of LLaVA's format in the form of `Row`.

    Raises:
        ValueError: it is not valid.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place} has no conversations, expected a list of from and value")
    messages = []
    for turn in turns:
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"{place} holds the turn {json.dumps(turn)[:80]}, expected "
                '{"from": "human" or "gpt", "value": text}'
            )
        messages.append({"role": role, "content": turn["value"]})
    media = []
    for kind in ("image", "audio"):
        items = row.get(kind) or []
        media += [
            {"type": kind, kind: item} for item in (items if isinstance(items, list) else [items])
        ]
    return {"messages": placed(messages, media, place)}
