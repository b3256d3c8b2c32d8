"""The loop of all methods in which a diffusion model drafts and a causal model verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmdlm.decoding.decode import Decoded, History
from mmdlm.decoding.start import start
from mmdlm.decoding.state import Source, State, streams
from mmdlm.layout import Sequence
from mmdlm.model import MultimodalDLM
from mmdlm.speculative.accept import Kept
from mmdlm.speculative.verifier import Scorer, as_verifier, check_vocabulary


class Draft(NamedTuple):
    """What a diffusion model proposes.

    Args:
        tokens: ids that may follow.
        forwards: forwards of the diffusion model it took.
        proposal: [k V] probabilities the tokens were drawn from, None where they were chosen.
    """

    tokens: list[int]
    forwards: int = 1
    proposal: Tensor | None = None


class Drafter(Protocol):
    """Drafts for one row; a new one is made for every row."""

    def propose(self, answer: list[int], room: int) -> Draft:
        """What may follow an answer that is so far and may grow by at most `room` tokens."""

    def learn(self, accepted: int) -> None:
        """Told how many tokens of the last draft were accepted."""


Judge = Callable[[Draft, Tensor, torch.Generator], Kept]
"""From a draft of k tokens, the verifier's logits [k + 1 V] and a source of draws to what stays."""


@dataclass(frozen=True, kw_only=True)
class Verified(Decoded):
    """A decode in which a verifier had the last word; `nfe` counts the diffusion model's forwards.

    In `history`, a step is a round of drafting and verifying, and a confidence the verifier's
    probability of the token.

    Args:
        checks: forwards of the verifier.
        drafted: for each row, tokens of the draft of each round.
        accepted: for each row, how many of them were accepted.
    """

    checks: int
    drafted: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]


@torch.inference_mode()
def speculate(
    model: MultimodalDLM,
    verifier: Scorer,
    prompt: Tensor | Sequence,
    length: int,
    drafter: Callable[[list[int], torch.Generator], Drafter],
    judge: Judge,
    *,
    mask: Tensor | None = None,
    generator: Source = None,
) -> Verified:
    """Answers written left to right, each round a draft and what the verifier keeps of it.

    An answer ends with the first end id of either model; end ids follow it. The mask id is never
    written. Rows are decoded one after the other, each as it is alone.

    Args:
        model: the diffusion model, which says where an answer ends and what fills the rest.
        verifier: see `mmdlm.speculative.verifier`, or a transformers model.
        prompt: token ids [B P]; the verifier reads the same ids.
        length: positions G to fill.
        drafter: makes the drafter of a row from its prompt's ids and its source of draws.
        judge: see `Judge`.
        mask: [B P] key padding of the prompt, True = real; on the left.
        generator: source of random draws, one for the batch or one per row; None: torch's own.
    Raises:
        ValueError: the vocabularies differ, the prompt is empty or holds media, or the length is
            not positive.
    """
    verifier = as_verifier(verifier)
    check_vocabulary(model, verifier)
    # Refuses what no decode would take; the canvas itself is laid out anew in every round.
    state = start(model, prompt, length, mask, generator, None, None)
    _check_prompt(state, verifier)
    real = state.sequence.mask[:, : state.prompt]
    sources = streams(generator, len(state.tokens), torch.device("cpu"))
    before = verifier.forwards
    rows = [
        _row(model, verifier, tokens[here].tolist(), length, drafter, judge, source)
        for tokens, here, source in zip(state.tokens[:, : state.prompt], real, sources, strict=True)
    ]
    device = state.tokens.device
    answer = torch.tensor([row.tokens for row in rows], device=device)
    history = History(
        torch.tensor([row.step for row in rows], device=device),
        torch.tensor([row.sure for row in rows], device=device),
    )
    return Verified(
        torch.cat([state.tokens[:, : state.prompt], answer], 1),
        sum(row.forwards for row in rows),
        history,
        tuple(row.forwards for row in rows),
        checks=verifier.forwards - before,
        drafted=tuple(tuple(row.drafted) for row in rows),
        accepted=tuple(tuple(row.accepted) for row in rows),
    )


def _check_prompt(state: State, verifier: Scorer) -> None:
    """Refuses a prompt that the verifier cannot read."""
    if state.sequence.media is not None:
        raise ValueError("the prompt holds media, which the verifier cannot see; give token ids")
    real = state.sequence.mask[:, : state.prompt]
    if not bool(real.any(1).all()):
        raise ValueError("the prompt is empty; give at least one token, which the verifier reads")
    highest = int((state.tokens[:, : state.prompt] * real).max())
    if highest >= verifier.vocab:
        raise ValueError(
            f"the prompt holds id {highest}, the verifier knows ids below {verifier.vocab}; use a "
            "template of tokens that both models know"
        )


def masks(
    model: MultimodalDLM, prompt: list[int], answer: list[int], count: int, vocab: int
) -> Tensor:
    """What the model says about `count` masks behind a text, [count V] float32; one forward.

    The mask id is impossible, and so are ids the verifier does not know.

    Args:
        model: the diffusion model.
        prompt: ids of the prompt, at least one.
        answer: ids of the answer so far.
        count: how many masks follow it.
        vocab: number of ids the verifier knows.
    """
    mask_id, written = model.spec.mask_id, len(answer)
    canvas = torch.tensor([[*answer, *[mask_id] * count]])
    state = start(model, torch.tensor([prompt]), written + count, None, None, None, canvas)
    at = state.prompt + written
    logits = model.run(state.sequence, slice(0, state.length), slice(at, at + count), None, None)[0]
    logits[:, mask_id] = -torch.inf
    logits[:, vocab:] = -torch.inf
    return logits


class _Row(NamedTuple):
    """A finished row: G tokens, rounds and probabilities, and how it went."""

    tokens: list[int]
    step: list[int]
    sure: list[float]
    forwards: int
    drafted: list[int]
    accepted: list[int]


def _row(
    model: MultimodalDLM,
    verifier: Scorer,
    prompt: list[int],
    length: int,
    drafter: Callable[[list[int], torch.Generator], Drafter],
    judge: Judge,
    generator: torch.Generator,
) -> _Row:
    """One row from its prompt's ids to the end of its answer."""
    spec = model.spec
    ends = {spec.eos_id, *spec.stop_ids, *verifier.ends}
    own = drafter(prompt, generator)
    row = _Row([], [], [], 0, [], [])
    ended, forwards = False, 0
    while len(row.tokens) < length and not ended:
        draft = own.propose(row.tokens, length - len(row.tokens))
        text = torch.tensor([*prompt, *row.tokens, *draft.tokens])
        logits = verifier.score(text, last=len(draft.tokens))[:, : spec.transformer.vocab].clone()
        if spec.mask_id < logits.shape[1]:
            logits[:, spec.mask_id] = -torch.inf
        kept, accepted = judge(draft, logits, generator)
        kept = kept[: length - len(row.tokens)]
        end = next((i for i, token in enumerate(kept) if token in ends), None)
        if end is not None:
            kept, ended = kept[: end + 1], True
        at = torch.tensor(kept, dtype=torch.long, device=logits.device)
        sure = logits[: len(kept)].softmax(-1).gather(1, at[:, None])[:, 0]
        if bool(sure.isnan().any()):
            raise ValueError("the verifier gave NaN; check its weights, or load it in float32")
        accepted = min(accepted, len(kept))
        own.learn(accepted)
        forwards += draft.forwards
        row.tokens.extend(kept)
        row.step.extend([len(row.drafted)] * len(kept))
        row.sure.extend(sure.tolist())
        row.drafted.append(len(draft.tokens))
        row.accepted.append(accepted)
    rest = length - len(row.tokens)
    row.tokens.extend([spec.eos_id] * rest)
    row.step.extend([-1] * rest)
    row.sure.extend([0.0] * rest)
    return row._replace(forwards=forwards)
