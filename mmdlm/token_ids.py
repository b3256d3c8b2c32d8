"""Checks of token ids."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab: int, name: str) -> None:
    """Checks that token ids are rows of the embedding, before they reach it.

    On a GPU an id outside of the embedding ends the process.

    Args:
        ids: integers of any shape.
        vocab: rows of the embedding.
        name: what holds the ids, for the error.
    Raises:
        TypeError: the ids are not integers.
        ValueError: an id is negative or too large; the error names it and its position.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} holds {ids.dtype}, expected token ids (int64)")
    outside = (ids < 0) | (ids >= vocab)
    if bool(outside.any()):
        at = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds the id {int(ids[tuple(at)])} at position {at}, expected 0 to "
            f"{vocab - 1}, the rows of this model's embedding; encode the text with the tokenizer "
            "of this checkpoint (-100 marks labels, it is not a token)"
        )
