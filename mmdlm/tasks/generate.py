"""Generate answers for examples; shared by all tasks that decode."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from encoders.checks import shown
from mmdlm.decoding import preset
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.start import check_length
from mmdlm.decoding.strategy import Strategy
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.processor import MediaCache, Processor
from mmdlm.tasks.watch import WATCHER, Watched

LENGTH = 32  # default canvas length in tokens
WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")  # word prefixes of byte-level BPE and sentencepiece


@dataclass(frozen=True)
class Answer:
    """A generated answer with decoding statistics.

    Args:
        text: generated text; empty for a checkpoint without a tokenizer.
        tokens: token ids of the text, up to the first end token.
        forwards: backbone forwards until the answer was complete.
        seconds: wall time of its batch, including encoders, excluding file reading.
        confidence: probability of each token when it was committed; 0 for given tokens.
        step: 0-based step that committed each token; -1 for given tokens.
        words: (word, step of its last token, lowest confidence of its tokens) of each word.
        truncated: True if the canvas was filled without an end token.
        probabilities: probability of each choice if `choices` were given, else None.
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
        """Dict of JSON-serializable values."""
        return asdict(self) | {"tokens_per_forward": self.tokens_per_forward}


@dataclass(frozen=True)
class Settings:
    """Instruction, canvas length in tokens and strategies of a task."""

    prompt: str | None
    length: int
    strategies: list[Strategy]


@dataclass(frozen=True)
class Filled:
    """A decoded canvas.

    Args:
        tokens: G token ids.
        step: G commit steps, -1 for given tokens.
        confidence: G probabilities at the commit step.
        forwards: see `Answer`.
        seconds: see `Answer`.
    """

    tokens: list[int]
    step: list[int]
    confidence: list[float]
    forwards: int
    seconds: float

    def answer(
        self, model: MultimodalDLM, text: str, size: int, *, truncated: bool = False
    ) -> Answer:
        """Answer with the given text for the first `size` tokens of the canvas."""
        tokens = self.tokens[:size]
        return Answer(
            text,
            tuple(tokens),
            self.forwards,
            self.seconds,
            tuple(self.confidence[:size]),
            tuple(self.step[:size]),
            words(model, tokens, self.step, self.confidence),
            truncated,
        )


def resolve_settings(
    model: MultimodalDLM,
    task: str,
    prompt: str | None = None,
    length: int | None = None,
    strategies: preset.Choice = None,
    *,
    needs_prompt: bool = True,
    is_sized: bool = True,
) -> Settings:
    """Settings of a task: the caller's arguments, then the checkpoint's decoding.yaml.

    Without an entry there, the canvas has 32 tokens and the default strategies are used.

    Args:
        model: model; `model.preset` holds the defaults per task.
        task: "caption", "answer", ...
        prompt: instruction; None: the checkpoint's default.
        length: canvas length in tokens; None: the checkpoint's default.
        strategies: strategies or preset name; None: the checkpoint's default.
        needs_prompt: raise if there is no instruction.
        is_sized: `length` is that of the canvas, and warns of strategies that are too coarse for
            it; False if a template decides.
    Raises:
        ValueError: there is no instruction, or the length is not positive.
    """
    if not isinstance(prompt, str | None):
        raise TypeError(f"prompt is {shown(prompt)}, expected text")
    defaults = model.preset.get(task) or {}
    prompt = defaults.get("prompt") if prompt is None else prompt
    if prompt is None and needs_prompt:
        has = sorted(name for name, entry in model.preset.items() if entry.get("prompt"))
        raise ValueError(
            f"this checkpoint has no default prompt for {task!r}"
            + (f", only for {', '.join(has)}" if has else "")
            + f"; pass prompt='...' (mmdlm {task} --prompt)"
        )
    length = defaults.get("length") or LENGTH if length is None else length
    check_length(length)
    if strategies is None:  # the checkpoint's strategies need no check against the length
        found = _default_strategies(defaults.get("strategies") or [])
    else:
        found = preset.effective(strategies, length) if is_sized else preset.strategies(strategies)
    return Settings(prompt, length, [*found, *model.strategies])


def _default_strategies(entries: Items[Any]) -> list[Strategy]:
    """Strategies of a checkpoint's defaults; equal recipes are built once."""
    if any(isinstance(entry, Strategy) for entry in entries):
        return preset.strategies(entries)
    return list(_build(json.dumps(entries)))


@lru_cache(maxsize=64)
def _build(entries: str) -> tuple[Strategy, ...]:
    """Strategies of recipes in JSON; they are immutable, so that calls can share them."""
    return tuple(preset.strategies(json.loads(entries)))


def generate_from_media(
    model: MultimodalDLM,
    task: str,
    kind: str,
    item: Any,
    prompt: str | None,
    length: int | None,
    strategies: preset.Choice,
    batch_size: int,
    details: bool,
    seed: int | None,
) -> Any:
    """Answers to one instruction for each image or recording.

    Args:
        model: model.
        task: task name in the checkpoint's preset.
        kind: "image" or "audio".
        item: one item, or a list of items.
        prompt: see `resolve_settings`.
        length: see `resolve_settings`.
        strategies: see `resolve_settings`.
        batch_size: see `fill`.
        details: see `unwrap`.
        seed: see `fill`.
    """
    require_model(model, task)
    model.processor.require(kind)
    settings = resolve_settings(model, task, prompt, length, strategies)
    examples = [
        Example((user(Media(kind, one), settings.prompt), assistant(Slot(length=settings.length))))
        for one in as_list(item)
    ]
    filled = fill(model, examples, settings.strategies, batch_size=batch_size, seed=seed)
    answers = to_answers(model, filled, stacklevel=4)
    return unwrap(answers, isinstance(item, list), details)


def to_answers(
    model: MultimodalDLM, filled: Items[Filled], *, verbatim: bool = False, stacklevel: int = 3
) -> list[Answer]:
    """Answers in decoded canvases; warns once if answers were truncated.

    Args:
        model: model.
        filled: decoded canvases, see `fill`.
        verbatim: see `finish`.
        stacklevel: see `warnings.warn`; 3 is the caller of the calling function.
    """
    answers = [finish(model, each, verbatim) for each in filled]
    full = [answer for answer in answers if answer.truncated]
    if full:
        which = "the answer" if len(answers) == 1 else f"{len(full)} of {len(answers)} answers"
        warnings.warn(
            f"{which} filled the canvas of {len(full[0].tokens)} tokens without an end token; "
            "pass a larger length= (--length) if words are missing",
            stacklevel=stacklevel,
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
    features: dict[Hashable, Tensor] | None = None,
) -> list[Filled]:
    """Decoded canvas of each example, in order, independent of the batching.

    In float32 logits differ by about 1e-6 between batch sizes, which decides exact ties only. In
    bfloat16 and float16 rounding may decide near ties, see "Batches and threads" in the README.

    The same path or object is encoded once in a call, equal content at least once in a batch.

    Args:
        model: model.
        examples: one conversation each; canvases of equal length share batches.
        strategies: see `mmdlm.decode`.
        batch_size: examples per batch.
        seed: seed of a separate generator per example; None: torch's default generator.
        chat: see `mmdlm.processor.Processor.prompt`.
        features: embeddings of media by content, reused and added to; None to keep none.
    Raises:
        ValueError: an example is not valid; its index among several is in the message or a note.
    """
    if not isinstance(seed, int | None):
        raise TypeError(f"seed is {shown(seed)}, expected an integer or None")
    processor, show = model.processor, WATCHER.get()
    media = MediaCache(examples, embeddings={} if features is None else features)
    sizes = [len(processor.canvas(example.messages)) for example in examples]
    done: dict[int, Filled] = {}
    for batch in batches(sizes, batch_size):
        media.numbers = batch
        packed = processor.pack([examples[i] for i in batch], media, chat=chat)
        begin = time.perf_counter()
        sequence = model.embed(packed.prompts, media.embeddings)
        if features is None:
            media.forget()
        streams = (torch.Generator(model.device).manual_seed(seed or 0) for _ in batch)
        decoded = decode(
            model,
            sequence,
            sizes[batch[0]],
            strategies,
            generator=None if seed is None else list(streams),
            canvas=packed.canvas,
            on_step=None if show is None else Watched(batch, show),
        )
        seconds = time.perf_counter() - begin
        done |= zip(batch, _filled(decoded, seconds), strict=True)
    return [done[i] for i in range(len(examples))]


def _filled(decoded: Decoded, seconds: float) -> list[Filled]:
    """Decoded canvas of each batch row."""
    history = decoded.history
    return [
        Filled(tokens, step, confidence, forwards, seconds)
        for tokens, step, confidence, forwards in zip(
            decoded.tokens[:, -history.step.shape[1] :].tolist(),
            history.step.tolist(),
            history.confidence.tolist(),
            decoded.forwards,
            strict=True,
        )
    ]


def finish(model: MultimodalDLM, filled: Filled, verbatim: bool = False) -> Answer:
    """Answer in a decoded canvas: the tokens before the first end token.

    Args:
        model: model.
        filled: decoded canvas.
        verbatim: keep white space at both ends, which is part of a continued text.
    """
    ends = end_ids(model)
    tokens = filled.tokens
    size = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    if model.tokenizer is None:
        text = ""
    elif verbatim:
        text = model.tokenizer.continuation(tokens[:size])
    else:
        text = model.tokenizer.decode(tokens[:size]).strip()
    return filled.answer(model, text, size, truncated=size == len(tokens))


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


def masked_canvas(model: MultimodalDLM | Processor, length: int) -> Tensor:
    """Canvas of mask tokens, int64 [length]."""
    if model.spec.mask_id is None:
        raise model.spec.unknown_mask()
    check_length(length)
    return torch.full((length,), model.spec.mask_id)


def end_ids(model: MultimodalDLM) -> set[int]:
    """Token ids that end an answer."""
    return {model.spec.eos_id, *model.spec.stop_ids}


def check_batch_size(batch_size: int) -> None:
    """Raises TypeError unless the batch size is an integer, ValueError unless it is positive."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size is {shown(batch_size)}, expected an integer")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def as_list(item: Any) -> list[Any]:
    """The list itself, or a list of the single item."""
    return item if isinstance(item, list) else [item]


def unwrap(answers: list[Answer], is_many: bool, details: bool) -> Any:
    """Return value of a task: answers or their texts, as a list or a single one.

    Args:
        answers: at least one answer.
        is_many: return a list.
        details: return `Answer` instead of text.
    """
    results = answers if details else [answer.text for answer in answers]
    return results if is_many else results[0]


def batches(sizes: Items[int], batch_size: int) -> list[list[int]]:
    """Batches of example indices; all canvases of a batch have the same length.

    Args:
        sizes: canvas length of each example.
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
