"""A model that is trained from scratch, as YAML describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adapters.action_bins import ActionBins
from adapters.adapter import Adapter
from adapters.normalize import Normalizer
from adapters.robot import Robot
from encoders.checks import Checked, NonNegativeInt, PositiveInt
from encoders.encoder import Encoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.blueprint import Blueprint, build
from mmdlm.layout import Attention
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import recipe
from mmdlm.text import Tokenizer
from mmdlm.training.seed import given_or_global


@dataclass(frozen=True)
class NewModel(Checked):
    """The choices that make a new model; the data add its vocabulary and action statistics.

    `build` turns both into a `Blueprint`. It is called once, as it uses the given encoders.

    Args:
        backbone: sizes of the backbone; leave out `vocab`, which follows from the data.
        encoders: by modality, "image", "audio", "state".
        adapters: under the same names; each is called with (encoder width, backbone width).
        attention: "full", "prefix", "cascade" or "block_causal", see `mmdlm.layout`.
        block_size: tokens per block of the answer; 1 makes it autoregressive, None for no blocks.
        shift: position i of the network scores token i + 1.
        template: how prompts are written: "chat", "media", "system", see `mmdlm.blueprint`.
        chunk: actions per answer of a policy; used if a data set holds actions.
        bins: bins per action number of a policy; used if a data set holds actions.
        seed: of the initial weights of the backbone; None for that of `--seed_everything`.
    """

    backbone: TransformerConfig
    encoders: dict[str, Encoder] = field(default_factory=dict)
    adapters: dict[str, Callable[[int, int], Adapter]] = field(default_factory=dict)
    attention: Attention = "cascade"
    block_size: PositiveInt | None = None
    shift: bool = False
    template: dict[str, Any] = field(default_factory=dict)
    chunk: PositiveInt = 8
    bins: PositiveInt = 64
    seed: NonNegativeInt | None = None

    def build(self, words: list[str], statistics: dict[str, Any] | None) -> MultimodalDLM:
        """The model with initial weights, on the CPU in float32.

        Args:
            words: vocabulary.
            statistics: action and state statistics of a policy, see `Normalizer`; else None.

        Raises:
            ValueError: encoders and adapters have different names, or `backbone.vocab` differs from
                the vocabulary of the data.
        """
        if set(self.encoders) != set(self.adapters):
            raise ValueError(
                f"blueprint: encoders {sorted(self.encoders)} and adapters {sorted(self.adapters)} "
                "differ; every encoder needs an adapter of the same name"
            )
        tokenizer = Tokenizer.from_words(words, self.bins if statistics else 0)
        vocab = len(tokenizer)
        if self.backbone.vocab not in (0, vocab):
            raise ValueError(
                f"blueprint.backbone.vocab is {self.backbone.vocab}, but the data have {vocab} "
                "words and special tokens; leave it out"
            )
        adapters = {
            name: self.adapters[name](encoder.dim, self.backbone.width)
            for name, encoder in self.encoders.items()
        }
        blueprint = self._blueprint(tokenizer, adapters, statistics)
        model = build(blueprint, tokenizer)
        # The parts that YAML made have their initial weights, or pretrained ones.
        model.encoders.update(self.encoders)
        model.adapters.update(adapters)
        model.backbone.to_empty(device="cpu")
        model.backbone.reset(torch.Generator().manual_seed(given_or_global(self.seed)))
        return model.train()

    def _blueprint(
        self,
        tokenizer: Tokenizer,
        adapters: dict[str, Adapter],
        statistics: dict[str, Any] | None,
    ) -> Blueprint:
        """The model as plain data."""
        spec = Spec(
            "mmdlm",
            replace(self.backbone, vocab=len(tokenizer)),
            mask_id=2,
            eos_id=1,
            pad_id=0,
            shift=self.shift,
            attention=self.attention,
            block_size=self.block_size,
        )
        outputs = {}
        if statistics:
            robot = new_robot(statistics, self.bins, len(tokenizer) - 1, self.chunk)
            outputs["actions"] = robot.to_dict()
        return Blueprint(
            spec,
            {name: recipe(encoder) for name, encoder in self.encoders.items()},
            {name: recipe(adapter) for name, adapter in adapters.items()},
            outputs,
            self.template,
        )


def new_robot(statistics: dict[str, Any], bins: int, last_id: int, chunk: int) -> Robot:
    """A robot whose action ids are the last ones of the vocabulary.

    Args:
        statistics: "action" and "state", see `Normalizer`; of no state, empty lists.
        bins: number of action ids.
        last_id: the largest of them.
        chunk: actions per answer.
    """
    state = statistics["state"]
    return Robot(
        ActionBins(bins, last_id=last_id, reverse=False),
        Normalizer(statistics["action"]),
        Normalizer(state) if state["mean"] else Normalizer({}, "identity"),
        chunk,
    )
