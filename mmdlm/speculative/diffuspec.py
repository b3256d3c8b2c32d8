"""A diffusion model that drafts for a causal one, along a path that reads well."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.rng import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept, accept, accept_sampled
from mmdlm.speculative.speculate import Draft, Verified, masks, speculate
from mmdlm.speculative.verifier import Scorer, as_verifier

Proxy = Callable[[list[int], list[int]], list[float]]
"""From a text and ids that may follow it to their log-probabilities under a cheap causal model."""


class DraftLength:
    """How long the next draft should be, from how the last ones went.

    Two moving averages are kept: of how much was drafted before an end token, and of how much was
    accepted. The next draft is as long as the former, and longer while acceptance keeps up.

    Source: adaptive draft-length controller of DiffuSpec (arXiv 2510.02358, equations 10 and 11;
    pluto0x0/DiffuSpec: diffuspec/control/adl.py, a third-party port).

    Args:
        shortest: tokens, at least one.
        longest: tokens; the first draft is of this length.
        growth: tokens added while acceptance keeps up.
        rate: weight of the newest draft in the averages, 0 to 1.
    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, shortest: int = 20, longest: int = 30, growth: int = 10, rate: float = 0.5
    ) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"a draft of {shortest} to {longest} tokens; expected 1 or more, rising"
            )
        if growth < 0 or not 0 <= rate <= 1:
            raise ValueError(f"growth is {growth} and rate {rate}; expected 0 or more, and 0 to 1")
        self.shortest, self.longest, self.growth, self.rate = shortest, longest, growth, rate
        self.drafted = self.accepted = 0.0
        self.tokens = longest
        """Length of the next draft."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Takes in how a draft went.

        Args:
            drafted: its tokens before the first end token.
            accepted: how many tokens of the path were accepted.
        """
        self.drafted += self.rate * (drafted - self.drafted)
        self.accepted += self.rate * (accepted - self.accepted)
        more = self.growth if self.accepted >= self.drafted else 0
        self.tokens = max(self.shortest, min(self.longest, math.floor(self.drafted) + more))


class NGram:
    """Log-probabilities of a token from how often it followed the same tokens.

    Counts are smoothed by a constant; a context that was never seen is shortened until one was.

    Args:
        vocab: number of ids.
        order: tokens that are counted together, 3 for a trigram.
        smoothing: added to every count, above 0.
    """

    def __init__(self, vocab: int, order: int = 3, smoothing: float = 0.1) -> None:
        if order < 1 or not smoothing > 0:
            raise ValueError(f"order is {order} and smoothing {smoothing}; expected 1, and above 0")
        self.vocab, self.order, self.smoothing = vocab, order, smoothing
        self.follows: dict[tuple[int, ...], Counter[int]] = {}

    def fit(self, text: Items[int], start: int = 0) -> NGram:
        """Counts the tokens of a text from `start` on, each after what stands before it."""
        for i in range(start, len(text)):
            for size in range(min(self.order, i + 1)):
                context = tuple(text[i - size : i])
                self.follows.setdefault(context, Counter())[text[i]] += 1
        return self

    def __call__(self, text: list[int], candidates: list[int]) -> list[float]:
        """See `Proxy`."""
        size = min(self.order - 1, len(text))
        while size and tuple(text[len(text) - size :]) not in self.follows:
            size -= 1
        seen = self.follows.get(tuple(text[len(text) - size :]), Counter())
        total = math.log(seen.total() + self.smoothing * self.vocab)
        return [math.log(seen[token] + self.smoothing) - total for token in candidates]


def lattice(
    logits: Tensor, eos_id: int, *, most: int = 15, mass: float = 0.8
) -> list[list[tuple[int, float]]]:
    """The candidates of each position, (id, log-probability), the likeliest first.

    A position keeps its likeliest tokens until they hold a share of the probability and the end
    token is among them, but no more than `most`; an end token that is left out is added last. The
    positions stop with the first at which the end token is among the likeliest.

    Args:
        logits: [k V] float32.
        eos_id: the end token.
        most: candidates of a position.
        mass: share of the probability, 0 to 1.
    """
    log = logits.log_softmax(-1).cpu()
    # Sorted, not topk, whose order among equals is unspecified.
    order = log.sort(dim=-1, descending=True, stable=True)
    found = []
    for i, (ids, values) in enumerate(
        zip(order.indices[:, :most].tolist(), order.values[:, :most].tolist(), strict=True)
    ):
        candidates: list[tuple[int, float]] = []
        held, ends = 0.0, False
        for token, value in zip(ids, values, strict=True):
            if value == -math.inf:
                break
            candidates.append((token, value))
            held += math.exp(value)
            ends = ends or token == eos_id
            if held >= mass and ends:
                break
        if not ends and log[i, eos_id] > -torch.inf:
            candidates.append((eos_id, float(log[i, eos_id])))
        found.append(candidates)
        if ends:
            break
    return found


def path(
    candidates: list[list[tuple[int, float]]],
    text: list[int],
    proxy: Proxy,
    eos_id: int,
    *,
    beam: int = 3,
    weight: float = 0.5,
) -> list[int]:
    """The best way through the candidates, from left to right, by beam search.

    A path scores the sum of `weight` times the drafter's log-probability and 1 - `weight` times the
    proxy's. One that has ended grows no more and competes with the others as it is.

    Source: causal-consistency path search of DiffuSpec (arXiv 2510.02358, equation 8;
    pluto0x0/DiffuSpec: diffuspec/search/cps.py, a third-party port).

    Args:
        candidates: see `lattice`.
        text: what stands before them.
        proxy: see `Proxy`.
        eos_id: the end token.
        beam: paths that are followed.
        weight: of the drafter, 0 to 1.
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


class _Searching:
    """Drafts with one forward and a search; keeps the length of the drafts and the trigrams."""

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
        """The path through the lattice of the next masks."""
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
        """Sets the length of the next draft."""
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
    """The verifier's own text, in fewer of its forwards.

    In each round one forward of the diffusion model says what may stand at each of the next
    positions; a beam search takes from it a path that is also likely from left to right; and the
    verifier keeps of that path what it would have written itself, and one token more. Without
    temperature the answer is the verifier's greedy text, with temperature a sample of its
    distribution, whatever was drafted.

    Source: DiffuSpec (arXiv 2510.02358), read in a third-party port (pluto0x0/DiffuSpec). There,
    the proxy is a trigram model of a large text; and with a temperature the path is accepted as if
    it had been drawn, here with the probability of its tokens, since it was searched.

    Args:
        model: the diffusion model.
        verifier: a causal model of transformers with the same vocabulary, or see
            `mmdlm.speculative.verifier`.
        prompt: token ids [B P]; both models read the same ids. Rows are decoded one by one.
        length: positions G to fill; end ids follow an answer that ends earlier.
        proxy: see `Proxy`; None: an `NGram` of the prompt and of the answer so far.
        shortest: tokens of a draft, see `DraftLength`.
        longest: see there.
        growth: see there.
        rate: see there.
        most: candidates of a position, see `lattice`.
        mass: see there.
        beam: paths that are followed, see `path`.
        weight: of the diffusion model, see `path`.
        temperature: of the verifier's distribution; 0 for its first choice.
        mask: [B P] key padding of the prompt, True = real; on the left.
        generator: source of random draws, one for the batch or one per row; None: torch's own.
    Returns:
        tokens, forwards of both models, and what was accepted.
    Raises:
        ValueError: an argument is out of range, or see `speculate`.
    """
    verifier = as_verifier(verifier)
    DraftLength(shortest, longest, growth, rate)
    if most < 1 or beam < 1 or not 0 <= mass <= 1 or not 0 <= weight <= 1:
        raise ValueError(
            f"most is {most}, beam {beam}, mass {mass}, weight {weight}; expected numbers of 1 or "
            "more, and shares from 0 to 1"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    ends = frozenset({model.spec.eos_id, *model.spec.stop_ids, *verifier.ends})
    given = {"most": most, "mass": mass, "beam": beam, "weight": weight}

    def drafter(row: list[int], source: torch.Generator) -> _Searching:
        lengths = DraftLength(shortest, longest, growth, rate)
        return _Searching(model, verifier.vocab, ends, row, lengths, proxy, given)

    def judge(draft: Draft, logits: Tensor, source: torch.Generator) -> Kept:
        if temperature == 0:
            return accept(draft.tokens, logits)
        return accept_sampled(draft.tokens, None, logits, temperature, source)

    return speculate(
        model, verifier, prompt, length, drafter, judge, mask=mask, generator=generator
    )
