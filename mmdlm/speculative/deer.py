"""A block-diffusion model that drafts for a causal one, a block per forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding.rng import Source
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept, accept, accept_sampled
from mmdlm.speculative.speculate import Draft, Verified, masks, speculate
from mmdlm.speculative.verifier import Scorer, as_verifier


class _Block:
    """Drafts a block of tokens in one forward, each position on its own."""

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
        """The first choice of every position; with a temperature a draw of each."""
        count = min(self.size, room)
        logits = masks(self.model, self.prompt, answer, count, self.vocab)
        if self.temperature == 0:
            return Draft(logits.argmax(-1).tolist())
        proposal = (logits / self.temperature).softmax(-1).cpu()
        drawn = torch.multinomial(proposal, 1, generator=self.source)[:, 0]
        return Draft(drawn.tolist(), 1, proposal)

    def learn(self, accepted: int) -> None:
        """Blocks are of one size, however they went."""


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
    """The verifier's own text, in fewer of its forwards.

    In each round one forward of the diffusion model drafts a block, all positions at once, and one
    forward of the verifier accepts the beginning of it by the rule of speculative sampling. Without
    temperature the answer is the verifier's greedy text; with temperature it follows the
    verifier's distribution at that temperature. How good the drafts are decides only how many
    forwards it takes: the method trains its drafter to continue a text (on answers of the
    verifier), so that its drafts stay right for long.

    DEER (arXiv 2512.15176), from the paper's description, not checked against its code. Its drafter
    is trained with a separator between text and block, which a model of that kind would have to
    find in its prompt; none is added here.

    Args:
        model: the diffusion model, a block-causal one or one trained to continue.
        verifier: a causal model of transformers with the same vocabulary, or see
            `mmdlm.speculative.verifier`.
        prompt: token ids [B P]; both models read the same ids. Rows are decoded one by one.
        length: positions G to fill; end ids follow an answer that ends earlier.
        block: tokens of a draft.
        temperature: of both models; 0 for their first choices.
        mask: [B P] key padding of the prompt, True = real; on the left.
        generator: source of random draws, one for the batch or one per row; None: torch's own.
    Returns:
        tokens, forwards of both models, and what was accepted.
    Raises:
        ValueError: an argument is out of range, or see `speculate`.
    """
    verifier = as_verifier(verifier)
    if block < 1:
        raise ValueError(f"block is {block}, expected at least 1 token per draft")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")

    def drafter(row: list[int], source: torch.Generator) -> _Block:
        return _Block(model, verifier.vocab, row, block, temperature, source)

    def judge(draft: Draft, logits: Tensor, source: torch.Generator) -> Kept:
        if temperature == 0:
            return accept(draft.tokens, logits)
        return accept_sampled(draft.tokens, draft.proposal, logits, temperature, source)

    return speculate(
        model, verifier, prompt, length, drafter, judge, mask=mask, generator=generator
    )
