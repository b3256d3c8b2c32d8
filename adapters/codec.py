"""The base of every codec: values on one side, token ids on the other."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor


class Codec:
    """Turns one kind of answer into token ids and back.

    Attributes:
        ids: ids an answer may hold; None for the whole vocabulary.
        length: tokens of an answer; None where the caller decides.
    """

    ids: range | None = None
    length: int | None = None

    def encode(self, value: Any) -> Tensor:
        """Token ids [n] int64 of a value."""
        raise TypeError(f"{type(self).__name__} does not define encode(value)")

    def decode(self, ids: Tensor) -> Any:
        """The value of token ids [n]."""
        raise TypeError(f"{type(self).__name__} does not define decode(ids)")

    def to_dict(self) -> dict[str, Any]:
        """Plain types from which `from_dict` makes the codec again."""
        raise TypeError(f"{type(self).__name__} does not define to_dict()")

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The codec that `to_dict` described."""
        raise TypeError(f"{cls.__name__} does not define from_dict(saved)")
