"""Guided diffusion of FlashDLM: a diffusion drafter guided by a causal model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept, Rule, accept, check_rule
from mmdlm.speculative.speculate import Draft, Verified, masks, speculate
from mmdlm.speculative.verifier import Scorer, as_verifier


class _FullDraft:
    """Drafts the whole answer in one forward, and proposes it in chunks."""

    def __init__(self, model: MultimodalDLM, prompt: list[int], chunk: int, vocab: int) -> None:
        self.model, self.prompt, self.chunk, self.vocab = model, prompt, chunk, vocab
        self.remaining: list[int] = []
        self.proposed = 0

    def propose(self, answer: list[int], room: int) -> Draft:
        """Next chunk of the draft; a new draft if the last chunk was not fully accepted."""
        forwards = 0
        if not self.remaining:
            logits = masks(self.model, self.prompt, answer, room, self.vocab)
            self.remaining = logits.argmax(-1).tolist()
            forwards = 1
        part, self.remaining = self.remaining[: self.chunk], self.remaining[self.chunk :]
        self.proposed = len(part)
        return Draft(part, forwards)

    def learn(self, accepted: int) -> None:
        """Discards the draft after a rejected token."""
        if accepted < self.proposed:
            self.remaining = []


def guided(
    model: MultimodalDLM,
    guider: Scorer | Any,
    prompt: Tensor | Sequence,
    length: int,
    rule: Rule = "deterministic",
    *,
    top_k: int = 5,
    ratio: float = 0.5,
    chunk: int = 32,
    mask: Tensor | None = None,
) -> Verified:
    """Guided diffusion: a parallel draft, accepted from left to right by a causal guider.

    In each round, the diffusion model fills all masks by argmax, and one forward of the guider
    scores them. Tokens up to the first rejected one are kept, and the guider's argmax replaces
    that one. With "deterministic", the result is the guider's greedy text (speculative decoding).
    The other rules also keep less probable draft tokens. In low precision, near-ties of the guider
    may be resolved differently than in a plain generation.

    Source: Guided Diffusion of FlashDLM (arXiv 2505.21467; ZhanqiuHu/flash-dlm-experimental:
    guided_diffusion/diff_spec_utils_shifted.py).

    Args:
        model: diffusion model.
        guider: causal transformers model with the same vocabulary, or a
            `mmdlm.speculative.verifier.Scorer`.
        prompt: token ids [B P], shared by both models. Rows are decoded one by one.
        length: positions G to fill; a shorter answer is padded with end tokens.
        rule: see `mmdlm.speculative.accept.Rule`.
        top_k: see there.
        ratio: see there.
        chunk: draft tokens per forward of the guider.
        mask: [B P] key padding of the prompt, True = real; on the left.
    Returns:
        tokens, forwards of both models, and acceptance statistics.
    Raises:
        ValueError: an argument is out of range, or see `speculate`.
    """
    check_rule(rule, top_k, ratio)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1 token per forward")
    guider = as_verifier(guider)

    def judge(draft: Draft, logits: Tensor, generator: torch.Generator) -> Kept:
        # Without the last row: in the reference, no extra token follows a fully accepted draft.
        return accept(draft.tokens, logits[:-1], rule, top_k=top_k, ratio=ratio)

    def drafter(row: list[int], generator: torch.Generator) -> _FullDraft:
        return _FullDraft(model, row, chunk, guider.vocab)

    return speculate(model, guider, prompt, length, drafter, judge, mask=mask)
