"""Byte-level BPE: from vocab.json and merges.txt, as Qwen2 and Dream have them, or trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdlm.files import present, read_json, read_text

if TYPE_CHECKING:
    import tokenizers

# Byte-level BPE with Qwen2's pre-tokenizer; Dream uses it under another name.
# huggingface/transformers: models/qwen2/tokenization_qwen2.py
BYTE_LEVEL = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer", "DreamTokenizerFast")
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = 256
"""Tokens of single bytes, which every text can be written with."""


def byte_level(
    folder: Path, kind: str | None, added: Mapping[str, dict[str, Any]]
) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from `vocab.json` and `merges.txt`, without its added tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers

    if kind is not None and kind not in BYTE_LEVEL:
        raise ValueError(
            f"{folder}: vocab.json of {kind}, expected one of {', '.join(BYTE_LEVEL)}; add the "
            "tokenizer.json that transformers writes for this tokenizer"
        )
    if not present(folder / "merges.txt"):
        raise ValueError(f"{folder}: vocab.json without merges.txt; download the folder again")
    vocab = read_json(folder / "vocab.json")
    if wrong := [text for text, i in vocab.items() if type(i) is not int or not 0 <= i < 2**32]:
        raise ValueError(f"{folder}: vocab.json has no token id for {wrong[0][:80]!r}")
    taken = {number: text for text, number in vocab.items()}
    given = {text: entry["id"] for text, entry in added.items() if entry["id"] is not None}
    for text, number in given.items():
        if taken.setdefault(number, text) != text or vocab.get(text, number) != number:
            raise ValueError(
                f"{folder}: {text!r} has id {number} beside vocab.json, which gives that id to "
                f"{taken[number]!r} and has {text!r} at {vocab.get(text)}; the files are of "
                "different tokenizers"
            )
    # Ids in the vocabulary may have gaps; appended tokens would not.
    vocab |= given
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    wrong = next((pair for pair in merges if len(pair) != 2), None)
    if wrong is not None:
        line = " ".join(wrong)[:100]
        raise ValueError(f"{folder}: merges.txt has the line {line!r}, expected 2 parts")
    try:
        backend = Backend(models.BPE(vocab, [(a, b) for a, b in merges]))
    except Exception as error:  # of any type
        raise ValueError(
            f"{folder}: vocab.json and merges.txt are not a tokenizer ({error}); download both "
            "again"
        ) from error
    backend.normalizer = normalizers.NFC()
    _set_bytes(backend)
    return backend


def trained(
    texts: Iterable[str], size: int, special: Sequence[str], last: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """A byte-level BPE (arXiv 1508.07909, on bytes as in GPT-2) learned from texts.

    Every text decodes to itself: nothing is normalized, and each of the 256 bytes is a token.
    Equal texts in the same order give an equal tokenizer.

    Args:
        texts: what it is trained on.
        size: tokens at most, `special` and `last` included; fewer if the texts have no more pairs
            that occur twice.
        special: special tokens, which get the first ids.
        last: special tokens, which get the last ids.

    Raises:
        ValueError: `size` has no room for the bytes and special tokens, or a text holds half of a
            surrogate pair.
    """
    from tokenizers import AddedToken, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    least = BYTES + len(special) + len(last)
    if size < least:
        raise ValueError(
            f"a vocabulary of {size} tokens is too small, expected at least {least}: "
            f"{BYTES} bytes and {len(special) + len(last)} special tokens"
        )
    backend = Backend(models.BPE())
    _set_bytes(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(last),
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in last])
    return backend


def _set_bytes(backend: tokenizers.Tokenizer) -> None:
    """Lets a tokenizer split texts as Qwen2 does and read and write the parts as bytes."""
    from tokenizers import Regex, decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
