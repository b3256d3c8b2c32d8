"""Canvases of random tokens instead of masks, with entropy-bounded acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encoders.checks import Limit, NonNegativeInt, PositiveFloat, PositiveInt
from mmdlm.decoding.memory import Entry, PerAnswer, PerRow
from mmdlm.decoding.numerics import entropy, rank, within_bound
from mmdlm.decoding.refresh import Shown
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

STEPS = 48
"""Steps per block of the released model."""


@dataclass(frozen=True)
class UniformCanvas(Strategy):
    """DiffusionGemma: denoises blocks of uniformly random tokens, and writes the likeliest ones.

    The model sees a random token at each undecided position, and what it expected there in the step
    before (self-conditioning), where it takes that. In every step a token is drawn for each
    position. Those within the entropy bound are shown in the next step, all others are random
    again; nothing is final. The likeliest tokens of a block are committed together when they did
    not change for `stable` steps and their mean entropy is below `confident`, or after `steps`.

    Source: huggingface/transformers: models/diffusion_gemma/generation_diffusion_gemma.py.

    Args:
        steps: most steps per block; None: 48 for models that were trained on random tokens, else
            as many as the block has tokens.
        gamma: bound in nats of the accepted tokens' summed entropy without the largest one, see
            `EntropyBound`.
        hot: temperature of the first step; it falls linearly.
        cold: temperature that follows the last step.
        stable: steps in which the likeliest tokens must stay the same; 0 for none.
        confident: mean entropy in nats below which a block may end early; 0 for never.
    """

    paper: ClassVar[str] = "DiffusionGemma, google/diffusiongemma-26B-A4B-it"
    may_idle: ClassVar[bool] = True

    steps: PositiveInt | None = None
    gamma: Limit = 0.1
    hot: PositiveFloat = 0.8
    cold: PositiveFloat = 0.4
    stable: NonNegativeInt = 1
    confident: Limit = 0.005

    def begin(self, view: View) -> dict[str, Entry]:
        """What is shown, expected and likeliest at each position of the answer."""
        ids = torch.zeros_like(view.commit_step)
        none = torch.zeros_like(ids, dtype=torch.bool)
        found: dict[str, Entry] = {
            "sample": PerAnswer(ids),
            "accepted": PerAnswer(none, False),
            "last": PerAnswer(ids - 1, -1),
            "same": PerRow(torch.zeros(len(ids), dtype=torch.int64)),
            "stops": PerRow(none[:, 0]),
        }
        if hasattr(view.model.backbone, "soft"):
            width = view.model.spec.transformer.width
            found["soft"] = PerAnswer(torch.zeros(*ids.shape, width, device=ids.device), 0.0)
        return found

    def most(self, view: View) -> Tensor:
        """[B] host int64, most steps of each block."""
        if self.steps is None and view.model.spec.attention != "canvas":
            return view.share(view.asked)
        return torch.full_like(view.asked, self.steps or STEPS)

    def show(self, view: View) -> Shown:
        """The answers with a token at each undecided position."""
        mine, prompt, vocab = view.memory(self), view.prompt, view.model.spec.transformer.vocab
        fresh = (view.uniform() * vocab).long().clamp(max=vocab - 1)
        shown = view.placed(mine["sample"], view.open, fresh, prompt)
        shown = torch.where(mine["accepted"], mine["sample"], shown)
        # Later blocks are not seen yet, but must hold some token.
        answer = torch.where(view.masked[:, prompt:], shown, view.tokens[:, prompt:])
        return Shown(answer, mine["soft"] if "soft" in set(mine) else None)

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """[B R V] divided by the temperature of the step."""
        steps = self.most(view)
        left = ((steps - view.block_step).clamp(min=1) / steps).to(view.device)
        temperature = self.cold + (self.hot - self.cold) * left
        return logits / temperature[:, None, None]

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """[B R] int64, the likeliest tokens; draws and accepts those that are shown next."""
        mine, is_open, prompt = view.memory(self), view.open, view.prompt
        best, nats = logits.argmax(-1), entropy(logits)
        total = logits.softmax(-1).cumsum(-1)
        sample = torch.searchsorted(total, view.uniform()[..., None] * total[..., -1:])[..., 0]
        sample = sample.clamp(max=logits.shape[-1] - 1)
        accepted = within_bound(nats, rank((-nats).masked_fill(~is_open, -torch.inf)), self.gamma)
        mine["sample"] = view.placed(mine["sample"], is_open, sample + view.first_id, prompt)
        mine["accepted"] = view.placed(mine["accepted"], is_open, accepted & is_open, prompt)
        at = (view.at - prompt).clamp(min=0)
        same = ((mine["last"].gather(1, at) == best) | ~is_open).all(1).cpu()
        mine["last"] = view.placed(mine["last"], is_open, best, prompt)
        count = torch.where(view.block_step == 0, 0, mine["same"])
        mine["same"] = torch.where(same, count + 1, 0)
        size = is_open.sum(1).clamp(min=1)
        mean = nats.masked_fill(~is_open, 0).sum(1) / size
        mine["stops"] = (mean < self.confident) & (mine["same"] >= self.stable).to(mean.device)
        if "soft" in set(mine):
            expected = view.model.backbone.soft(logits).to(mine["soft"])
            where = at[..., None].expand_as(expected)
            old = mine["soft"].gather(1, where)
            new = torch.where(is_open[..., None], expected, old)
            mine["soft"] = mine["soft"].scatter(1, where, new)
        return best

    def select(self, view: View) -> Tensor:
        """[B R] bool, all of a block that ends, else nothing."""
        ends = view.memory(self)["stops"] | (view.block_step >= self.most(view) - 1).to(view.device)
        return view.open & ends[:, None]
