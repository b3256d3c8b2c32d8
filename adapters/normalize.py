"""Normalization of actions and robot state with statistics of the data, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
LARGEST = 1e12  # of a statistic; robots have units such as metres and radians
# What each mode needs. "quantile" is named bounds_q99 and "zscore" normal in the published code.
NEEDS = {
    "quantile": ("q01", "q99"),
    "bounds": ("min", "max"),
    "zscore": ("mean", "std"),
    "identity": (),
}


class Normalizer:
    """Normalizes vectors of one feature, and converts them back to robot units.

    With low, high = q01, q99 ("quantile") or min, max ("bounds") and range = high - low + 1e-8:
    y = clip(2 (x - low) / range - 1, -1, 1), and back x = (y + 1) / 2 range + low, not clipped.
    "zscore" is (x - mean) / (std + 1e-8). Dimensions outside the mask (a gripper that opens or
    closes) pass unchanged.

    Source: DreamLM/Dream-VLX: vla/prismatic (as in moojink/openvla-oft).

    Args:
        statistics: a list per dimension under "mean", "std", "min", "max", "q01", "q99", and maybe
            "mask"; see `NEEDS` for those of each mode.
        mode: "quantile", "bounds", "zscore" or "identity".
        mask: True for each dimension to normalise; `statistics["mask"]`, else all, when not given.
        zero_constant: whether dimensions that never moved in the data (min == max) normalise to 0
            under "quantile" and "bounds", as in the published training code; the published
            policies do not do so at inference.
    Raises:
        KeyError: statistics that the mode needs are missing.
        ValueError: the mode is unknown, or lists differ in length or hold NaN.
    """

    def __init__(
        self,
        statistics: dict[str, Any],
        mode: str = "quantile",
        mask: list[bool] | None = None,
        zero_constant: bool = True,
    ) -> None:
        if mode not in NEEDS:
            raise ValueError(f"Normalizer: mode is {mode!r}, expected one of {list(NEEDS)}")
        missing = [name for name in NEEDS[mode] if name not in statistics]
        if missing:
            raise KeyError(
                f"Normalizer: mode {mode!r} needs {missing}, but the statistics hold "
                f"{sorted(statistics)}; compute them from the data (Episodes.statistics) or choose "
                f"another of the modes {list(NEEDS)}"
            )
        if not isinstance(zero_constant, bool):
            raise ValueError(f"Normalizer: zero_constant is {zero_constant!r}, expected a bool")
        self.mode, self.zero_constant, self.statistics = mode, zero_constant, dict(statistics)
        mask = statistics.get("mask") if mask is None else mask
        self._mask = None if mask is None else _vector("mask", mask, torch.bool)
        self._values = {
            name: _vector(name, statistics[name], torch.float64)
            for name in {*NEEDS[mode], *({"min", "max"} & set(statistics))}
        }
        sizes = {name: value.numel() for name, value in self._values.items()}
        if self._mask is not None:
            sizes["mask"] = self._mask.numel()
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Normalizer: statistics have sizes {sizes}, expected one common size")
        for name, value in self._values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"Normalizer: statistics {name!r} hold NaN or infinity")
            if value.abs().max() > LARGEST:
                raise ValueError(
                    f"Normalizer: statistics {name!r} hold {value.abs().max().item():g}, expected "
                    f"numbers up to {LARGEST:g}"
                )
        self._check_order()
        self.size: int | None = next(iter(sizes.values()), None)  # None: identity takes any

    def _check_order(self) -> None:
        """Raises unless no lower bound is above its upper bound and no deviation is negative."""
        for low, high in (("q01", "q99"), ("min", "max")):
            if {low, high} <= self._values.keys():
                wrong = (self._values[low] > self._values[high]).nonzero().flatten().tolist()
                if wrong:
                    raise ValueError(
                        f"Normalizer: {low} is above {high} in dimensions {wrong}; compute the "
                        "statistics again"
                    )
        if "std" in self._values and bool((self._values["std"] < 0).any()):
            raise ValueError("Normalizer: std holds negative numbers; compute the statistics again")

    def normalize(self, x: Tensor) -> Tensor:
        """Normalized values.

        Args:
            x: [... S] in robot units.
        Returns:
            [... S] in [-1, 1] ("quantile", "bounds"), of the type of `x`; float32 for integers.
        Raises:
            ValueError: the last axis does not fit the statistics.
        """
        x = self._checked(x)
        if self.mode == "identity":
            return x
        if self.mode == "zscore":
            mean, std = self._pair(x)
            return self._where(x, (x - mean) / (std + EPS))
        low, high = self._pair(x)
        y = self._where(x, (2 * (x - low) / (high - low + EPS) - 1).clamp(-1, 1))
        still = self._still()
        return y if still is None else torch.where(still.to(x.device), torch.zeros_like(y), y)

    def unnormalize(self, y: Tensor) -> Tensor:
        """Values in robot units; the exact inverse of `normalize` for values inside the bounds.

        Args:
            y: [... S] normalised; not clipped.
        Raises:
            ValueError: the last axis does not fit the statistics.
        """
        y = self._checked(y)
        if self.mode == "identity":
            return y
        if self.mode == "zscore":
            mean, std = self._pair(y)
            return self._where(y, y * (std + EPS) + mean)
        low, high = self._pair(y)
        return self._where(y, 0.5 * (y + 1) * (high - low + EPS) + low)

    def to_dict(self) -> dict[str, Any]:
        """Dict of plain types for statistics.json, the inverse of `from_dict`."""
        mask = None if self._mask is None else self._mask.tolist()
        return {
            "mode": self.mode,
            "mask": mask,
            "zero_constant": self.zero_constant,
            "statistics": self.statistics,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Normalizer:
        """Normalizer from the result of `to_dict`.

        Raises:
            KeyError: an entry is missing.
        """
        if "statistics" not in saved or "mode" not in saved:
            raise KeyError(
                f"Normalizer: expected the entries 'mode' and 'statistics', found {sorted(saved)}; "
                "published dataset_statistics.json files are read with adapters.normalize.choose"
            )
        return cls(
            saved["statistics"],
            saved["mode"],
            saved.get("mask"),
            saved.get("zero_constant", True),
        )

    def _pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        first, second = NEEDS[self.mode]
        return tuple(self._values[name].to(like.device, like.dtype) for name in (first, second))

    def _where(self, untouched: Tensor, changed: Tensor) -> Tensor:
        if self._mask is None:
            return changed
        return torch.where(self._mask.to(changed.device), changed, untouched)

    def _still(self) -> Tensor | None:
        """Constant dimensions, for which the formula would give -1 or 1."""
        if not self.zero_constant or not {"min", "max"} <= set(self._values):
            return None
        return self._values["min"] == self._values["max"]

    def _checked(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(x)
        if self.size is not None and (x.ndim == 0 or x.shape[-1] != self.size):
            raise ValueError(
                f"Normalizer: values have shape {list(x.shape)}, but the statistics describe "
                f"{self.size} dimensions; use the statistics of this robot and feature"
            )
        return x if x.is_floating_point() else x.to(torch.float32)


def _vector(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    """One number per dimension.

    Raises:
        ValueError: the values are not a list of numbers, or there are none.
    """
    is_flag = dtype == torch.bool
    if isinstance(values, list | tuple) and not all(
        isinstance(each, bool) if is_flag else isinstance(each, Real) and each is not True
        for each in values
    ):
        what = "true and false" if is_flag else "numbers"
        raise ValueError(f"Normalizer: {name!r} holds other values than {what}")
    if isinstance(values, str | Mapping | bool | None):
        raise ValueError(f"Normalizer: {name!r} is a {type(values).__name__}, expected a list")
    try:
        vector = torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"Normalizer: {name!r} is not a list of numbers ({error})") from error
    if vector.ndim != 1 or not len(vector):
        raise ValueError(
            f"Normalizer: {name!r} has shape {list(vector.shape)}, expected a list of numbers"
        )
    return vector


def choose(statistics: dict[str, Any], feature: str, dataset: str | None = None) -> dict[str, Any]:
    """Statistics of one feature in a published dataset_statistics.json.

    Args:
        statistics: {data set: {"action": {...}, "proprio": {...}}}, as read from the file.
        feature: "action" or "proprio".
        dataset: see `find_dataset`.
    Raises:
        KeyError: the data set or feature is unknown; the message lists those that exist.
    """
    name = find_dataset(statistics, dataset)
    if feature not in statistics[name]:
        raise KeyError(
            f"no statistics of {feature!r} in {name!r}; it holds {sorted(statistics[name])}"
        )
    return statistics[name][feature]


def find_dataset(statistics: dict[str, Any], dataset: str | None = None) -> str:
    """Name of a data set in a published dataset_statistics.json.

    Args:
        statistics: as read from the file, by data set.
        dataset: data set; its name with "_no_noops" is tried too. May be left out if there is one.
    Raises:
        KeyError: the data set is unknown, or None and there are several; the message lists them.
    """
    known = sorted(statistics)
    if dataset is None:
        if len(known) != 1:
            raise KeyError(f"statistics hold the data sets {known}; choose one of them")
        dataset = known[0]
    name = dataset if dataset in statistics else f"{dataset}_no_noops"
    if name not in statistics:
        raise KeyError(f"no statistics of data set {dataset!r}; the file holds {known}")
    return name
