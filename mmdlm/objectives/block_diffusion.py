"""Block diffusion: a noisy copy of the answer beside the clean sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from encoders.checks import Checked
from mmdlm.layout import PROMPT, Sequence
from mmdlm.objectives.denoising import Wrapping
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.noise import Noise
from mmdlm.objectives.objective import Batch, Losses, Objective

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


@dataclass(frozen=True)
class Pair(Sequence):
    """A noisy copy [x_t ; x_0] with shared positions: M noisy, then L clean positions.

    Args:
        is_noisy: [B M+L] bool.
    """

    is_noisy: Tensor | None = None

    def visible(self) -> Tensor:
        """Attention mask [B M+L M+L] bool, True = attend.

        A noisy token attends to the noisy tokens of its block and to the clean tokens of earlier
        blocks; a clean token to the clean tokens of its block and of earlier ones. Turns attend to
        shared parts and to themselves.
        """
        query, key = self.level[..., None], self.level[:, None]
        noisy_query, noisy_key = self.is_noisy[..., None], self.is_noisy[:, None]
        among_noisy = noisy_query & (key == query)
        to_clean = (key < query) | (~noisy_query & (key == query))
        seen = torch.where(noisy_key, among_noisy, to_clean) & self.mask[:, None]
        if self.branch is not None:
            of_key = self.branch[:, None]
            seen &= (of_key == self.branch[..., None]) | (of_key == 0)
        return seen


@dataclass(frozen=True)
class BlockDiffusion(Checked, Wrapping, Objective):
    """Another masked objective on [x_t ; x_0], for models with block-wise attention.

    Each block of the noisy copy x_t sees itself and the clean blocks before it, as at decoding
    with a cache; only x_t is scored. One forward trains all blocks. The block size is the model's.
    The prompt's blocks are not repeated in x_t, except the last one if the model predicts the next
    token (`shift`).

    Published forms (masks: golden cases block_mask.*): SDAR and dllm draw one level per turn, the
    default here; BD3-LM one per block (`draw: {per: block}`, clipped levels by `clip`);
    Fast-dLLM v2 adds complementary masks (`Complementary` around this, weight "one", normaliser
    "masked") and a shifted model. Sources: kuleshov-group/bd3lms: diffusion.py; JetAstra/SDAR:
    modeling_sdar.py; ZHZisZZ/dllm: dllm/core/trainers/bd3lm.py.

    Args:
        objective: a masked objective.
    """

    objective: Objective = Masked()

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        self.check_objective()

    def loss(self, model: MultimodalDLM, batch: Batch, noise: Noise) -> Losses:
        """The loss of the noisy copy.

        Raises:
            ValueError: the model has no blocks.
        """
        if model.spec.block_size is None:
            raise ValueError(
                f"BlockDiffusion needs a model with block-wise attention, this one has "
                f"block_size None and {model.spec.attention} attention; set block_size, or use "
                "Masked"
            )
        start, pair = paired(batch.sequence, model.spec.shift)
        return self.objective.loss(model, replace(batch, sequence=pair), widened(noise, start))


def paired(sequence: Sequence, shift: bool) -> tuple[int, Pair]:
    """First column that the noisy copy repeats, and the sequence with the copy in front.

    Args:
        sequence: clean sequence with block-wise levels.
        shift: whether a token is predicted from the position before it, which the copy then needs.
    """
    beyond = sequence.level.max() + 1
    levels = sequence.level.masked_fill(~sequence.is_answer, beyond)
    first = levels.amin(1, keepdim=True) - int(shift)
    needed = sequence.mask & (sequence.level >= first)
    start = int(needed.any(0).long().argmax())
    mask = torch.cat([needed[:, start:], sequence.mask], 1)

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x[:, start:], x], 1)

    names = ("tokens", "role", "source", "positions", "level", "branch")
    values = {n: getattr(sequence, n) for n in names}
    copied = {n: None if x is None else twice(x) for n, x in values.items()}
    is_noisy = torch.zeros_like(mask)
    is_noisy[:, : mask.shape[1] - sequence.mask.shape[1]] = True
    copied["role"] = copied["role"].masked_fill(~is_noisy, PROMPT)
    media = sequence.media
    if media is not None:
        slots = sequence.is_medium
        number = (slots.flatten().cumsum(0) - 1).view_as(slots)
        media = media[twice(number)[twice(slots)]]
    return start, Pair(**copied, mask=mask, media=media, is_noisy=is_noisy)


def widened(noise: Noise, start: int) -> Noise:
    """Noise of a pair: that of the repeated columns, and none for the clean sequence.

    Args:
        noise: of the clean sequence.
        start: first column that is repeated.
    """
    values = {}
    for name in (f.name for f in fields(noise)):
        value = getattr(noise, name)
        if value is not None:
            clean = torch.zeros_like(value) if value.dtype == torch.bool else value
            values[name] = torch.cat([value[:, start:], clean], 1)
    return replace(noise, **values)
