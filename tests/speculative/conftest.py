"""Toy drafters, and toy transformers models as verifiers."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.kv import KV, Rows, take
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM

VOCAB, MASK, EOS, PAD = 50, 2, 1, 0


@pytest.fixture(scope="session")
def toy() -> Callable[..., MultimodalDLM]:
    """toy(seed, attention=...): a small random model."""
    made: dict[tuple, MultimodalDLM] = {}

    def make(seed: int = 3, vocab: int = VOCAB, **given: object) -> MultimodalDLM:
        key = (seed, vocab, *sorted(given.items()))
        if key not in made:
            sizes = TransformerConfig(vocab=vocab, width=32, layers=2, heads=4, inner=64)
            spec = Spec("toy", sizes, mask_id=MASK, eos_id=EOS, pad_id=PAD, **given)
            model = MultimodalDLM(spec).eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(seed)
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.normal_(std=0.3, generator=generator)
            made[key] = model
        return made[key]

    return make


@pytest.fixture(scope="session")
def prompts() -> Callable[..., tuple[Tensor, Tensor]]:
    """prompts(seed, *sizes): left-padded batch of random prompts, with its mask."""

    def make(seed: int, *sizes: int, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.full((len(sizes), max(sizes)), PAD)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, real, size in zip(tokens, mask, sizes, strict=True):
            row[-size:] = torch.randint(3, vocab, (size,), generator=generator)
            real[-size:] = True
        return tokens, mask

    return make


@pytest.fixture(scope="session")
def causal() -> Callable[..., Any]:
    """causal(seed, kind): a small random causal transformers model with few near-ties."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    made: dict[tuple, Any] = {}

    def make(seed: int = 0, kind: str = "llama", vocab: int = VOCAB) -> Any:
        key = (seed, kind, vocab)
        if key not in made:
            config, model = kinds[kind]
            torch.manual_seed(seed)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            ids = {"vocab_size": vocab, "bos_token_id": 4, "eos_token_id": EOS, "pad_token_id": PAD}
            made[key] = model(config(**sizes, **heads, **ids, initializer_range=0.4)).eval()
        return made[key]

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[[Any, list[int], int], list[int]]:
    """greedy(model, prompt, length): the text transformers generates, then end ids.

    The mask id, which no answer may hold, is suppressed there as well.
    """

    def generate(model: Any, prompt: list[int], length: int) -> list[int]:
        text = torch.tensor([prompt])
        found = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=[MASK],
        )
        answer = found[0, len(prompt) :].tolist()
        return answer + [EOS] * (length - len(answer))

    return generate


class Knowing:
    """A diffusion model that mostly predicts the text of another model.

    Args:
        model: gives everything but the logits.
        texts: whole texts, prompt and answer; the one that begins as the canvas does is meant.
        slips: share of the tokens it gets wrong.
    """

    def __init__(self, model: MultimodalDLM, texts: list[list[int]], slips: float) -> None:
        self.spec, self.device, self.tokenizer = model.spec, model.device, model.tokenizer
        self.texts, self.slips = texts, slips
        self.forwards: list[int] = []

    def run(
        self, sequence: Sequence, rows: Rows, read: Rows, kv: KV | None, columns: slice | None
    ) -> Tensor:
        tokens = sequence.tokens[0]
        at = take(torch.arange(len(tokens))[None], read)[0].tolist()
        known = [text for text in self.texts if tokens[: at[0]].tolist() == text[: at[0]]]
        text = known[0] if known else []
        self.forwards.append(len(at))
        logits = torch.zeros(1, len(at), self.spec.transformer.vocab)
        for i, position in enumerate(at):
            generator = torch.Generator().manual_seed(1000 * position + len(self.forwards))
            logits[0, i] = torch.rand(logits.shape[-1], generator=generator)
            slip = float(torch.rand((), generator=generator)) < self.slips
            if position < len(text) and not slip:
                logits[0, i, text[position]] += 5
        return logits


@pytest.fixture(scope="session")
def knowing(toy: Callable[..., MultimodalDLM]) -> Callable[..., Knowing]:
    """knowing(texts, slips): see `Knowing`."""
    return lambda texts, slips=0.2: Knowing(toy(), texts, slips)


class Table:
    """A verifier whose next token depends on the last one only."""

    ends: frozenset[int] = frozenset()
    names = None

    def __init__(self, vocab: int) -> None:
        self.vocab, self.forwards = vocab, 0
        self.logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(8))

    def score(self, tokens: Tensor, last: int | None = None) -> Tensor:
        self.forwards += 1
        return self.logits[tokens[-last - 1 :]]

    def pairs(self, first: int, temperature: float) -> dict[tuple[int, int], float]:
        """Probabilities of the two tokens after `first`; the mask id is never predicted."""
        logits = (self.logits / temperature).double()
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1)
        every = itertools.product(range(self.vocab), repeat=2)
        found = {(a, b): float(p[first, a] * p[a, b]) for a, b in every if a != EOS}
        found[(EOS, EOS)] = float(p[first, EOS])  # ended, and padded with end ids
        return found


@pytest.fixture(scope="session")
def table() -> type[Table]:
    """table(vocab): see `Table`."""
    return Table


@pytest.fixture(scope="session")
def fair() -> Callable[[Counter, dict, int], bool]:
    """fair(count, chances, trials): Pearson's statistic is below its 99.9 % point."""

    def test(count: Counter, chances: dict, trials: int) -> bool:
        mean = {key: trials * chance for key, chance in chances.items() if chance > 0}
        assert set(count) <= set(mean)
        statistic = sum((count[key] - each) ** 2 / each for key, each in mean.items())
        freedom = len(mean) - 1
        # Wilson and Hilferty's approximation of the quantile.
        point = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
        return statistic < point

    return test
