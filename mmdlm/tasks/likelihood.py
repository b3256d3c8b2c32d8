"""Log likelihood of answers: a bound for masked diffusion, exact where a block is one token."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.checks import shown
from mmdlm.layout import Sequence, chosen
from mmdlm.messages import (
    RAW,
    Example,
    Message,
    Slot,
    Text,
    assistant,
    conversation,
    is_conversation,
    number_error,
)
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.objectives.mask_plans import (
    MOST_EXACT,
    Plan,
    complementary,
    exact,
    monte_carlo,
    quadrature,
    stratified,
)
from mmdlm.processor import MediaCache
from mmdlm.tasks.generate import check_batch_size

Method = Literal["exact", "monte_carlo", "stratified", "complementary", "quadrature"]
CHUNK = 2048  # positions whose logits exist at a time


@dataclass(frozen=True)
class Likelihood:
    """A bound on the log likelihood of an answer.

    Args:
        bound: lower bound on the natural logarithm of the probability, or an estimate of it.
        standard_error: of the estimate over the draws of masks; 0 without draws, None if there
            are too few draws to tell.
        tokens: number of scored tokens.
        forwards: sequences that went through the backbone.
        method: "exact", or the name of the estimate.
    """

    bound: float
    standard_error: float | None
    tokens: int
    forwards: int
    method: str

    @property
    def perplexity(self) -> float:
        """exp(-bound / tokens), an upper bound on the perplexity per token.

        Do not compare it with the exact perplexity of an autoregressive model as if it were one.
        """
        return math.exp(-self.bound / self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Dict of JSON-serializable values."""
        return asdict(self) | {"perplexity": self.perplexity}


@torch.inference_mode()
def likelihood(
    model: MultimodalDLM,
    prompt: Any,
    answer: Any,
    *,
    method: Method | None = None,
    samples: int = 128,
    group: int = 16,
    cfg: float = 0.0,
    length: int | None = None,
    batch_size: int = 16,
    chat: bool | None = None,
    details: bool = False,
    seed: int = 0,
) -> Any:
    """Lower bound on the log likelihood of an answer to a prompt, in nats.

    The bound is that of masked-diffusion training, see `mmdlm.objectives.mask_plans`. Where the
    model's attention splits the answer into blocks, it is the sum of the bounds of the blocks,
    each given the prompt and the blocks before it. With blocks of one token, as in autoregressive
    models, that is the log likelihood itself.

    Args:
        model: model.
        prompt: text, a conversation (see `mmdlm.messages.conversation`) or token ids int64 [P]; or
            a list of texts or conversations, one per answer. One prompt serves all answers.
        answer: text or token ids int64 [A]; or a list of them.
        method: "monte_carlo": LLaDA's. "stratified": every number of masks equally often.
            "complementary": stratified, in pairs of a mask and its complement. "quadrature":
            Gauss-Legendre nodes of the mask probability. "exact": all 2^A - 1 masks of a block.
            None: "exact" where that takes at most `samples` forwards, else "complementary", which
            has the smallest error for its forwards.
        samples: masks per block; equal masks are computed once, so short answers take fewer
            forwards.
        group: masks of "monte_carlo" whose sizes are evenly spread, LLaDA's batch size.
        cfg: scale of classifier-free guidance as in LLaDA; 0 for none.
        length: canvas in tokens. A text is padded to it with end tokens, which are scored as in
            training. None: the answer alone is scored, as in LLaDA.
        batch_size: sequences per forward; it does not change the result.
        chat: see `mmdlm.generate`. Without a chat template, white space at the end of the prompt
            moves to the start of the answer, as in lm-eval.
        details: return `Likelihood` instead of a number.
        seed: of the masks; answers of equal length get the same masks.
    Returns:
        float, or list[float] for a list; `Likelihood` instead of float if details=True.
    Raises:
        TypeError: prompt or answer are of another kind.
        ValueError: an answer is empty, or holds the mask token; lists differ in length.
    """
    require_model(model, "likelihood")
    check_batch_size(batch_size)
    if method is not None and method not in get_args(Method):
        raise ValueError(f"method is {method!r}, expected one of {', '.join(get_args(Method))}")
    if min(samples, group) < 1 or not cfg >= 0:
        raise ValueError(
            f"samples is {samples}, group {group} and cfg {cfg}; expected at least 1, 1 and 0"
        )
    model.spec.require_masks("likelihood")
    is_many = isinstance(answer, list) and not _is_ids(answer)
    examples = _examples(model, prompt, answer if is_many else [answer], length, chat)
    media, found = MediaCache(examples), []
    for start in range(0, len(examples), batch_size):
        media.numbers = range(start, min(start + batch_size, len(examples)))
        packed = model.processor.pack([examples[i] for i in media.numbers], media, chat=chat)
        sequence = model.embed(packed.rows, media.embeddings)
        media.forget()
        plans = _plans(sequence, method, samples, group, seed)
        found += score(model, sequence, plans, cfg, batch_size)
    results = found if details else [one.bound for one in found]
    return results if is_many else results[0]


@dataclass(frozen=True)
class Part:
    """The masks of one block of an answer.

    Args:
        row: row of the batch.
        columns: [A] int64 positions of the block.
        plan: masks of these positions.
        method: name of the plan.
    """

    row: int
    columns: Tensor
    plan: Plan
    method: str


def score(
    model: MultimodalDLM, sequence: Sequence, parts: Items[Part], cfg: float, batch_size: int
) -> list[Likelihood]:
    """The bound of each row of a batch.

    Args:
        model: model.
        sequence: prompts with complete answers, without branches.
        parts: at least one of each row; every answer position is in one of them.
        cfg: see `likelihood`.
        batch_size: sequences per forward.
    """
    jobs, numbers = [], []
    for part in parts:
        # Equal masks are computed once. The empty one sorts first and has no loss: number 0.
        empty = torch.zeros_like(part.plan.masks[:1])
        both = torch.cat([empty, part.plan.masks])
        masks, number = both.unique(dim=0, return_inverse=True)
        masks, number = masks[1:], number[1:]
        masked = torch.zeros(len(masks), sequence.tokens.shape[1], dtype=torch.bool)
        masked[:, part.columns.cpu()] = masks
        jobs.append((torch.full((len(masks),), part.row), masked))
        numbers.append(number)
    rows, masked = (torch.cat(each).to(model.device) for each in zip(*jobs, strict=True))
    losses = [
        _losses(model, chosen(sequence, some), at, cfg)
        for some, at in zip(rows.split(batch_size), masked.split(batch_size), strict=True)
        if len(some)
    ]
    losses = torch.cat([torch.zeros(0), *(each.cpu() for each in losses)])
    found: dict[int, Likelihood] = {}
    sizes = [len(some) for some, _ in jobs]
    for part, number, own in zip(parts, numbers, losses.split(sizes), strict=True):
        bound, error = part.plan.estimate(F.pad(own, (1, 0))[number])
        one = Likelihood(bound, error, len(part.columns), len(own), part.method)
        found[part.row] = _sum(found[part.row], one) if part.row in found else one
    return [found[row] for row in sorted(found)]


def _losses(model: MultimodalDLM, sequence: Sequence, masked: Tensor, cfg: float) -> Tensor:
    """Summed cross entropy [J] of the masked tokens of each row, float32.

    Args:
        model: model.
        sequence: J rows with clean answers.
        masked: [J L] bool.
        cfg: see `likelihood`.
    """
    sequence, masked = _cut(sequence, masked)
    target = sequence.tokens[masked]
    noisy = sequence.tokens.masked_fill(masked, model.spec.mask_id)
    inputs = [noisy]
    if cfg:  # the text of the prompt masked, the media left in place, as in `decoding.guidance.cfg`
        text = sequence.mask & ~(sequence.is_medium | sequence.is_answer)
        inputs.append(noisy.masked_fill(text, model.spec.mask_id))
    hidden = [model.hidden_at(sequence.with_tokens(each), masked) for each in inputs]
    losses = []
    for ids, *parts in zip(target.split(CHUNK), *(h.split(CHUNK) for h in hidden), strict=True):
        logits, *plain = (model.backbone.head(part).float() for part in parts)
        if plain:
            logits = plain[0] + (cfg + 1) * (logits - plain[0])
        losses.append(F.cross_entropy(logits, ids, reduction="none"))
    row = masked.nonzero()[:, 0]
    return torch.zeros(len(masked), device=row.device).index_add_(0, row, torch.cat(losses))


def _cut(sequence: Sequence, masked: Tensor) -> tuple[Sequence, Tensor]:
    """Rows without the columns that no masked token attends to: padding and later blocks."""
    top = sequence.level.masked_fill(~masked, -1).amax(1, keepdim=True)
    used = (sequence.mask & (sequence.level <= top)).any(0).nonzero()[:, 0]
    keep = slice(int(used[0]), int(used[-1]) + 1)
    names = ("tokens", "role", "source", "mask", "positions", "level")
    cut = {name: getattr(sequence, name)[:, keep] for name in names}
    return replace(sequence, **cut), masked[:, keep]


def _plans(
    sequence: Sequence, method: Method | None, samples: int, group: int, seed: int
) -> list[Part]:
    """Masks of every block of every row."""
    parts = []
    answer, level = sequence.is_answer.cpu(), sequence.level.cpu()
    for row in range(len(answer)):
        generator = torch.Generator().manual_seed(seed)
        columns = answer[row].nonzero()[:, 0]
        for block in level[row, columns].unique().tolist():
            inside = columns[level[row, columns] == block]
            size = len(inside)
            short = size <= MOST_EXACT and 2**size - 1 <= samples
            name = method or ("exact" if short else "complementary")
            plan = _plan(name, size, samples, group, generator)
            parts.append(Part(row, inside, plan, name))
    return parts


def _plan(name: str, size: int, samples: int, group: int, generator: torch.Generator) -> Plan:
    if name == "exact":
        return exact(size)
    if name == "monte_carlo":
        return monte_carlo(size, samples, generator, group)
    makers = {"stratified": stratified, "complementary": complementary, "quadrature": quadrature}
    return makers[name](size, samples, generator)


def _sum(one: Likelihood, other: Likelihood) -> Likelihood:
    """The bound of two blocks of one answer."""
    errors = (one.standard_error, other.standard_error)
    methods = sorted({*one.method.split("+"), *other.method.split("+")})
    return Likelihood(
        one.bound + other.bound,
        None if None in errors else math.hypot(*errors),
        one.tokens + other.tokens,
        one.forwards + other.forwards,
        "+".join(methods),
    )


def _examples(
    model: MultimodalDLM, prompt: Any, answers: list[Any], length: int | None, chat: bool | None
) -> list[Example]:
    """One example per answer."""
    is_one = not isinstance(prompt, list) or is_conversation(prompt) or _is_ids(prompt)
    prompts = [prompt] * len(answers) if is_one else prompt
    if len(prompts) != len(answers) or not answers:
        raise ValueError(
            f"got {len(prompts)} prompts and {len(answers)} answers, expected one answer or more, "
            "and one prompt or as many as answers"
        )
    is_raw = chat is False or (chat is None and model.processor.jinja is None)
    examples = []
    for i, (asked, answer) in enumerate(zip(prompts, answers, strict=True)):
        try:
            if is_raw and isinstance(asked, str) and isinstance(answer, str):
                kept = asked.rstrip()
                asked, answer = kept, asked[len(kept) :] + answer
            examples.append(Example((*_prompt(asked), assistant(_answer(model, answer, length)))))
        except (TypeError, ValueError) as error:
            if len(answers) > 1:
                number_error(error, i)
            raise
    return examples


def _prompt(given: Any) -> tuple[Message, ...]:
    """Messages of a prompt."""
    if isinstance(given, Tensor) or _is_ids(given):
        ids = torch.as_tensor(given)
        if ids.ndim != 1:
            raise ValueError(f"prompt has shape {list(ids.shape)}, expected token ids [P]")
        return (Message(RAW, (Text(ids),)),)
    if not isinstance(given, str) and not is_conversation(given):
        raise TypeError(f"prompt is {shown(given)}, expected text, a conversation or token ids [P]")
    return conversation(given)


def _answer(model: MultimodalDLM, given: Any, length: int | None) -> Text | Slot:
    """The answer as a part of a message; a slot pads it to the canvas."""
    if isinstance(given, str):
        if not given:
            raise ValueError("answer is empty, expected at least one token")
        model.processor.encode(given)
        return Text(given) if length is None else Slot("text", length, given)
    if not isinstance(given, Tensor) and not _is_ids(given):
        raise TypeError(f"answer is {shown(given)}, expected text or token ids [A]")
    ids = torch.as_tensor(given)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"answer has shape {list(ids.shape)}, expected token ids [A], at least 1")
    if length is not None:
        raise ValueError("length pads text answers; append end tokens to the ids instead")
    if bool((ids == model.spec.mask_id).any()):
        raise ValueError(f"answer holds the mask id {model.spec.mask_id}, expected known tokens")
    return Text(ids)


def _is_ids(given: Any) -> bool:
    """Whether a list holds token ids."""
    return (
        isinstance(given, list)
        and len(given) > 0
        and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
    )
