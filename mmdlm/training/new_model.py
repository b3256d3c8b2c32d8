"""A model that is trained from scratch, as YAML describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from adapters.action_bins import ActionBins
from adapters.adapter import Adapter
from adapters.normalize import Normalizer
from adapters.robot import Robot
from encoders.checks import Checked, Count, NonNegativeInt, PositiveInt
from encoders.encoder import Encoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.blueprint import Blueprint, build
from mmdlm.chat import MARKERS, PLAIN, TEMPLATES
from mmdlm.data.dataset import Dataset
from mmdlm.layout import Attention
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import recipe
from mmdlm.text import Tokenizer
from mmdlm.training.seed import given_or_global


@dataclass(frozen=True)
class ByteLevel(Checked):
    """A byte-level BPE that is trained on the texts of the data, in place of a word list.

    It encodes any text of any language, and decodes it to the same text.

    Args:
        bpe: tokens at most, with the 256 bytes and the special tokens.
        rows: rows of each training data set that it is trained on, from the first one.
    """

    bpe: Count
    rows: PositiveInt = 10_000

    def texts(self, datasets: Mapping[str, Dataset]) -> Iterator[str]:
        """The texts to train on; one line says which data sets have more rows."""
        for name, dataset in datasets.items():
            count = min(self.rows, len(dataset))
            if count < len(dataset):
                rank_zero_info(
                    f"the tokenizer is trained on the first {count:,} of {len(dataset):,} rows of "
                    f"{name}; choose with model.blueprint.tokenizer.rows"
                )
            for index in range(count):
                yield from dataset.texts(index)


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
        tokenizer: `{bpe: 4096}` for a byte-level BPE, trained on the data; None for a list of the
            words of the data, outside of which nothing can be asked or answered.
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
    tokenizer: ByteLevel | None = None
    chunk: PositiveInt = 8
    bins: PositiveInt = 64
    seed: NonNegativeInt | None = None

    def build(
        self,
        words: Iterable[str],
        statistics: dict[str, Any] | None,
        datasets: Mapping[str, Dataset] | None = None,
    ) -> MultimodalDLM:
        """The model with initial weights, on the CPU in float32.

        Args:
            words: vocabulary of a word list.
            statistics: action and state statistics of a policy, see `Normalizer`; else None.
            datasets: by name, whose texts a byte-level BPE is trained on.

        Raises:
            ValueError: encoders and adapters have different names, `backbone.vocab` differs from
                the vocabulary of the data, or the size of the BPE is too small.
        """
        if set(self.encoders) != set(self.adapters):
            raise ValueError(
                f"blueprint: encoders {sorted(self.encoders)} and adapters {sorted(self.adapters)} "
                "differ; every encoder needs an adapter of the same name"
            )
        tokenizer = self._tokenizer(words, self.bins if statistics else 0, datasets or {})
        vocab = len(tokenizer)
        if self.backbone.vocab not in (0, vocab):
            what = "words" if self.tokenizer is None else "bytes, merges"
            raise ValueError(
                f"blueprint.backbone.vocab is {self.backbone.vocab}, but the data have {vocab} "
                f"{what} and special tokens; leave it out"
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

    def _tokenizer(
        self, words: Iterable[str], actions: int, datasets: Mapping[str, Dataset]
    ) -> Tokenizer:
        """The tokenizer of the data.

        Raises:
            ValueError: the size of the BPE is too small, or control tokens stand around media in
                prompts that no chat template writes.
        """
        if self.tokenizer is None:
            return Tokenizer.from_words(list(words), actions)
        chat = self.template.get("chat") or PLAIN
        around = " ".join(self.template.get("media", {}).values())
        if chat == PLAIN and (found := MARKERS.findall(around)):
            raise ValueError(
                f"blueprint.template.media has the control token {found[0]!r}, which only a chat "
                "template can write with a byte-level BPE; give template.chat, or plain text"
            )
        markers = MARKERS.findall(TEMPLATES.get(chat, chat)) + MARKERS.findall(around)
        texts = self.tokenizer.texts(datasets)
        return Tokenizer.from_texts(texts, self.tokenizer.bpe, markers, actions)

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
