"""DEER: speculative decoding with a block-diffusion drafter and a causal verifier."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.state import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept, accept, accept_sampled
from mmdlm.speculative.speculate import Draft, Verified, masks, speculate
from mmdlm.speculative.verifier import Scorer, as_verifier


class _Block:
    """Drafts a block of tokens in one forward, each position independently."""

    def __init__(
        self,
        model: MultimodalDLM,
        vocab: int,
        prompt: list[int],
        size: int,
        temperature: float,
        source: torch.Generator,
    ) -> None:
        self.model, self.vocab, self.prompt, self.size = model, vocab, prompt, size
        self.temperature, self.source = temperature, source

    def propose(self, answer: list[int], room: int) -> Draft:
        """Argmax of every position; with a temperature, a sample."""
        count = min(self.size, room)
        logits = masks(self.model, self.prompt, answer, count, self.vocab)
        if self.temperature == 0:
            return Draft(logits.argmax(-1).tolist())
        proposal = (logits / self.temperature).softmax(-1).cpu()
        drawn = torch.multinomial(proposal, 1, generator=self.source)[:, 0]
        return Draft(drawn.tolist(), 1, proposal)

    def learn(self, accepted: int) -> None:
        """Does nothing: the block size is fixed."""


def deer(
    model: MultimodalDLM,
    verifier: Scorer | Any,
    prompt: Tensor | Sequence,
    length: int,
    *,
    block: int = 32,
    temperature: float = 0.0,
    mask: Tensor | None = None,
    generator: Source = None,
) -> Verified:
    """DEER: the verifier's text, with fewer verifier forwards.

    In each round, one forward of the diffusion model drafts a block of tokens in parallel. One
    forward of the verifier accepts a prefix of it by speculative sampling. With temperature 0 the
    result is the verifier's greedy text, else a sample of its distribution. The quality of the
    drafts only affects the number of forwards. In the paper, the drafter is trained to continue
    answers of the verifier.

    Source: DEER (arXiv 2512.15176), from the paper's description, not compared with its code. Its
    drafter is trained with a separator between text and block; none is added here.

    Args:
        model: diffusion model, block-causal or trained to continue a prefix.
        verifier: causal transformers model with the same vocabulary, or a
            `mmdlm.speculative.verifier.Scorer`.
        prompt: token ids [B P], shared by both models. Rows are decoded one by one.
        length: positions G to fill; a shorter answer is padded with end tokens.
        block: tokens per draft.
        temperature: temperature of both models; 0 for argmax.
        mask: [B P] key padding of the prompt, True = real; on the left.
        generator: one for the batch or one per row; None: torch's default generator.
    Returns:
        tokens, forwards of both models, and acceptance statistics.
    Raises:
        ValueError: an argument is out of range, or see `speculate`.
    """
    verifier = as_verifier(verifier)
    if block < 1:
        raise ValueError(f"block is {block}, expected at least 1 token per draft")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected at least 0 and finite")

    def drafter(row: list[int], source: torch.Generator) -> _Block:
        return _Block(model, verifier.vocab, row, block, temperature, source)

    def judge(draft: Draft, logits: Tensor, source: torch.Generator) -> Kept:
        if temperature == 0:
            return accept(draft.tokens, logits)
        return accept_sampled(draft.tokens, draft.proposal, logits, temperature, source)

    return speculate(
        model, verifier, prompt, length, drafter, judge, mask=mask, generator=generator
    )
