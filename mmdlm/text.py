"""Text to token ids and back, from a checkpoint's own tokenizer files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

PAD, END, MASK = "<pad>", "<eos>", "<mask>"


class Tokenizer:
    """Encodes and decodes text with a `tokenizer.json`.

    Args:
        backend: the loaded tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # A word-level vocabulary has no way to spell a new word, so it must be refused.
        self.words = backend.get_vocab() if _is_word_level(backend) else None

    @classmethod
    def from_words(cls, words: Sequence[str], actions: int = 0) -> Tokenizer:
        """A word-level tokenizer: pad, end, mask, the words, then the action ids.

        Args:
            words: distinct lower-case words and punctuation marks.
            actions: number of action ids appended as `<action_0>`, `<action_1>`, ...
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, normalizers, pre_tokenizers

        entries = [PAD, END, MASK, *sorted(set(words))]
        entries += [f"<action_{i}>" for i in range(actions)]
        backend = Backend(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token=PAD))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return cls(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder, or None when it holds no `tokenizer.json`."""
        file = folder / "tokenizer.json"
        if not file.exists():
            return None
        from tokenizers import Tokenizer as Backend

        return cls(Backend.from_file(str(file)))

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`."""
        self.backend.save(str(folder / "tokenizer.json"))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def id(self, token: str) -> int | None:
        """The id of a token, None when the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the vocabulary is a word list and lacks a word of the text.
        """
        if self.words is not None:
            self._check(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        if self.words is None:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        tokens = (self.backend.id_to_token(int(i)) for i in ids)
        text = " ".join(t for t in tokens if t and not t.startswith("<"))
        for mark in ",.?!":
            text = text.replace(f" {mark}", mark)
        return text

    def _check(self, text: str) -> None:
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(text.lower())
        unknown = sorted({w for w, _ in pieces if w not in self.words})
        if unknown:
            near = {w: difflib.get_close_matches(w, self.words, 3, 0.6) for w in unknown}
            hints = "; ".join(
                f"{w!r}" + (f" (near: {', '.join(n)})" if n else "") for w, n in near.items()
            )
            raise ValueError(
                f"text {text!r}: this model's vocabulary of {len(self.words)} words lacks {hints}; "
                "use its words (mmdlm info shows them)"
            )


def _is_word_level(backend: Any) -> bool:
    return type(backend.model).__name__ == "WordLevel"
