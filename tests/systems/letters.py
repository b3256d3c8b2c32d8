"""A tokenizer of single letters with control tokens at chosen ids, for tiny published folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor

from mmdlm.messages import Media

FIRST = 3
"""Id of the letter a; a space and the other characters that templates need follow z."""


def write(folder: Path, size: int, control: Mapping[str, int], more: str = " .,\n") -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        folder: of the checkpoint.
        size: number of ids.
        control: control tokens and their ids.
        more: characters after the letters.
    """
    letters = "abcdefghijklmnopqrstuvwxyz" + more
    vocab = {letter: FIRST + i for i, letter in enumerate(letters)}
    taken = {*vocab.values(), *control.values()}
    vocab |= {f"unused{i}": i for i in range(size) if i not in taken}
    vocab |= dict(control)
    assert len(vocab) == len(set(vocab.values())) == size
    made = Tokenizer(BPE(vocab, [], unk_token="unused0"))
    made.decoder = Fuse()
    made.add_special_tokens([AddedToken(text, special=True) for text in control])
    made.save(str(folder / "tokenizer.json"))


def spelled(
    parts: Iterable[Tensor | Media], control: Mapping[str, int], letters: str | Mapping[int, str]
) -> str:
    """The text of a prompt, with "<image>" in the place of each image.

    Args:
        parts: of `Processor.prompt`.
        control: control tokens and their ids.
        letters: text of every other id.
    """
    names = {number: text for text, number in control.items()}
    return "".join(
        "<image>"
        if isinstance(part, Media)
        else "".join(names.get(i) or letters[i] for i in part.tolist())
        for part in parts
    )
