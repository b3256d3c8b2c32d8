"""Robot units on one side, token ids and normalised state on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from adapters.action_bins import ActionBins
from adapters.codec import Codec
from adapters.normalize import Normalizer


@dataclass(frozen=True)
class Robot(Codec):
    """What a policy needs beside its weights; it travels with them as statistics.json.

    Args:
        bins: between normalised actions and token ids.
        action: normaliser of actions.
        state: normaliser of the robot's state.
        chunk: actions K per answer.
    """

    bins: ActionBins
    action: Normalizer
    state: Normalizer
    chunk: int

    @property
    def action_size(self) -> int:
        """A, numbers per action."""
        return self.action.size

    @property
    def length(self) -> int:
        """Tokens K*A of an answer."""
        return self.chunk * self.action_size

    @property
    def ids(self) -> range:
        """The token ids of actions."""
        return self.bins.ids

    def encode(self, actions: np.ndarray) -> Tensor:
        """Token ids [K*A] int64 of a chunk [K A] in robot units.

        Raises:
            ValueError: another shape, or a number is NaN or infinite.
        """
        values = torch.as_tensor(actions, dtype=torch.float32)
        if values.shape != (self.chunk, self.action_size):
            raise ValueError(
                f"actions are {list(values.shape)}, expected {[self.chunk, self.action_size]}; "
                "give the data set and the model the same chunk"
            )
        return self.bins.encode(self.action.normalize(values))

    def decode(self, ids: Tensor) -> np.ndarray:
        """Chunk float32 [K A] in robot units of token ids [K*A].

        Raises:
            ValueError: an id is no action, or there are more or fewer than K*A.
        """
        values = self.bins.decode(ids, self.chunk, self.action_size, strict=True)
        return self.action.unnormalize(values).numpy().astype(np.float32)

    def normalize_state(self, state: np.ndarray) -> Tensor:
        """Normalised state [S] float32.

        Raises:
            ValueError: the size differs from the statistics, or a number is NaN.
        """
        values = torch.as_tensor(np.asarray(state), dtype=torch.float32)
        if not bool(values.isfinite().all()):
            raise ValueError(f"state {state} holds NaN or infinity; check the robot's sensors")
        return self.state.normalize(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for statistics.json."""
        return {
            "chunk": self.chunk,
            "bins": {
                "bins": self.bins.bins,
                "low": self.bins.low,
                "high": self.bins.high,
                "last_id": self.bins.ids.stop - 1,
                "reverse": self.bins.reverse,
            },
            "action": self.action.to_dict(),
            "state": self.state.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The robot that `to_dict` described.

        Raises:
            KeyError: an entry is missing.
        """
        missing = {"chunk", "bins", "action", "state"} - set(saved)
        # Every entry of the bins is needed: a default would turn ids into other actions.
        missing |= {"bins", "low", "high", "last_id", "reverse"} - set(saved.get("bins", ()))
        if missing:
            raise KeyError(f"statistics.json lacks {sorted(missing)}; export the policy again")
        return cls(
            ActionBins(**saved["bins"]),
            Normalizer.from_dict(saved["action"]),
            Normalizer.from_dict(saved["state"]),
            saved["chunk"],
        )
