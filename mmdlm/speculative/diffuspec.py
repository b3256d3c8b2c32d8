"""DiffuSpec: speculative decoding with a diffusion drafter and a path search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.state import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept, accept, accept_sampled
from mmdlm.speculative.speculate import Draft, Verified, masks, speculate
from mmdlm.speculative.verifier import Scorer, as_verifier

Proxy = Callable[[list[int], list[int]], list[float]]
"""(text ids, candidate next ids) -> log-probabilities of the candidates; a cheap causal model."""


class DraftLength:
    """Adaptive draft-length controller of DiffuSpec.

    It tracks exponential moving averages of drafted tokens before an end token and of accepted
    tokens. The next length is the former, plus `growth` if the latter is at least as large.

    Source: adaptive draft-length controller of DiffuSpec (arXiv 2510.02358, equations 10 and 11;
    pluto0x0/DiffuSpec: diffuspec/control/adl.py, a third-party port).

    Args:
        shortest: minimum length in tokens, at least 1.
        longest: maximum length in tokens; also the length of the first draft.
        growth: tokens added if all drafted tokens are accepted on average.
        rate: weight of the newest draft in the averages, 0 to 1.
    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, shortest: int = 20, longest: int = 30, growth: int = 10, rate: float = 0.5
    ) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {shortest}, longest is {longest}; expected 1 <= shortest <= longest"
            )
        if growth < 0 or not 0 <= rate <= 1:
            raise ValueError(f"growth is {growth}, rate is {rate}; expected at least 0, and 0 to 1")
        self.shortest, self.longest, self.growth, self.rate = shortest, longest, growth, rate
        self.drafted = self.accepted = 0.0
        self.tokens = longest
        """Length of the next draft."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Updates the averages after a draft.

        Args:
            drafted: number of tokens before the first end token.
            accepted: number of accepted tokens.
        """
        self.drafted += self.rate * (drafted - self.drafted)
        self.accepted += self.rate * (accepted - self.accepted)
        more = self.growth if self.accepted >= self.drafted else 0
        self.tokens = max(self.shortest, min(self.longest, math.floor(self.drafted) + more))


class NGram:
    """n-gram language model with additive smoothing.

    An unseen context is shortened until a seen one is found.

    Args:
        vocab: vocabulary size.
        order: n, 3 for trigrams.
        smoothing: constant added to every count, above 0.
    """

    def __init__(self, vocab: int, order: int = 3, smoothing: float = 0.1) -> None:
        if order < 1 or not smoothing > 0:
            raise ValueError(
                f"order is {order}, smoothing is {smoothing}; expected at least 1, and above 0"
            )
        self.vocab, self.order, self.smoothing = vocab, order, smoothing
        self.follows: dict[tuple[int, ...], Counter[int]] = {}

    def fit(self, text: Items[int], start: int = 0) -> NGram:
        """Counts the n-grams that end at or after index `start`; returns self."""
        for i in range(start, len(text)):
            for size in range(min(self.order, i + 1)):
                context = tuple(text[i - size : i])
                self.follows.setdefault(context, Counter())[text[i]] += 1
        return self

    def __call__(self, text: list[int], candidates: list[int]) -> list[float]:
        """Log-probabilities of the candidates, see `Proxy`."""
        size = min(self.order - 1, len(text))
        while size and tuple(text[len(text) - size :]) not in self.follows:
            size -= 1
        seen = self.follows.get(tuple(text[len(text) - size :]), Counter())
        total = math.log(seen.total() + self.smoothing * self.vocab)
        return [math.log(seen[token] + self.smoothing) - total for token in candidates]


def lattice(
    logits: Tensor, eos_id: int, *, most: int = 15, mass: float = 0.8
) -> list[list[tuple[int, float]]]:
    """Candidates of each position as (id, log-probability), most probable first.

    A position keeps its most probable tokens until their total probability is at least `mass` and
    the end token is among them, but at most `most`. A missing end token is appended. The lattice
    ends after the first position at which the end token is among the most probable.

    Args:
        logits: [k V] float32.
        eos_id: end token id.
        most: maximum number of candidates per position.
        mass: probability mass, 0 to 1.
    """
    log = logits.log_softmax(-1).cpu()
    # A stable sort, because topk leaves the order of ties unspecified.
    order = log.sort(dim=-1, descending=True, stable=True)
    positions = []
    for i, (ids, values) in enumerate(
        zip(order.indices[:, :most].tolist(), order.values[:, :most].tolist(), strict=True)
    ):
        candidates: list[tuple[int, float]] = []
        total, has_end = 0.0, False
        for token, value in zip(ids, values, strict=True):
            if value == -math.inf:
                break
            candidates.append((token, value))
            total += math.exp(value)
            has_end = has_end or token == eos_id
            if total >= mass and has_end:
                break
        if not has_end and log[i, eos_id] > -torch.inf:
            candidates.append((eos_id, float(log[i, eos_id])))
        positions.append(candidates)
        if has_end:
            break
    return positions


def path(
    candidates: list[list[tuple[int, float]]],
    text: list[int],
    proxy: Proxy,
    eos_id: int,
    *,
    beam: int = 3,
    weight: float = 0.5,
) -> list[int]:
    """Causal-consistency path search: the best path through a lattice, by beam search.

    The score of a path is the sum of `weight` * log p_drafter + (1 - `weight`) * log p_proxy. A
    path that has reached the end token is not extended.

    Source: causal-consistency path search of DiffuSpec (arXiv 2510.02358, equation 8;
    pluto0x0/DiffuSpec: diffuspec/search/cps.py, a third-party port).

    Args:
        candidates: see `lattice`.
        text: token ids before the lattice.
        proxy: see `Proxy`.
        eos_id: end token id.
        beam: beam width.
        weight: weight of the drafter, 0 to 1.
    """
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for options in candidates:
        grown = []
        for score, tokens in beams:
            if tokens and tokens[-1] == eos_id:
                grown.append((score, tokens))
                continue
            likely = proxy(text + tokens, [token for token, _ in options])
            for (token, own), other in zip(options, likely, strict=True):
                grown.append((score + weight * own + (1 - weight) * other, [*tokens, token]))
        beams = sorted(grown, key=lambda each: -each[0])[:beam]
        if all(tokens[-1] == eos_id for _, tokens in beams):
            break
    return beams[0][1]


class _SearchDrafter:
    """Drafts with one forward and a path search."""

    def __init__(
        self,
        model: MultimodalDLM,
        vocab: int,
        ends: frozenset[int],
        prompt: list[int],
        length: DraftLength,
        proxy: Proxy | None,
        given: dict[str, Any],
    ) -> None:
        self.model, self.vocab, self.ends, self.prompt = model, vocab, ends, prompt
        self.length, self.given = length, given
        self.own = NGram(model.spec.transformer.vocab).fit(prompt) if proxy is None else None
        self.proxy = proxy or self.own
        self.counted, self.drafted = len(prompt), 0

    def propose(self, answer: list[int], room: int) -> Draft:
        """Best path through the lattice of the next masks."""
        text, eos_id = self.prompt + answer, self.model.spec.eos_id
        if self.own is not None:
            self.own.fit(text, self.counted)
            self.counted = len(text)
        count = min(self.length.tokens, room)
        logits = masks(self.model, self.prompt, answer, count, self.vocab)
        first = logits.argmax(-1).tolist()
        self.drafted = next((i for i, token in enumerate(first) if token in self.ends), count)
        options = lattice(logits, eos_id, most=self.given["most"], mass=self.given["mass"])
        beam, weight = self.given["beam"], self.given["weight"]
        return Draft(path(options, text, self.proxy, eos_id, beam=beam, weight=weight))

    def learn(self, accepted: int) -> None:
        """Updates the draft length."""
        self.length.learn(self.drafted, accepted)


def diffuspec(
    model: MultimodalDLM,
    verifier: Scorer | Any,
    prompt: Tensor | Sequence,
    length: int,
    *,
    proxy: Proxy | None = None,
    shortest: int = 20,
    longest: int = 30,
    growth: int = 10,
    rate: float = 0.5,
    most: int = 15,
    mass: float = 0.8,
    beam: int = 3,
    weight: float = 0.5,
    temperature: float = 0.0,
    mask: Tensor | None = None,
    generator: Source = None,
) -> Verified:
    """DiffuSpec: the verifier's text, with fewer verifier forwards.

    In each round, one forward of the diffusion model gives candidates for the next positions. A
    beam search selects a path that is also probable from left to right. The verifier accepts a
    prefix of the path and adds one token. With temperature 0 the result is the verifier's greedy
    text, else a sample of its distribution.

    Source: DiffuSpec (arXiv 2510.02358; pluto0x0/DiffuSpec, a third-party port). There, the proxy
    is a trigram model of a large corpus, and with a temperature the path is accepted as if it had
    been sampled. Here, it is accepted as a deterministic draft.

    Args:
        model: diffusion model.
        verifier: causal transformers model with the same vocabulary, or a
            `mmdlm.speculative.verifier.Scorer`.
        prompt: token ids [B P], shared by both models. Rows are decoded one by one.
        length: positions G to fill; a shorter answer is padded with end tokens.
        proxy: see `Proxy`; None: an `NGram` of the prompt and the answer so far.
        shortest: see `DraftLength`.
        longest: see `DraftLength`.
        growth: see `DraftLength`.
        rate: see `DraftLength`.
        most: see `lattice`.
        mass: see `lattice`.
        beam: see `path`.
        weight: see `path`.
        temperature: temperature of the verifier; 0 for argmax.
        mask: [B P] key padding of the prompt, True = real; on the left.
        generator: one for the batch or one per row; None: torch's default generator.
    Returns:
        tokens, forwards of both models, and acceptance statistics.
    Raises:
        ValueError: an argument is out of range, or see `speculate`.
    """
    verifier = as_verifier(verifier)
    DraftLength(shortest, longest, growth, rate)
    if most < 1 or beam < 1 or not 0 <= mass <= 1 or not 0 <= weight <= 1:
        raise ValueError(
            f"most is {most}, beam is {beam}, mass is {mass}, weight is {weight}; expected "
            "at least 1 for most and beam, and 0 to 1 for mass and weight"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected at least 0 and finite")
    ends = frozenset({model.spec.eos_id, *model.spec.stop_ids, *verifier.ends})
    given = {"most": most, "mass": mass, "beam": beam, "weight": weight}

    def drafter(row: list[int], source: torch.Generator) -> _SearchDrafter:
        lengths = DraftLength(shortest, longest, growth, rate)
        return _SearchDrafter(model, verifier.vocab, ends, row, lengths, proxy, given)

    def judge(draft: Draft, logits: Tensor, source: torch.Generator) -> Kept:
        if temperature == 0:
            return accept(draft.tokens, logits)
        return accept_sampled(draft.tokens, None, logits, temperature, source)

    return speculate(
        model, verifier, prompt, length, drafter, judge, mask=mask, generator=generator
    )
