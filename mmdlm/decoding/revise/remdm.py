"""ReMDM: random commits along a noise schedule, and random remasking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import Above, Below, NonNegativeInt, PositiveInt, UnitFloat
from mmdlm.decoding.memory import Entry, PerRow
from mmdlm.decoding.numerics import rank
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}
"""Published remasking strength of each mode, for 1024 steps; "conf" has none."""
EPS = 1e-5


@dataclass(frozen=True)
class ReMDM(Strategy):
    """ReMDM: commits masks at random as the noise of a block falls, and remasks tokens at random.

    Let the share a of the block be known before a step and b after it (both grow linearly in time,
    from 0 to 1). A token written in an earlier step becomes a mask with probability s, at most
    m = min(1, (1 - b) / a): s = min(eta, m) for "cap", eta m for "rescale", for "conf" m times the
    softmax over the tokens of -(probability when committed). A mask commits with probability
    (b - (1 - s) a) / (1 - a), so that the expected share is b in spite of the remasking ("conf"
    takes s = 0 here). "loop" fills up to `alpha_on` until time t_on, then remasks with s = eta at
    that share until t_off, and fills the rest; time runs from 1 to 0.

    The last step commits all remaining masks and remasks nothing, so a decode takes at most as many
    forwards as steps. Only the open block is remasked; one without masks is not reopened. Draws
    come from the stream of each row. For the published sampler add `Gumbel`, and `Nucleus` of 0.9.
    With fewer steps use a larger `eta`.

    Source: ReMDM (arXiv 2503.00307; kuleshov-group/remdm: diffusion.py, _ddpm_caching_update, and
    scripts/ for the values).

    Args:
        mode: how likely a token is remasked, see above.
        eta: strength; 0 remasks nothing; None: the published one of the mode.
        steps: steps for the whole answer, split evenly over the blocks; None: one per token.
        budget: maximum number of tokens remasked per row; None: no limit.
        t_on: time at which "loop" starts to remask.
        t_off: time at which it ends.
        alpha_on: known share of the block between them.
    """

    paper: ClassVar[str] = "ReMDM, arXiv 2503.00307"
    # An early exit would be undone; the schedule is that of a fixed number of positions.
    requires: ClassVar[frozenset[str]] = frozenset({"fixed_length", "own_schedule"})
    may_idle: ClassVar[bool] = True

    mode: Literal["cap", "rescale", "conf", "loop"] = "cap"
    eta: UnitFloat | None = None
    steps: PositiveInt | None = None
    budget: NonNegativeInt | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: Annotated[float, Above(0), Below(1)] = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "conf" and self.eta is not None:
            raise ValueError('ReMDM.eta has no effect in mode "conf"; leave it out')
        if not 0 <= self.t_off < self.t_on < 1:
            raise ValueError(
                f"ReMDM.t_on is {self.t_on} and t_off {self.t_off}, expected 0 <= t_off < t_on < 1"
            )
        if self.mode == "loop" and self.strength * self.alpha_on > 1 - self.alpha_on:
            raise ValueError(
                f"ReMDM.eta {self.strength} remasks more than the share 1 - alpha_on = "
                f"{1 - self.alpha_on:g} of masks can compensate; lower one of them"
            )

    @property
    def strength(self) -> float:
        """Eta, given or published."""
        return ETA[self.mode] if self.eta is None else self.eta

    def begin(self, view: View) -> dict[str, Entry]:
        """The number of tokens that may still be remasked in each row."""
        if self.budget is None:
            return {}
        return {"budget": PerRow(view.commit_step.new_full((len(view.tokens),), self.budget))}

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        commit, _, last = self._now(view)
        last = last.to(view.device)
        # Rows in their last step draw nothing.
        drawing = view.placed(torch.zeros_like(view.masked), view.open & ~last, True)
        draws = view.uniform_at(drawing).gather(1, view.at)
        return torch.where(last, view.open, draws < commit.to(view.device))

    def revise(self, view: View) -> Tensor:
        """[B L] bool."""
        _, remask, last = self._now(view)
        drawing = ~last & (remask > 0)
        none = torch.zeros_like(view.masked)
        if not bool(drawing.any()):
            return none
        # Known positions and end tokens were committed by no step.
        step = view.step.to(view.device)[:, None]
        earlier = (view.commit_step >= 0) & (view.commit_step < step)
        written = F.pad(earlier, (view.prompt, 0)) & view.opened
        draws, chance = view.uniform_at(view.plan & drawing), remask.to(view.device)
        if self.mode == "conf":
            sure = F.pad(view.commit_confidence, (view.prompt, 0))
            sure = sure.masked_fill(~written, torch.inf)
            chance = chance * (-sure).softmax(1).nan_to_num(0.0)  # all -inf: nothing is written
        again = written & drawing.to(view.device) & (draws < chance)
        if self.budget is not None:
            mine = view.memory(self)
            left = mine["budget"]
            again &= rank((-draws).masked_fill(~again, -torch.inf)) < left[:, None]
            mine["budget"] = left - again.sum(1)
        return again

    def chances(self, now: int, steps: int) -> tuple[float, float]:
        """Probability that a mask commits, and that a token is remasked (m in mode "conf").

        Args:
            now: steps done in the block.
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
        """Share of the block that is known; of "loop", before t_on or after t_off."""
        if self.mode != "loop":
            return 1 - time
        if before:
            return (1 - time) * self.alpha_on / (1 - self.t_on)
        return 1 - time * (1 - self.alpha_on) / self.t_off

    def _now(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """[B 1] on the host: `chances` of each row, float32, and whether this is its last step."""
        steps = view.share(view.asked if self.steps is None else self.steps)
        now = view.block_step
        clocks = zip(now.tolist(), steps.tolist(), strict=True)
        found = [self.chances(min(i, n - 1), n) for i, n in clocks]
        commit, remask = torch.tensor(found)[..., None].unbind(1)
        return commit, remask, (now >= steps - 1)[:, None]
