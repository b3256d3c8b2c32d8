"""The one LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor

from adapters.action_bins import ActionBins
from adapters.adapter import Adapter
from adapters.normalize import Normalizer
from adapters.robot import Robot
from encoders.encoder import Encoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.collate import Collated, batch
from mmdlm.loading.ckpt import ENTRY, entry
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.objective import Losses, Objective
from mmdlm.text import Tokenizer


class Module(lightning.LightningModule):
    """Trains a model from scratch, or a checkpoint further, with any objective.

    The loss of a step is the weighted mean over data sets of sum / count, both summed over all
    processes first, so it does not depend on how many processes share the global batch.

    Args:
        objective: what is minimised.
        backbone: sizes of a new backbone; its `vocab` is filled in from the data.
        encoders: by modality, of a new model.
        adapters: by modality; called with (encoder width, backbone width).
        source: checkpoint to train further instead of a new model: a bundled name, a folder or a
            hub id. `backbone`, `encoders` and `adapters` are then left out.
        init: checkpoint of an earlier stage (`.ckpt`) whose weights a new model starts from.
        attention: of a new model: "full", "prefix" or "cascade", see `mmdlm.layout`.
        block_size: of a new model; 1 makes the answer autoregressive.
        shift: of a new model: rows score the next token.
        chunk: actions per answer of a new policy.
        bins: bins per action number of a new policy.
        words: vocabulary of a new model; filled in from the data.
        statistics: action and state statistics of a new policy; filled in from the data.
        weights: weight of each data set in the loss; 1 where not given.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        decay: share of the run, at its end, over which the rate falls to `final` by a cosine.
        final: last learning rate as a share of the peak.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        seed: of the initial weights.
    """

    def __init__(
        self,
        objective: Objective,
        backbone: TransformerConfig | None = None,
        encoders: dict[str, Encoder] | None = None,
        adapters: dict[str, Callable[[int, int], Adapter]] | None = None,
        source: str | None = None,
        init: str | None = None,
        attention: str = "cascade",
        block_size: int | None = None,
        shift: bool = False,
        chunk: int = 8,
        bins: int = 64,
        words: list[str] | None = None,
        statistics: dict[str, Any] | None = None,
        weights: dict[str, float] | None = None,
        lr: float = 6e-4,
        warmup: int = 100,
        decay: float = 1.0,
        final: float = 0.05,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (source is None) == (backbone is None):
            raise ValueError("give either source (train further) or backbone (train from scratch)")
        self.objective = objective
        self.weights = weights or {}
        self.lr, self.warmup, self.decay, self.final = lr, warmup, decay, final
        self.weight_decay, self.betas = weight_decay, betas
        if source is not None:
            from mmdlm.checkpoint import load

            self.model = load(source, device="cpu", dtype="float32")
            return
        tokenizer = Tokenizer.from_words(words or [], bins if statistics else 0)
        spec = Spec(
            "mmdlm",
            replace(backbone, vocab=len(tokenizer)),
            mask_id=2,
            eos_id=1,
            pad_id=0,
            shift=shift,
            attention=attention,
            block_size=block_size,
        )
        encoders = encoders or {}
        built = {
            name: (adapters or {})[name](encoder.dim, backbone.width)
            for name, encoder in encoders.items()
        }
        robot = new_robot(statistics, bins, len(tokenizer) - 1, chunk) if statistics else None
        self.model = MultimodalDLM(spec, encoders, built, tokenizer, robot)
        self.model.backbone.reset(torch.Generator().manual_seed(seed))
        if init is not None:
            self.start_from(init)

    def start_from(self, checkpoint: str) -> None:
        """Takes the weights of an earlier stage.

        Raises:
            ValueError: that stage had another vocabulary, so its rows mean other words.
        """
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved[ENTRY]["tokenizer"] != self.model.tokenizer.backend.to_str():
            raise ValueError(
                f"{checkpoint} was trained with another vocabulary; use the data sets of that stage"
            )
        self.load_state_dict(saved["state_dict"])

    def training_step(self, batch: dict[str, Collated], index: int) -> Tensor:
        """Loss of one step over all data sets."""
        total = torch.zeros((), device=self.device)
        share = sum(self.weights.get(name, 1.0) for name in batch)
        for name, part in batch.items():
            losses = self.losses(part)
            # DDP averages gradients over processes; the sum must not be divided by their number.
            mean = losses.mean(self._over_processes) * self.trainer.world_size
            total = total + mean * self.weights.get(name, 1.0) / share
            logs = {"loss": (losses.sum.detach(), losses.count), **losses.logs}
            self._log(f"train/{name}", logs)
        return total

    def validation_step(self, batch: dict[str, Collated], index: int) -> None:
        """The same losses on held-out data with fixed noise."""
        for name, part in batch.items():
            self._log(f"val/{name}", self.losses(part).logs)

    def losses(self, part: Collated) -> Losses:
        """Sum and count of the loss of one data set's rows."""
        return self.objective.step(self.model, batch(self.model, part))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `mmdlm export` needs to build the model without this module's arguments."""
        checkpoint[ENTRY] = entry(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up, a plateau and a cosine fall at the end."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Learning rate at a step as a share of the peak."""
        last = self.trainer.max_steps
        if step < self.warmup:
            return (step + 1) / self.warmup
        begin = last * (1 - self.decay)
        if last <= 0 or step < begin:
            return 1.0
        done = min(1.0, (step - begin) / max(1.0, last - begin))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

    def _over_processes(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        return self.all_gather(value).sum()

    def _log(self, prefix: str, logs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in logs.items():
            total, count = self._over_processes(total), self._over_processes(count)
            if count > 0:
                self.log(f"{prefix}/{name}", total / count, prog_bar=name == "ce", batch_size=1)


def new_robot(statistics: dict[str, Any], bins: int, last_id: int, chunk: int) -> Robot:
    """A robot whose action ids are the last ones of the vocabulary.

    Args:
        statistics: "action" and "state", see `Normalizer`.
        bins: ids.
        last_id: the largest of them.
        chunk: actions per answer.
    """
    return Robot(
        ActionBins(bins, last_id=last_id, reverse=False),
        Normalizer(statistics["action"]),
        Normalizer(statistics["state"]),
        chunk,
    )
