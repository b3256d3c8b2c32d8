"""Base class of codecs, which convert values to token ids and back."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor


class Codec:
    """Base class: converts one kind of answer to token ids and back.

    Attributes:
        ids: token ids allowed in an answer; None for the whole vocabulary.
        length: tokens of an answer; None if it is variable.
    """

    ids: range | None = None
    length: int | None = None

    def encode(self, value: Any) -> Tensor:
        """Token ids [n] int64 of a value."""
        raise TypeError(f"{type(self).__name__} does not define encode(value)")

    def decode(self, ids: Tensor) -> Any:
        """Value of token ids [n]."""
        raise TypeError(f"{type(self).__name__} does not define decode(ids)")

    def to_dict(self) -> dict[str, Any]:
        """Dict of plain types, the inverse of `from_dict`."""
        raise TypeError(f"{type(self).__name__} does not define to_dict()")

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """Codec from the result of `to_dict`."""
        raise TypeError(f"{cls.__name__} does not define from_dict(saved)")
