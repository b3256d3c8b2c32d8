"""How noise levels and masks are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from encoders.checks import Checked, NonNegativeFloat, NonNegativeInt, UnitFloat
from mmdlm.objectives.noise import Noise, stratified, uniform, uniform_at
from mmdlm.objectives.schedule import Schedule

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.objectives.objective import Batch


GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: its multiples are evenly spread over [0, 1)."""
SILVER = 0.4142135623730951
"""Fractional part of the square root of 2, whose multiples are evenly spread like `GOLDEN`'s."""
BLOCK = 1 << 20
"""More turns than a row has."""
ROUNDING = {"exact": Tensor.ceil, "rounded": Tensor.round, "floored": Tensor.floor}


@dataclass(frozen=True)
class Draw(Checked):
    """Draws a noise level t per group of tokens, and masks tokens with probability p(t).

    t = low + (high - low) x with x from a uniform draw u. It depends on the row's seed and its
    place in the global batch only (except with spread "stratified").

    Args:
        level: x. "uniform": u. "logit_normal": sigmoid(z), z standard normal. "mode":
            1 - u - s (cos^2(pi u / 2) - 1 + u), s = mode_scale. The last two are options of
            jacklishufan/LaViDa: llava/model/language_model/llava_llada.py.
        mode_scale: s of "mode".
        per: tokens that share a level. "turn": a dialogue turn, or a packed document (SDAR).
            "row": all turns of a batch row (LLaDA-V). "block": a block of the model's block-wise
            attention (BD3-LM). "padding": the padding of an answer, which is the last token of the
            row as often as it is repeated, apart from what is before it (Lumina-DiMOO).
        spread: "antithetic": levels are evenly spread over the global batch, and each is uniform.
            "independent": LLaDA, d1, LaViDa. "stratified": u = (u_i + i) / n mod 1 over the n
            levels that this process draws (MDLM, BD3-LM), which depends on the batch.
        count: "bernoulli": each token for itself. "exact": p n of the n tokens, rounded up, so that
            all numbers are equally probable with uniform levels (LLaDA's likelihood). "rounded":
            p n to the nearest number, at least 1 (MMaDA's image tokens). "floored": p n rounded
            down, at least 1 (Lumina-DiMOO). With these, p becomes the share that is masked.
        at_least_one: where no token would be masked, the one with the lowest random number is
            (LaViDa, SDAR).
        clip: low and high (BD3-LM's clipped schedule); None for eps of the objective and 1.
        whole: groups of at most this number of tokens are masked entirely, unless they are padding
            (5 in Lumina-DiMOO); needs a `count` other than "bernoulli".
    """

    level: Literal["uniform", "logit_normal", "mode"] = "uniform"
    mode_scale: NonNegativeFloat = 1.29
    per: Literal["turn", "row", "block", "padding"] = "turn"
    spread: Literal["antithetic", "independent", "stratified"] = "antithetic"
    count: Literal["bernoulli", "exact", "rounded", "floored"] = "bernoulli"
    at_least_one: bool = False
    clip: tuple[UnitFloat, UnitFloat] | None = None
    whole: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Checks the fields, and that the clipped levels are a range."""
        super().__post_init__()
        if self.clip is not None and self.clip[0] > self.clip[1]:
            raise ValueError(f"Draw.clip is {self.clip}, expected the lower level first")
        if self.whole and self.count == "bernoulli":
            raise ValueError("Draw.whole needs a number of masked tokens; set count")

    def __call__(self, batch: Batch, schedule: Schedule, eps: float, full: float) -> Noise:
        """The noise of a batch.

        Args:
            batch: its answer tokens can be masked.
            schedule: mask probability of a level.
            eps: lowest level, without `clip`.
            full: share of groups that are masked entirely.
        """
        sequence = batch.sequence
        maskable = sequence.is_answer
        group = self.groups(sequence)
        p, slope = schedule(self.levels(batch, group, eps))
        if full:
            whole = uniform_at(batch.seeds, group, stream=2) < full
            p, slope = p.masked_fill(whole, 1.0), slope.masked_fill(whole, 1.0)
        # Counted from the right, so that padding on the left does not change a draw.
        noise = uniform(batch.seeds, group.shape[1], stream=3).flip(1)
        masked = noise < p
        if self.count != "bernoulli" or self.at_least_one:
            rank, size = ranks(noise, group, maskable)
            if self.count == "bernoulli":
                masked |= rank == 0
            else:
                number = ROUNDING[self.count](p * size)
                is_padding = (group >= BLOCK) & (self.per == "padding")
                number = number.where((size > self.whole) | is_padding, size.to(number))
                masked, p = rank < number.clamp(min=1), number.clamp(min=1) / size.clamp(min=1)
        return Noise(maskable & masked, maskable, sequence.mask, p.float(), slope.float())

    def groups(self, sequence: Sequence) -> Tensor:
        """[B L] int64, tokens of a row with equal numbers share a level.

        The number is turn + `BLOCK` x block, whatever the rest of the batch.
        """
        if self.per == "row":
            return torch.zeros_like(sequence.role)
        turn = turns(sequence)
        if self.per == "padding":
            repeated = (sequence.tokens == sequence.tokens[:, -1:]) & sequence.is_answer
            run = repeated.flip(1).cumprod(1).flip(1)
            return turn + BLOCK * (run * (run.sum(1, keepdim=True) > 1))
        return turn if self.per == "turn" else turn + BLOCK * sequence.level

    def levels(self, batch: Batch, group: Tensor, eps: float) -> Tensor:
        """[B L] float64 noise level of each token.

        Args:
            batch: rows with seeds and phases.
            group: [B L], see `groups`.
            eps: lowest level, without `clip`.
        """
        if self.spread == "antithetic":
            turn, block = group % BLOCK, group // BLOCK
            u = (batch.phase[:, None] + GOLDEN * turn + SILVER * block.double()) % 1
        elif self.spread == "independent":
            u = uniform_at(batch.seeds, group, stream=4)
        else:
            known, group = group.unique(return_inverse=True)
            drawn = uniform(batch.seeds, len(known), stream=4)
            u = stratified(drawn.flatten()).view_as(drawn).gather(1, group)
        low, high = (eps, 1.0) if self.clip is None else self.clip
        return (high - low) * self.shaped(u) + low

    def shaped(self, u: Tensor) -> Tensor:
        """X of each uniform draw, see `level`."""
        if self.level == "logit_normal":
            return torch.special.ndtri(u).sigmoid()
        if self.level == "mode":
            return 1 - u - self.mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        return u


def turns(sequence: Sequence) -> Tensor:
    """[B L] int64, turn of each token; 1 everywhere if no row has more than one."""
    return torch.ones_like(sequence.role) if sequence.branch is None else sequence.branch


def ranks(noise: Tensor, group: Tensor, maskable: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each maskable token by its random number within its group, and the group's size.

    Args:
        noise: [B L] in [0, 1).
        group: [B L] int64.
        maskable: [B L] bool; other tokens have no valid rank.
    Returns:
        two int64 [B L].
    """
    _, group = group.unique(return_inverse=True)  # small numbers, to which noise can be added
    beyond = group.max() + 1
    order = torch.where(maskable, group, beyond).double() + noise
    rank = order.argsort(1).argsort(1)
    sizes = torch.zeros(len(group), int(beyond), dtype=torch.long, device=group.device)
    sizes.scatter_add_(1, group, maskable.long())
    before = sizes.cumsum(1) - sizes
    return rank - before.gather(1, group), sizes.gather(1, group)
