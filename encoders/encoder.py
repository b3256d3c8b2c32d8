"""The base of every encoder: one raw item in, tokens of one modality out."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from encoders.features import Features
from encoders.rebuild import Rebuildable


class Encoder(Rebuildable, nn.Module):
    """Turns prepared raw items into `Features`.

    Attributes:
        kind: modality, "image", "audio" or "state".
        dim: width E of the tokens it gives.
        KEYS: our tensor names to published ones, `{i}` for the layer, a tuple for parts that are
            stacked along the first axis; where a published layout exists.
    """

    kind: ClassVar[str]
    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {}
    dim: int

    def prepare(self, item: Any) -> Tensor:
        """The float tensor `forward` takes, from one raw item, on the CPU."""
        raise TypeError(f"{type(self).__name__} does not define prepare(item)")

    def forward(self, items: list[Tensor]) -> Features:
        """Features of prepared items; items of unequal length are padded and masked."""
        raise TypeError(f"{type(self).__name__} does not define forward(items)")

    @classmethod
    def tiny(cls) -> Self:
        """A small randomly initialised instance for tests."""
        raise TypeError(f"{cls.__name__} does not define tiny()")

    @staticmethod
    def example(seed: int = 0) -> Any:
        """A valid random raw item."""
        raise TypeError("this encoder does not define example()")
