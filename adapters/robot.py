"""Action codec and state normalization of a robot policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor

from adapters.action_bins import ActionBins
from adapters.codec import Codec
from adapters.normalize import Normalizer
from encoders.checks import AtLeast, AtMost, Checked, CountOrZero


@dataclass(frozen=True)
class Robot(Codec, Checked):
    """Action tokens and normalization statistics of a policy, saved as statistics.json.

    Args:
        bins: codec of normalized actions and token ids.
        action: normalizer of actions.
        state: normalizer of the robot state; the identity for a policy without state input.
        chunk: actions K per answer.
        tail: ids after the actions in every training answer, such as the end of the turn. They are
            decoded with the actions, which attend to them, and then discarded.
        dataset: name of the data set of the statistics, if known.
    """

    bins: ActionBins
    action: Normalizer
    state: Normalizer
    chunk: Annotated[int, AtLeast(1), AtMost(2**16)]
    tail: tuple[CountOrZero, ...] = ()
    dataset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action.size is None:
            raise ValueError(
                "Robot: the statistics of actions have no size; expected those of a mode such as "
                "'quantile'"
            )

    @property
    def action_size(self) -> int:
        """Dimension A of an action."""
        return self.action.size

    @property
    def length(self) -> int:
        """Tokens of an answer: K*A plus the tail."""
        return self.chunk * self.action_size + len(self.tail)

    @property
    def ids(self) -> range | None:
        """Token ids of actions; None (the whole vocabulary) if there is a tail."""
        return None if self.tail else self.bins.ids

    def encode(self, actions: np.ndarray) -> Tensor:
        """Token ids [K*A + tail] int64 of a chunk [K A] in robot units.

        Raises:
            ValueError: the shape is wrong, or a number is NaN or infinite.
        """
        values = torch.as_tensor(actions, dtype=torch.float32)
        if values.shape != (self.chunk, self.action_size):
            raise ValueError(
                f"actions are {list(values.shape)}, expected {[self.chunk, self.action_size]}; "
                "give the data set and the model the same chunk"
            )
        ids = self.bins.encode(self.action.normalize(values))
        return torch.cat([ids, torch.tensor(self.tail, dtype=ids.dtype)])

    def decode(self, ids: Tensor) -> np.ndarray:
        """Chunk float32 [K A] in robot units of token ids [K*A + tail]; the tail is ignored.

        Raises:
            ValueError: an id is not an action, or the number of ids is wrong.
        """
        if self.tail:
            ids = ids[: -len(self.tail)]
        values = self.bins.decode(ids, self.chunk, self.action_size, strict=True)
        return self.action.unnormalize(values).numpy().astype(np.float32)

    def normalize_state(self, state: np.ndarray) -> Tensor:
        """Normalized state [S] float32.

        Raises:
            ValueError: the size differs from the statistics, or a number is NaN.
        """
        values = torch.as_tensor(np.asarray(state), dtype=torch.float32)
        if not bool(values.isfinite().all()):
            raise ValueError(f"state {state} holds NaN or infinity; check the robot's sensors")
        return self.state.normalize(values)

    def to_dict(self) -> dict[str, Any]:
        """Dict of plain types for statistics.json."""
        return {
            "chunk": self.chunk,
            "tail": list(self.tail),
            "dataset": self.dataset,
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
        """Robot from the result of `to_dict`.

        Raises:
            KeyError: an entry is missing.
        """
        tables = {n: saved[n] for n in ("bins", "action", "state") if n in saved}
        if wrong := [n for n, table in tables.items() if not isinstance(table, dict)]:
            raise ValueError(f"statistics.json: {wrong} are not tables; export the policy again")
        missing = {"chunk", "bins", "action", "state"} - set(saved)
        # Every entry of the bins is required: a default could change the meaning of the ids.
        fields = {"bins", "low", "high", "last_id", "reverse"}
        missing |= fields - set(saved.get("bins", ()))
        if unknown := set(saved.get("bins", ())) - fields:
            raise ValueError(
                f"statistics.json has unknown bins {sorted(unknown)}; expected {fields}"
            )
        if "last_id" not in missing and saved["bins"]["last_id"] is None:
            raise ValueError("statistics.json: bins.last_id is null, expected an action id")
        if missing:
            raise KeyError(f"statistics.json lacks {sorted(missing)}; export the policy again")
        return cls(
            ActionBins(**saved["bins"]),
            Normalizer.from_dict(saved["action"]),
            Normalizer.from_dict(saved["state"]),
            saved["chunk"],
            saved.get("tail", ()),
            saved.get("dataset"),
        )
