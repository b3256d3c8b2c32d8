"""Examples in, answers out: what every task that fills a canvas shares."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import MultimodalDLM
from mmdlm.processor import MediaCache

LENGTH = 32  # tokens of an answer where neither the caller nor the checkpoint says
WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")  # byte-level and sentencepiece marks of a new word


@dataclass(frozen=True)
class Answer:
    """A finished answer and how it came about.

    Args:
        text: what the model says; empty for a checkpoint without a tokenizer.
        tokens: ids of the text, without what follows its end.
        forwards: forwards of the backbone until the answer was complete.
        seconds: time its batch took, encoders included, reading files not.
        confidence: probability of each token when it was committed; 0 where it was given.
        step: 0-based step that committed each token; -1 where it was given.
        words: (word, step of its last token, lowest confidence of its tokens) each.
        truncated: the canvas was filled without an end; a larger `length` may say more.
        probabilities: of each choice, where choices were given.
    """

    text: str
    tokens: tuple[int, ...]
    forwards: int
    seconds: float
    confidence: tuple[float, ...]
    step: tuple[int, ...]
    words: tuple[tuple[str, int, float], ...]
    truncated: bool = False
    probabilities: dict[str, float] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the text per forward of the backbone."""
        return len(self.tokens) / self.forwards if self.forwards else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self) | {"tokens_per_forward": self.tokens_per_forward}


@dataclass(frozen=True)
class Settings:
    """How a task is run: instruction, tokens of the canvas, strategies."""

    prompt: str | None
    length: int
    strategies: list[Strategy]


@dataclass(frozen=True)
class Filled:
    """A canvas after decoding.

    Args:
        tokens: G ids.
        step: G steps that committed them, -1 for none.
        confidence: G probabilities at that step.
        forwards: see `Answer`.
        seconds: see `Answer`.
    """

    tokens: list[int]
    step: list[int]
    confidence: list[float]
    forwards: int
    seconds: float


def settings(
    model: MultimodalDLM,
    task: str,
    prompt: str | None = None,
    length: int | None = None,
    strategies: preset.Choice = None,
    *,
    needs_prompt: bool = True,
) -> Settings:
    """What the caller asked for, completed from the checkpoint's decoding.yaml.

    Without an entry there the canvas has 32 tokens and the loop's defaults decode it.

    Args:
        model: its `preset` holds the defaults by task.
        task: "caption", "answer", ...
        prompt: the caller's own instruction.
        length: the caller's own canvas, in tokens.
        strategies: the caller's own strategies, or a preset's name.
        needs_prompt: whether the task is nothing without an instruction.
    Raises:
        ValueError: there is no instruction, or the length is not positive.
    """
    own = model.preset.get(task) or {}
    prompt = own.get("prompt") if prompt is None else prompt
    if prompt is None and needs_prompt:
        has = sorted(name for name, entry in model.preset.items() if entry.get("prompt"))
        raise ValueError(
            f"this checkpoint names no prompt for {task!r}"
            + (f", only for {', '.join(has)}" if has else "")
            + f"; say what to do with prompt='...' (mmdlm {task} --prompt)"
        )
    length = own.get("length") or LENGTH if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length!r}, expected tokens of the answer, 1 or more")
    if strategies is None:  # what a checkpoint brings was chosen for its answers
        return Settings(prompt, length, preset.strategies(own.get("strategies")))
    return Settings(prompt, length, preset.effective(strategies, length))


def ask(
    model: MultimodalDLM,
    task: str,
    kind: str,
    item: Any,
    *,
    details: bool,
    batch_size: int,
    seed: int | None,
    **chosen: Any,
) -> Any:
    """Answers of a task that gives every item of one modality the same instruction.

    Args:
        model: the model.
        task: name of the task in the checkpoint's preset.
        kind: "image" or "audio".
        item: one item, or a list of them.
        details: see `shown`.
        batch_size: see `generate`.
        seed: see `generate`.
        **chosen: prompt, length and strategies, see `settings`.
    """
    model.processor.require(kind)
    how = settings(model, task, **chosen)
    examples = [
        Example((user(Media(kind, one), how.prompt), assistant(Slot(length=how.length))))
        for one in listed(item)
    ]
    answers = generate(model, examples, how.strategies, batch_size=batch_size, seed=seed)
    return shown(answers, isinstance(item, list), details)


def generate(
    model: MultimodalDLM,
    examples: Items[Example],
    strategies: Items[Strategy],
    *,
    batch_size: int = 16,
    seed: int | None = None,
    chat: bool | None = None,
) -> list[Answer]:
    """The answer of each example, in order, with one warning when canvases were too short.

    Args:
        model: the model.
        examples: see `fill`.
        strategies: see `mmdlm.decode`.
        batch_size: see `fill`.
        seed: see `fill`.
        chat: see `fill`.
    """
    filled = fill(model, examples, strategies, batch_size=batch_size, seed=seed, chat=chat)
    answers = [finish(model, each) for each in filled]
    full = [answer for answer in answers if answer.truncated]
    if full:
        which = "the answer" if len(answers) == 1 else f"{len(full)} of {len(answers)} answers"
        warnings.warn(
            f"{which} filled the canvas of {len(full[0].tokens)} tokens without an end; pass a "
            "larger length= (--length) if words are missing",
            stacklevel=4,
        )
    return answers


@torch.inference_mode()
def fill(
    model: MultimodalDLM,
    examples: Items[Example],
    strategies: Items[Strategy],
    *,
    batch_size: int = 16,
    seed: int | None = None,
    chat: bool | None = None,
) -> list[Filled]:
    """The filled canvas of each example, in order; the batch it is in does not change it.

    A medium that several examples share is encoded once: the same path or object in the whole
    call, equal content at least within a batch.

    Args:
        model: the model.
        examples: one conversation each; canvases of one length share batches.
        strategies: see `mmdlm.decode`.
        batch_size: examples per batch.
        seed: every example draws random numbers from a generator of this seed; None: torch's own.
        chat: see `mmdlm.processor.Processor.prompt`.
    Raises:
        ValueError: an example cannot be read; a note of the error says which one it was.
    """
    processor, media = model.processor, MediaCache(examples)
    sizes = [len(processor.canvas(example.messages)) for example in examples]
    done: dict[int, Filled] = {}
    for batch in batches(sizes, batch_size):
        media.numbers = batch
        packed = processor.pack([examples[i] for i in batch], media, chat=chat)
        begin = time.perf_counter()
        sequence = model.embed(packed.prompts, media.embeddings)
        media.forget()
        generators = _generators(model, seed, len(batch))
        decoded = decode(
            model,
            sequence,
            sizes[batch[0]],
            strategies,
            generator=generators,
            canvas=packed.canvas,
        )
        seconds = time.perf_counter() - begin
        done |= zip(batch, _filled(decoded, sizes[batch[0]], seconds), strict=True)
    return [done[i] for i in range(len(examples))]


def _filled(decoded: Decoded, size: int, seconds: float) -> list[Filled]:
    """The canvas of each row of a decode."""
    history = decoded.history
    steps = history.step.amax(1) + 1  # [B]
    shared = max(1, int(steps.max()))
    return [
        # A row leaves the batch when it is complete, so it took part in its share of the forwards;
        # guidance makes several per step.
        Filled(tokens, step, confidence, -(-decoded.nfe * own // shared), seconds)
        for tokens, step, confidence, own in zip(
            decoded.tokens[:, -size:].tolist(),
            history.step.tolist(),
            history.confidence.tolist(),
            steps.tolist(),
            strict=True,
        )
    ]


def finish(model: MultimodalDLM, filled: Filled) -> Answer:
    """The answer that a filled canvas holds: what stands before its first end token."""
    ends = end_ids(model)
    tokens, step, confidence = filled.tokens, filled.step, filled.confidence
    size = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = "" if model.tokenizer is None else model.tokenizer.decode(tokens[:size]).strip()
    return Answer(
        text,
        tuple(tokens[:size]),
        filled.forwards,
        filled.seconds,
        tuple(confidence[:size]),
        tuple(step[:size]),
        words(model, tokens[:size], step, confidence),
        truncated=size == len(tokens),
    )


def words(
    model: MultimodalDLM, tokens: Items[int], step: Items[int], confidence: Items[float]
) -> tuple[tuple[str, int, float], ...]:
    """(word, step of its last token, lowest confidence of its tokens) of each word."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return ()
    groups: list[list[int]] = []
    for i, token in enumerate(tokens):
        piece = tokenizer.backend.id_to_token(token) or ""
        if not groups or tokenizer.words is not None or piece.startswith(WORD_STARTS):
            groups.append([])
        groups[-1].append(i)
    return tuple(
        (
            tokenizer.decode([tokens[i] for i in group]).strip(),
            max(step[i] for i in group),
            min(confidence[i] for i in group),
        )
        for group in groups
    )


def blank(model: MultimodalDLM, length: int) -> Tensor:
    """A canvas of masks, int64 [length]."""
    return torch.full((length,), model.spec.mask_id)


def end_ids(model: MultimodalDLM) -> set[int]:
    """The ids after which nothing belongs to an answer."""
    return {model.spec.eos_id, *model.spec.stop_ids}


def check_batch_size(batch_size: int) -> None:
    """Raises unless at least one request is to share a batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")


def listed(item: Any) -> list[Any]:
    """The items of a list, or the one item that is no list."""
    return item if isinstance(item, list) else [item]


def shown(answers: list[Answer], many: bool, details: bool) -> Any:
    """Answers as the caller asked for them: many or one, texts or all details."""
    found = answers if details else [answer.text for answer in answers]
    return found if many else found[0]


def _generators(model: MultimodalDLM, seed: int | None, count: int) -> list[torch.Generator] | None:
    if seed is None:
        return None
    return [torch.Generator(model.device).manual_seed(seed) for _ in range(count)]


def batches(sizes: Items[int], batch_size: int) -> list[list[int]]:
    """Indices of examples whose canvases have one length, `batch_size` at a time.

    Args:
        sizes: length of each canvas.
        batch_size: examples per batch, at least 1.
    """
    check_batch_size(batch_size)
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    return [
        group[i : i + batch_size]
        for group in groups.values()
        for i in range(0, len(group), batch_size)
    ]
