"""Toy models, and single decisions of a strategy."""

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.kv import KV, Rows, take
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.memory import Memory
from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import Sequence, from_tokens
from mmdlm.model import MultimodalDLM

VOCAB, MASK, EOS, PAD = 50, 2, 1, 0


class Forward(NamedTuple):
    """One call of the model: the canvas, which rows ran, which positions were scored and how.

    Of rows and positions that are not a stretch, the indices [B M] are noted.
    """

    tokens: Tensor
    rows: tuple[int, int] | Tensor
    read: tuple[int, int] | Tensor
    cached: bool
    logits: Tensor

    def scored(self, values: Tensor) -> Tensor:
        """The entries [B R ...] of [B L ...] at the scored positions."""
        return take(values, self.read if isinstance(self.read, Tensor) else slice(*self.read))


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


@pytest.fixture(scope="module")
def exact_toy(toy: Callable[..., MultimodalDLM]) -> Callable[..., MultimodalDLM]:
    """Toy models in float64: batches round otherwise than rows, which must decide nothing."""
    made: dict[tuple, MultimodalDLM] = {}

    def make(**given: object) -> MultimodalDLM:
        key = tuple(sorted(given.items()))
        if key not in made:
            made[key] = copy.deepcopy(toy(**given)).double()
        return made[key]

    return make


def span(rows: Rows) -> tuple[int, int] | Tensor:
    return (rows.start, rows.stop) if isinstance(rows, slice) else rows.clone()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[MultimodalDLM], list[Forward]]:
    """watch(model): a list that gets an entry for every forward from then on."""

    def start(model: MultimodalDLM) -> list[Forward]:
        seen: list[Forward] = []
        inner = model.run

        def run(
            sequence: Sequence,
            rows: Rows,
            read: Rows,
            kv: KV | None,
            columns: slice | None,
            mask: Tensor | None,
        ) -> Tensor:
            logits = inner(sequence, rows, read, kv, columns, mask)
            tokens = sequence.tokens.clone()
            spans = span(rows), span(read)
            seen.append(Forward(tokens, *spans, kv is not None, logits.clone()))
            return logits

        monkeypatch.setattr(model, "run", run)
        return seen

    return start


@pytest.fixture
def moment() -> Callable[..., View]:
    """moment(logits [B R V], masked [B R], *strategies): what score and select see.

    The open positions are those scored, right after a prompt of one token; the mask id is the last
    one. The strategies remember what they remember before the first step.
    """

    def make(
        logits: Tensor,
        masked: Tensor,
        *strategies: Strategy,
        block_step: int = 0,
        block_masks: Tensor | None = None,
    ) -> View:
        vocab, read = logits.shape[-1], logits.shape[1]
        spec = SimpleNamespace(
            mask_id=vocab,
            eos_id=0,
            stop_ids=(),
            shift=False,
            attention="full",
            block_size=None,
            transformer=SimpleNamespace(vocab=vocab),
        )
        tokens = torch.where(masked, vocab, 0)
        tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        sequence = from_tokens(tokens, None, "full", None)
        model = SimpleNamespace(spec=spec, device=logits.device)
        batch = len(tokens)
        state = State(model, sequence, 1, list(range(batch)), [(None, i) for i in range(batch)])
        view = View(state)
        for each in strategies:
            shared = each.prepare(model, None)
            state.memories[id(each)] = Memory({}, shared)
            state.memories[id(each)] = Memory(each.begin(view), shared)
        state.plan = state.answer
        state.opened = state.plan
        state.block += 1
        state.focus(slice(1, 1 + read))
        state.block_step += block_step
        state.block_masks = masked.sum(1) if block_masks is None else block_masks
        state.block_size += read
        state.candidates = logits.argmax(-1)
        state.log_odds = log_odds(logits, state.candidates)
        state.confidence = state.log_odds.masked_fill(~masked, -torch.inf)
        return view

    return make


class Synthetic:
    """The predictor of the golden rollouts: logits from a hash of the whole input.

    S = 7919 seed + 131 sum of (q + 1) (x[q] + 3);  h = (S + 613 p + 1237 v + 17 p v) mod 10007;
    u = (h h mod 10007) / 10007;  h0, u0 the same with 104729 seed for S;
    z = scale ((1 - mix) u^3 + mix u0^3) + v / 1000, and -20 for the mask id; the end token gets
    eos_slope p / L on top. Row r scores position p = r + shift; positions are those of the text,
    without the padding in front.
    """

    device = torch.device("cpu")

    def __init__(self, model: dict) -> None:
        self.seed, self.vocab = model["seed"], model["vocab"]
        self.scale, self.mix, self.slope = model["scale"], model["mix"], model["eos_slope"]
        self.eos = model["eos_id"]
        self.spec = SimpleNamespace(
            mask_id=model["mask_id"],
            eos_id=0 if self.eos is None else self.eos,
            stop_ids=(),
            shift=bool(model["shift"]),
            attention="full",
            block_size=None,
            context=None,
            fits=lambda length: None,
            transformer=SimpleNamespace(vocab=max(self.vocab, model["mask_id"] + 1)),
        )
        nowhere = SimpleNamespace(keys=(), keep=lambda rows: None, whole_batch=False)
        nowhere.pad = lambda left, right: nowhere
        nowhere.of_rows = lambda rows: nowhere
        self.backbone = SimpleNamespace(cache=lambda batch, length: nowhere)

    def run(
        self,
        sequence: Sequence,
        rows: Rows,
        read: Rows,
        kv: KV | None,
        columns: slice | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        at = sequence.positions
        here = (131 * (at + 1) * (sequence.tokens + 3)) * sequence.mask
        total = 7919 * self.seed + here.sum(1)
        p, v = take(at, read)[..., None], torch.arange(self.vocab)  # [B R 1], [V]

        def draw(base: Tensor) -> Tensor:
            h = (base + 613 * p + 1237 * v + 17 * p * v) % 10007
            return (h * h % 10007).double() / 10007

        u, u0 = draw(total[:, None, None]), draw(torch.tensor(104729 * self.seed))
        z = self.scale * ((1 - self.mix) * u**3 + self.mix * u0**3) + v / 1000
        if self.eos is not None:
            length = sequence.mask.sum(1)[:, None]
            z[..., self.eos] += self.slope * p[..., 0] / length
        z[..., self.spec.mask_id] = -20
        return z.float()


@pytest.fixture(name="synthetic")
def synthetic_fixture() -> Callable[[dict], Synthetic]:
    """synthetic(case["model"]): a model for `decode`, whose caches hold nothing."""
    return Synthetic


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


def prompts(*sizes: int) -> tuple[Tensor, Tensor]:
    """Random prompts as one left-padded batch, with its mask."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.full((len(sizes), max(sizes)), PAD)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, real, size in zip(tokens, mask, sizes, strict=True):
        row[-size:] = torch.randint(3, 50, (size,), generator=generator)
        real[-size:] = True
    return tokens, mask


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def run(model: MultimodalDLM, *strategies: Strategy, sizes: tuple[int, ...] = (7, 4, 6)) -> Decoded:
    tokens, mask = prompts(*sizes)
    return decode(model, tokens, 8, strategies, mask=mask, generator=seeds(*range(len(sizes))))


@pytest.fixture(name="prompts")
def prompts_fixture() -> Callable[..., tuple[Tensor, Tensor]]:
    return prompts


@pytest.fixture(name="seeds")
def seeds_fixture() -> Callable[..., list[torch.Generator]]:
    return seeds


@pytest.fixture(name="run")
def run_fixture() -> Callable[..., Decoded]:
    return run
