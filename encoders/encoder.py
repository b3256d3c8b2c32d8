"""The base of every encoder: one raw item in, tokens of one modality out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from encoders.arguments import Recorded
from encoders.features import Features, Prepared

if TYPE_CHECKING:
    from encoders.merging import Merging


class Encoder(Recorded, nn.Module):
    """Turns preprocessed items into `Features`.

    Attributes:
        kind: modality, "image", "audio" or "state".
        dim: width E of the tokens it gives.
        preprocess: raw item to `Prepared`. It holds settings but no weights, so that worker
            processes and server threads can have a copy.
        float32: whether the weights stay float32 in a model of lower precision.
        KEYS: our tensor names to published ones, `{i}` for the layer, a tuple for parts that are
            stacked along the first axis; where a published layout exists.
    """

    kind: ClassVar[str]
    float32: ClassVar[bool] = False
    KEYS: ClassVar[dict[str, str | tuple[str, ...]]] = {}
    dim: int
    preprocess: Callable[[Any], Prepared]

    @property
    def attention_layer(self) -> tuple[nn.Module, int, int] | None:
        """The attention by which pruners rank the tokens; None where no hook can record it.

        The layer that projects queries, keys and values to [B N 3*E], its number of heads, and how
        many of its tokens come before those that `forward` returns.
        """
        return None

    @property
    def records_attention(self) -> bool:
        """Whether pruners can rank the tokens by the encoder's attention.

        An encoder without `attention_layer` fills `encoders.attention.recording` in its forward.
        """
        return self.attention_layer is not None

    @property
    def can_merge(self) -> bool:
        """Whether `merged` is defined for this encoder."""
        return False

    def merged(self, items: Sequence[Prepared], merging: Merging) -> tuple[Features, Tensor]:
        """Features with fewer tokens and without a grid, which are merged between the blocks.

        Args:
            items: see `forward`.
            merging: which tokens are merged.
        Returns:
            features with tokens [B K E], and [B K] int64 ascending, the place of each one on the
            row-major `grid` of the tokens of `forward`: that of one of those it is made of.
        """
        raise TypeError(f"{type(self).__name__} does not define merged(items, merging)")

    def prepare(self, item: Any) -> Prepared:
        """What `forward` takes, from one raw item; see `preprocess`."""
        return self.preprocess(item)

    def forward(self, items: Sequence[Prepared]) -> Features:
        """Features of preprocessed items, padded and masked to one length.

        An item of several views gives one row per view, in order.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(items)")

    @classmethod
    def tiny(cls) -> Self:
        """A small randomly initialised instance for tests."""
        raise TypeError(f"{cls.__name__} does not define tiny()")

    @staticmethod
    def example(seed: int = 0) -> Any:
        """A valid random raw item."""
        raise TypeError("this encoder does not define example()")
