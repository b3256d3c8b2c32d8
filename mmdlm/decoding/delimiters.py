"""Delimiter tokens (line breaks) of a model."""

from __future__ import annotations

from mmdlm.model import MultimodalDLM

NEWLINES = ("Ċ", "\n", "<0x0A>")
"""How vocabularies spell a line break: byte-level, plain, byte fallback."""


def line_breaks(model: MultimodalDLM) -> list[int]:
    """Ids of the line break in a model's vocabulary, none without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return []
    return [i for i in (tokenizer.id(text) for text in NEWLINES) if i is not None]
