"""Toy models, and single decisions of a strategy."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.family import Spec
from mmdlm.backbones.kv import KV
from mmdlm.backbones.transformer import TransformerConfig
from mmdlm.decoding.probability import log_odds
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Window
from mmdlm.layout import Sequence, from_tokens
from mmdlm.model import MultimodalDLM

VOCAB, MASK, EOS, PAD = 50, 2, 1, 0


class Forward(NamedTuple):
    """One call of the model: the canvas, which rows ran, which positions were scored and how."""

    tokens: Tensor
    rows: tuple[int, int]
    read: tuple[int, int]
    cached: bool
    logits: Tensor


def spec(**given: object) -> Spec:
    sizes = TransformerConfig(vocab=VOCAB, width=32, layers=3, heads=4, inner=64, kv_heads=2)
    return Spec("toy", sizes, mask_id=MASK, eos_id=EOS, pad_id=PAD, **given)


@pytest.fixture(scope="session")
def toy() -> Callable[..., MultimodalDLM]:
    """toy(attention=..., shift=..., block_size=...): a small random model."""
    made: dict[tuple, MultimodalDLM] = {}

    def make(**given: object) -> MultimodalDLM:
        key = tuple(sorted(given.items()))
        if key not in made:
            model = MultimodalDLM(spec(**given)).eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(3)
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.normal_(std=0.3, generator=generator)
            made[key] = model
        return made[key]

    return make


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[MultimodalDLM], list[Forward]]:
    """watch(model): a list that gets an entry for every forward from then on."""

    def start(model: MultimodalDLM) -> list[Forward]:
        seen: list[Forward] = []
        inner = model.run

        def run(
            sequence: Sequence, rows: slice, read: slice, kv: KV | None, columns: slice | None
        ) -> Tensor:
            logits = inner(sequence, rows, read, kv, columns)
            tokens = sequence.tokens.clone()
            spans = (rows.start, rows.stop), (read.start, read.stop)
            seen.append(Forward(tokens, *spans, kv is not None, logits.clone()))
            return logits

        monkeypatch.setattr(model, "run", run)
        return seen

    return start


@pytest.fixture
def moment() -> Callable[..., DecodeState]:
    """moment(logits [B R V], masked [B R]): the state in which score and select are asked.

    The window is what is read, right behind a prompt of one token; the mask id is the last one.
    """

    def make(
        logits: Tensor, masked: Tensor, block_step: int = 0, block_masks: Tensor | None = None
    ) -> DecodeState:
        vocab, read = logits.shape[-1], logits.shape[1]
        sizes = SimpleNamespace(vocab=vocab)
        model = SimpleNamespace(
            spec=SimpleNamespace(
                mask_id=vocab, eos_id=0, stop_ids=(), shift=False, transformer=sizes
            )
        )
        tokens = torch.where(masked, vocab, 0)
        tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        state = DecodeState(model, from_tokens(tokens, None, "full", None), 1)
        state.window = Window(1, 1 + read)
        state.focus(state.window)
        state.block_step = block_step
        state.block_masks = masked.sum(1) if block_masks is None else block_masks
        state.candidates = logits.argmax(-1)
        state.log_odds = log_odds(logits, state.candidates)
        state.confidence = state.log_odds.masked_fill(~masked, -torch.inf)
        return state

    return make


def softmax(logits: list[float]) -> list[float]:
    """Probabilities in float64, by hand."""
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / sum(weights) for w in weights]


def cases(seed: int, count: int = 60) -> Iterator[tuple[Tensor, Tensor]]:
    """Random (logits [B R V], masked [B R]) of many sizes and degrees of certainty."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        rows, read, vocab = 1 + i % 3, 1 + i % 7, 3 + i % 5
        scale = (0.5, 2.0, 8.0, 40.0)[i % 4]
        logits = scale * torch.randn(rows, read, vocab, generator=generator)
        masked = torch.rand(rows, read, generator=generator) < 0.7
        yield logits, masked


@pytest.fixture(name="cases")
def cases_fixture() -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    return cases


@pytest.fixture(name="softmax")
def softmax_fixture() -> Callable[[list[float]], list[float]]:
    return softmax
