"""Robot state encoder: a vector of joint angles, gripper and object positions to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from encoders.checks import Count
from encoders.encoder import Encoder
from encoders.features import Features, Prepared


@dataclass(frozen=True)
class StateInput:
    """An already normalised state vector as a tensor.

    Args:
        size: length S of the state vector.
    """

    size: int

    def __call__(self, item: Any) -> Prepared:
        """The state [S] float32.

        Args:
            item: S numbers, already normalised (see adapters.normalize).
        Raises:
            ValueError: another length, or NaN or infinite entries.
        """
        state = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        if state.shape != (self.size,):
            raise ValueError(
                f"StateEncoder: state is {list(state.shape)}, expected [{self.size}]; "
                "is it the same robot and simulator the model was trained on?"
            )
        if state.dtype.kind not in "fiu":
            raise ValueError(f"StateEncoder: state dtype is {state.dtype}, expected numbers")
        if not np.isfinite(state).all():
            bad = np.flatnonzero(~np.isfinite(state)).tolist()
            raise ValueError(f"StateEncoder: state is not finite at {bad}; check the sensor")
        return Prepared("state", torch.from_numpy(state.astype(np.float32)))


class StateEncoder(Encoder):
    """Encodes an already normalised state vector with a two-layer perceptron.

    Args:
        size: length S of the state vector.
        dim: token width E; None: no perceptron, the vector is the only token and E is S, for
            policies whose adapter projects the state.
        tokens: number of tokens N given per state.
        hidden: width of the hidden layer.
    """

    kind = "state"

    def __init__(
        self, size: Count, dim: Count | None = 192, tokens: Count = 1, hidden: Count = 256
    ) -> None:
        super().__init__()
        width = size if dim is None else dim
        if dim is None and tokens != 1:
            raise ValueError(f"StateEncoder: tokens={tokens} with dim=None; expected 1")
        self.size, self.dim, self.tokens = size, width, tokens
        self.preprocess = StateInput(size)
        self.layers = nn.Sequential()
        if dim is not None:
            self.layers.extend(
                [nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, tokens * dim)]
            )

    def forward(self, items: Sequence[Prepared]) -> Features:
        """Tokens [B N E], all real, of B states [S].

        Raises:
            ValueError: no states, or one of another shape.
        """
        if len(items) == 0:
            raise ValueError("StateEncoder: no states; pass at least one prepared state")
        for index, item in enumerate(items):
            if item.tensor.shape != (self.size,):
                shape = list(item.tensor.shape)
                raise ValueError(f"StateEncoder: state {index} is {shape}, expected [{self.size}]")
        states = torch.stack([item.tensor for item in items])  # [B S]
        weight = next(self.parameters(), states)
        states = states.to(weight.device, weight.dtype)
        tokens = rearrange(self.layers(states), "B (N E) -> B N E", N=self.tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens, mask)

    @classmethod
    def tiny(cls) -> Self:
        """An encoder of 4 numbers to 2 tokens of width 32."""
        return cls(4, dim=32, tokens=2, hidden=16)

    @staticmethod
    def example(seed: int = 0) -> np.ndarray:
        """A random [4] float32 state, the size `tiny()` takes."""
        return np.random.default_rng(seed).standard_normal(4).astype(np.float32)
