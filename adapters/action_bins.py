"""Uniform binning of continuous robot actions to token ids (RT-2, OpenVLA, Dream-VLA)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from encoders.checks import AtLeast, AtMost, CountOrZero, check_arguments

Bound = Annotated[float, AtLeast(-1e9), AtMost(1e9)]


class ActionBins:
    """Encodes normalized actions as one token id per number, and decodes ids to bin centres.

    `bins` edges are evenly spaced from `low` to `high`; a number is encoded as the count d of edges
    at or below it, 1 to `bins`. There are `bins - 1` centres between the edges, so the last two ids
    (d = bins - 1 and d = bins, for `high` itself) decode to the same centre. Ids are contiguous; in
    the published models they decrease with the number, and `last_id` is the lowest number.

    Source: DreamLM/Dream-VLX: vla/prismatic/vla/action_tokenizer.py (as in moojink/openvla-oft).
    There id = N - d, hence last_id = N - 1: 151922 for Dream-VLA, 31999 for OpenVLA.

    Args:
        bins: number of ids.
        low: smallest number; smaller ones are clipped.
        high: largest number; larger ones are clipped.
        last_id: largest id; None: `bins - 1`, so that ids start at 0.
        reverse: ids decrease as numbers increase, as in the published models.
    """

    def __init__(
        self,
        bins: Annotated[int, AtLeast(2), AtMost(2**20)] = 256,
        low: Bound = -1.0,
        high: Bound = 1.0,
        last_id: CountOrZero | None = None,
        reverse: bool = True,
    ) -> None:
        check_arguments(
            type(self),
            {"bins": bins, "low": low, "high": high, "last_id": last_id, "reverse": reverse},
        )
        last_id = bins - 1 if last_id is None else last_id
        if not low < high:
            raise ValueError(f"ActionBins: bins from {low} to {high}, expected low < high")
        if last_id < bins - 1:
            raise ValueError(
                f"ActionBins: last_id is {last_id}, expected at least bins - 1 ({bins - 1})"
            )
        self.bins, self.low, self.high, self.reverse = bins, float(low), float(high), reverse
        self._edges = np.linspace(low, high, bins)
        self.centers = (self._edges[:-1] + self._edges[1:]) / 2  # [bins - 1] float64, ascending
        self.ids = range(last_id - bins + 1, last_id + 1)

    def encode(self, actions: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Token ids of normalized actions, in row-major order.

        Args:
            actions: float [... K A]; numbers outside [low, high] are clipped.
        Returns:
            [... K*A] int64, a tensor for a tensor and an array for an array.
        Raises:
            ValueError: a number is NaN or infinite, or there is no [K A] to flatten.
        """
        if actions.ndim < 2:
            raise ValueError(
                f"ActionBins: actions have shape {list(actions.shape)}, expected [... K A]"
            )
        values = torch.as_tensor(actions).to(
            torch.float64
        )  # in float32, numbers at edges change bins
        if not bool(values.isfinite().all()):
            raise ValueError(
                "ActionBins: actions contain NaN or infinity; drop or repair the frame"
            )
        edges = torch.as_tensor(self._edges, device=values.device)
        digits = torch.bucketize(values.clamp(self.low, self.high), edges, right=True)
        ids = (self.ids.stop - digits if self.reverse else self.ids.start - 1 + digits).flatten(-2)
        return ids if isinstance(actions, Tensor) else ids.numpy()

    def decode(
        self, ids: Tensor | np.ndarray, K: int, A: int, strict: bool = False
    ) -> Tensor | np.ndarray:
        """Bin centres of token ids.

        Args:
            ids: [... K*A] int64.
            K: actions per chunk.
            A: action size.
            strict: raise for ids that are not actions. Otherwise they are clipped to the nearest
                end, as in the published models: a wrong token decodes to an extreme action.
        Returns:
            [... K A] float32 in (low, high), a tensor for a tensor and an array for an array.
        Raises:
            ValueError: the count of ids is not K*A, or `strict` and an id is outside `self.ids`.
        """
        tokens = torch.as_tensor(ids)
        if tokens.ndim < 1 or tokens.shape[-1] != K * A or tokens.is_floating_point():
            raise ValueError(
                f"ActionBins: ids are {tokens.dtype} {list(tokens.shape)}, expected integers "
                f"[... {K * A}] for {K} actions of size {A}"
            )
        if strict:
            outside = tokens[(tokens < self.ids.start) | (tokens >= self.ids.stop)]
            if outside.numel():
                raise ValueError(
                    f"ActionBins: {outside.numel()} ids are not actions, the first is "
                    f"{int(outside[0])}; actions are {self.ids.start} to {self.ids.stop - 1}; "
                    "restrict the logits to these columns while decoding"
                )
        digits = self.ids.stop - tokens if self.reverse else tokens - self.ids.start + 1
        centers = torch.as_tensor(self.centers, device=tokens.device, dtype=torch.float32)
        values = centers[(digits - 1).clamp(0, self.bins - 2)].unflatten(-1, (K, A))
        return values if isinstance(ids, Tensor) else values.numpy()
