"""Window-Diffusion: compute the first masks, attend to a window, ignore the masks after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import PositiveInt
from mmdlm.decoding.memory import Entry, PerCanvas, PerRow
from mmdlm.decoding.numerics import first
from mmdlm.decoding.positions import needed
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View


@dataclass(frozen=True)
class WindowDiffusion(Strategy):
    """Window-Diffusion: recomputes the first masks and latest tokens; attends to a window of masks.

    An answer is filled in phases of `every` steps, without blocks. The first step of a phase is a
    full pass that may commit anywhere. Then the phase's window is fixed: all that is known and the
    first `window` masks; nothing else is attended to until the next phase. In each further step,
    only the first `active` masks and the tokens committed since the phase began are computed, and
    only those masks may commit. Approximate: the other positions keep the keys and values of the
    full pass. In a shifted family the positions before the masks, which score them, are computed
    with them.

    Commit rules that share the answer over a number of steps count all steps of all phases.

    Source: vhicrgit/Window-Diffusion: llada/model/modeling_llada.py (build_window_plan,
    update_window_plan, generate); its Dream settings are active=32, window=128.

    Args:
        active: masks computed in a step.
        window: masks that can be seen in a phase, at least `active`.
        every: steps of a phase, `refresh_cycle`.
    """

    paper: ClassVar[str] = "Window-Diffusion, arXiv 2601.20332"
    requires: ClassVar[frozenset[str]] = frozenset({"any_order", "final_tokens"})
    denies: ClassVar[frozenset[str]] = frozenset({"all_scored"})
    steady: ClassVar[bool] = True

    active: PositiveInt = 16
    window: PositiveInt = 64
    every: PositiveInt = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.window:
            raise ValueError(
                f"WindowDiffusion.active is {self.active}, expected at most window ({self.window})"
            )

    def begin(self, view: View) -> dict[str, Entry]:
        """The window of each row, what its steps need not compute, and where it is in its phase."""
        everything = torch.ones_like(view.left)
        return {
            "window": PerCanvas(everything, fill=True),
            "known": PerCanvas(everything, fill=True),
            "full": PerRow(torch.zeros_like(view.has_cache)),  # the latest step was a full pass
        }

    def plan(self, view: View) -> Tensor:
        """[B L] bool, the whole answer; nothing in rows without masks."""
        return view.answer & view.left.any(1, keepdim=True)

    def refresh(self, view: View) -> Refresh:
        """All that can have changed, or the active positions, which attend to the window."""
        mine, left = view.memory(self), view.left
        full = ~view.has_cache | (view.block_step % self.every == 0)
        second = (mine["full"] & ~full)[:, None]  # in which a window is fixed
        mine["full"] = full
        latest = ~left & ~mine["known"]
        window = torch.where(second, first(left, self.window) | ~left, mine["window"])
        window = window | full[:, None]
        mine["window"] = window
        mine["known"] = torch.where(second | full[:, None], ~left, mine["known"])
        if bool(full.all()):
            return Refresh(needed(view))
        masks = first(left, self.active)
        compute = masks | (latest & window)
        if view.model.spec.shift:
            compute |= masks.roll(-1, 1)
        return Refresh(torch.where(full[:, None], needed(view), compute), attend=window)
