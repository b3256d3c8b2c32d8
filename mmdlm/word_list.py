"""Text to ids and back with a vocabulary of whole words, as that of the bundled model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

MARKS = ",.?!"
"""Marks that are tokens of their own at the end of a word, and written without a space before."""
SPECIAL = re.compile(r"<(pad|eos|mask|action_\d+)>")
"""Tokens that no text contains."""
PARTS = re.compile(r"\w+|[^\w\s]+")
"""Parts of a word that is unknown as a whole."""


def pieces(text: str) -> list[str]:
    """Words of a text and the marks after them.

    `decode` joins them to the same text, but for white space: runs become one space, and none
    stays before a mark.
    """
    found = []
    for chunk in text.split():
        word = chunk.rstrip(MARKS)
        found += [*([word] if word else []), *chunk[len(word) :]]
    return found


def encode(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of a text: of each word as it stands, else in lower case, else of its parts.

    Raises:
        ValueError: a word is not in the vocabulary; the message suggests similar ones.
    """
    ids: list[int] = []
    unknown: list[str] = []
    for piece in pieces(text):
        for parts in ([piece], [piece.lower()], PARTS.findall(piece.lower())):
            if all(part in vocabulary and not SPECIAL.fullmatch(part) for part in parts):
                ids += [vocabulary[part] for part in parts]
                break
        else:
            parts = PARTS.findall(piece.lower())
            unknown += [part for part in parts if part not in vocabulary]
    if unknown:
        near = {w: difflib.get_close_matches(w, vocabulary, 3, 0.6) for w in sorted(set(unknown))}
        hints = "; ".join(
            f"{w!r}" + (f" (near: {', '.join(n)})" if n else "") for w, n in near.items()
        )
        raise ValueError(
            f"text {text!r}: this model's vocabulary of {len(vocabulary)} words lacks {hints}; "
            "use its words (mmdlm info shows them)"
        )
    return ids


def decode(tokens: Iterable[str | None]) -> str:
    """Text of tokens, without special ones."""
    text = " ".join(token for token in tokens if token and not SPECIAL.fullmatch(token))
    for mark in MARKS:
        text = text.replace(f" {mark}", mark)
    return text


def missing(words: Iterable[str], vocabulary: Mapping[str, int]) -> list[str]:
    """The words that a vocabulary does not have as they stand, sorted.

    A vocabulary of lower-case words also lacks "The": its answers would have no capitals.
    """
    return sorted({word for word in words if word not in vocabulary})


def check_new(words: Sequence[str]) -> None:
    """Raises ValueError if a new word would be read as a special token or as several words."""
    wrong = [word for word in words if SPECIAL.fullmatch(word) or pieces(word) != [word]]
    if wrong:
        raise ValueError(f"{wrong[0]!r} cannot be a word of the vocabulary; leave it out")


def backend(entries: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a word list, in which an entry's place is its id."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    made = Backend(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<pad>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made
