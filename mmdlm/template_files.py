"""Chat templates in the files of a checkpoint, with the precedence they have in transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdlm.files import present, read_json, read_text

CHAT, MORE_CHATS = "chat_template.jinja", "additional_chat_templates"
# Files of processors, which have the key "chat_template"; AutoTokenizer does not read them.
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")


def find(folder: Path, own: Any) -> str | None:
    """The chat template of a checkpoint, of several the one named "default"; None without any.

    `CHAT` and `MORE_CHATS`/*.jinja replace what tokenizer_config.json holds. A processor's template
    is used where there is no other. It warns where those differ.

    Args:
        folder: the checkpoint.
        own: "chat_template" of tokenizer_config.json: a text, or texts by name.

    Raises:
        ValueError: none of several is named "default", or a file is damaged.
    """
    files = {file.stem: file for file in sorted(folder.glob(f"{MORE_CHATS}/*.jinja"))}
    if present(folder / CHAT):
        files = {"default": folder / CHAT} | files
    if files:
        return _default({name: read_text(file) for name, file in files.items()}, folder)
    read = [file for file in PROCESSOR_FILES if present(folder / file)]
    others = {file: read_json(folder / file).get("chat_template") for file in read}
    found = {f: _default(t, folder) for f, t in {"tokenizer_config.json": own, **others}.items()}
    found = {file: template for file, template in found.items() if template is not None}
    if len(set(found.values())) > 1:
        warnings.warn(
            f"{folder}: the chat templates of {' and '.join(found)} differ; using the first. Write "
            f"the right one to {CHAT}",
            stacklevel=2,
        )
    return next(iter(found.values()), None)


def _default(found: Any, folder: Path) -> str | None:
    """One template: the text itself, or that of several which is named "default"."""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if not isinstance(found, Mapping):
        return found or None
    if "default" not in found:
        raise ValueError(
            f"{folder}: chat templates {sorted(found)}, none is named 'default'; write the one "
            f"to use to {CHAT}"
        )
    return found["default"]
