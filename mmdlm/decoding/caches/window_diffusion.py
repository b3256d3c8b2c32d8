"""Compute a few masks, see some more, and leave out the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.decoding.compatibility import any_order
from mmdlm.decoding.numerics import first
from mmdlm.decoding.recompute import anew
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Refresh, Strategy, Window


@dataclass(frozen=True)
class WindowDiffusion(Strategy):
    """Recomputes the first masks and the latest tokens; masks far behind are not even seen.

    An answer is filled in phases of `every` steps, without blocks. The first step of a phase is a
    full pass that may commit anywhere. Then the phase's window is fixed: all that is known and the
    first `window` masks; nothing else is attended to until the next phase. In each further step,
    only the first `active` masks and the tokens committed since the phase began are computed, and
    only those masks may commit. Approximate: the other rows keep the keys and values of the full
    pass. In a shifted family the rows before the masks, which score them, are computed with them.

    The lists of rows differ in each row of a batch; a step costs as much as the longest. Commit
    rules that share the answer over a number of steps count all steps of all phases.

    Source: vhicrgit/Window-Diffusion: llada/model/modeling_llada.py (build_window_plan,
    update_window_plan, generate); its Dream settings are active=32, window=128.

    Args:
        active: masks computed in a step.
        window: masks that can be seen in a phase, at least `active`.
        every: steps of a phase, `refresh_cycle`.
    """

    paper: ClassVar[str] = "Window-Diffusion, arXiv 2601.20332"
    excludes: ClassVar[tuple[str, ...]] = ("edit",)  # a token kept here would not see its change

    active: int = 16
    window: int = 64
    every: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.window:
            raise ValueError(
                f"WindowDiffusion.active is {self.active} of a window of {self.window}, expected "
                "at least 1 and no more than the window"
            )
        if self.every < 1:
            raise ValueError(f"WindowDiffusion.every is {self.every}, expected at least 1")

    def begin(self, state: DecodeState) -> None:
        """Checks the model.

        Raises:
            ValueError: the answer is made in blocks that do not see those behind them.
        """
        any_order(self, state)

    def plan(self, state: DecodeState) -> Window:
        """The whole answer; an empty window when nothing is masked."""
        return Window(state.prompt if bool(state.left.any()) else state.length, state.length)

    def refresh(self, state: DecodeState) -> Refresh:
        """All rows, or the active ones, which see the window."""
        memory, left = state.memory, state.left
        began, seen, known = ((self, name) for name in ("began", "seen", "known"))
        if state.block_step % self.every == 0 or began not in memory:
            memory[began] = left
            memory.pop(seen, None)
            return anew(state)
        if seen not in memory:
            memory[seen], memory[known] = first(left, self.window) | ~left, ~left
            latest = memory[began] & ~left  # of the full pass: active for this step only
        else:
            latest = ~left & ~memory[known]
        masks = first(left, self.active)
        rows = masks | (latest & memory[seen])
        if state.model.spec.shift:
            rows |= masks.roll(-1, 1)
        return Refresh(0, state.length, cached=True, rows=rows, seen=memory[seen])
