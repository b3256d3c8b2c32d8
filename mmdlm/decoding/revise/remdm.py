"""Commit at random as noise falls, and take tokens back at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdlm.decoding.numerics import rank
from mmdlm.decoding.rng import streams
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}
"""Published remasking strength of each mode, for 1024 steps; "conf" has none."""
EPS = 1e-5


@dataclass(frozen=True)
class ReMDM(Strategy):
    """Commits masks at random as the noise of a window falls, and remasks tokens at random.

    Let a share a of the window be known before a step and b after it (both follow time, evenly from
    0 to 1). A token written in an earlier step becomes a mask with probability s, at most
    m = min(1, (1 - b) / a): s = min(eta, m) for "cap", eta m for "rescale", for "conf" m times the
    softmax over the tokens of -(probability when committed). A mask commits with probability
    (b - (1 - s) a) / (1 - a), hence so many that the share is b all the same ("conf" takes s = 0
    here). "loop" fills up to `alpha_on` until time t_on, then remasks with s = eta at that share
    until t_off, and fills the rest; time runs from 1 to 0.

    The last step commits what is left and remasks nothing, so a decode costs no more forwards than
    it has steps. Only the open window is remasked; a window that happens to be full is closed.
    Draws come from the stream of each row. For the published sampler add `Gumbel`, and `Nucleus`
    of 0.9. Fewer steps want a larger `eta`.

    Source: ReMDM (arXiv 2503.00307; kuleshov-group/remdm: diffusion.py, _ddpm_caching_update, and
    scripts/ for the values).

    Args:
        mode: how likely a token is remasked, see above.
        eta: strength; 0 remasks nothing; None: the published one of the mode.
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        budget: tokens remasked at most per row; None: no limit.
        t_on: time at which "loop" starts to remask.
        t_off: time at which it ends.
        alpha_on: known share of the window between them.
    """

    paper: ClassVar[str] = "ReMDM, arXiv 2503.00307"
    # Stopping early would be undone; a canvas of another length has another time; where the first
    # position of a shifted family opens again, these caches make all rows of a batch wait.
    excludes: ClassVar[tuple[str, ...]] = ("stop", "resize", "PrefixCache", "DualCache")
    may_idle: ClassVar[bool] = True

    mode: Literal["cap", "rescale", "conf", "loop"] = "cap"
    eta: float | None = None
    steps: int | None = None
    budget: int | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self) -> None:
        if self.mode not in ETA:
            raise ValueError(f"ReMDM.mode is {self.mode!r}, expected one of {', '.join(ETA)}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"ReMDM.eta is {self.eta}, expected a probability")
        if self.mode == "conf" and self.eta is not None:
            raise ValueError('ReMDM.eta has no effect in mode "conf"; leave it out')
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"ReMDM.steps is {self.steps}, expected at least 1")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"ReMDM.budget is {self.budget}, expected 0 or more")
        if not 0 <= self.t_off < self.t_on < 1:
            raise ValueError(
                f"ReMDM.t_on is {self.t_on} and t_off {self.t_off}, expected 0 <= t_off < t_on < 1"
            )
        if not 0 < self.alpha_on < 1:
            raise ValueError(f"ReMDM.alpha_on is {self.alpha_on}, expected between 0 and 1")
        if self.mode == "loop" and self.strength * self.alpha_on > 1 - self.alpha_on:
            raise ValueError(
                f"ReMDM.eta {self.strength} remasks more than the share 1 - alpha_on = "
                f"{1 - self.alpha_on:g} of masks can make good; lower one of them"
            )

    @property
    def strength(self) -> float:
        """Eta, given or published."""
        return ETA[self.mode] if self.eta is None else self.eta

    def begin(self, state: DecodeState) -> None:
        """Sets up the budget of each row."""
        if self.budget is not None:
            state.memory[self, "budget"] = state.commit_step.new_full(
                (len(state.tokens),), self.budget
            )

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool."""
        steps, now = self._steps(state), state.block_step
        if now >= steps - 1:
            return state.open
        return state.uniform() < self.chances(now, steps)[0]

    def revise(self, state: DecodeState) -> Tensor:
        """[B L] bool."""
        steps, now = self._steps(state), state.block_step
        none = torch.zeros_like(state.tokens, dtype=torch.bool)
        if now >= steps - 1:
            return none
        _, chance = self.chances(now, steps)
        if chance == 0:
            return none
        # Known positions and end tokens were committed by no step.
        earlier = (state.commit_step >= 0) & (state.commit_step < state.step)
        written = none.clone()
        written[:, state.prompt :] = earlier
        written &= state.within()
        draws, active = _draw(state)
        if self.mode == "conf":
            sure = state.commit_confidence.masked_fill(~earlier, torch.inf)
            sure = torch.nn.functional.pad(sure, (state.prompt, 0), value=torch.inf)
            sure = sure.masked_fill(~written, torch.inf)
            chance = chance * (-sure).softmax(1).nan_to_num(0.0)  # all -inf: nothing is written
        again = written & active & (draws < chance)
        if self.budget is not None:
            left = state.memory[self, "budget"]
            again &= rank((-draws).masked_fill(~again, -torch.inf)) < left[:, None]
            state.memory[self, "budget"] = left - again.sum(1)
        return again

    def chances(self, now: int, steps: int) -> tuple[float, float]:
        """Probability that a mask commits, and that a token is remasked (m in mode "conf").

        Args:
            now: steps done in the window.
            steps: all its steps, more than `now`.
        """
        fall = (1 - EPS) / steps
        time = 1 - now * fall
        if self.mode == "loop" and self.t_off < time <= self.t_on:
            commit = self.strength * self.alpha_on / (1 - self.alpha_on)
            return commit, self.strength
        known, then = (self._known(t, time > self.t_on) for t in (time, time - fall))
        most = min(1.0, (1 - then) / known) if known > 0 else 1.0
        remask = {
            "cap": min(self.strength, most),
            "rescale": self.strength * most,
            "conf": most,
            "loop": 0.0,
        }[self.mode]
        share = 0.0 if self.mode == "conf" else remask
        commit = (then - (1 - share) * known) / (1 - known)
        return min(max(commit, 0.0), 1.0), remask

    def _known(self, time: float, before: bool) -> float:
        """Share of the window that is known; of "loop", on its first slope or on its last."""
        if self.mode != "loop":
            return 1 - time
        if before:
            return (1 - time) * self.alpha_on / (1 - self.t_on)
        return 1 - time * (1 - self.alpha_on) / self.t_off

    def _steps(self, state: DecodeState) -> int:
        return state.share(self.steps or state.asked)


def _draw(state: DecodeState) -> tuple[Tensor, Tensor]:
    """Random numbers for every position of the window, from the stream of each row.

    Rows that wait for others draw nothing, so that they repeat what they draw alone.

    Returns:
        [B L] float32 in [0, 1), 1 outside the window; and [B 1] bool, the rows that drew.
    """
    start, stop, turn = state.window
    inside = torch.zeros_like(state.left)
    inside[:, start:stop] = True
    if turn is not None:
        inside &= state.turns == turn
    active = (state.left & inside).any(1)
    if state.streams is None:
        state.streams = streams(state.source, state.batch, state.tokens.device)
    device = state.tokens.device
    draws = torch.ones(inside.shape, device=device)
    for i in active.nonzero()[:, 0].tolist():
        stream, at = state.streams[state.rows[i]], inside[i].nonzero()[:, 0].to(device)
        draws[i, at] = torch.rand(len(at), generator=stream, device=device)
    return draws, active[:, None].to(device)
