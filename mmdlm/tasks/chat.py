"""Answers to texts and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.chat import Message
from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import blank, settings, shown
from mmdlm.tasks.generate import generate as fill_in
from mmdlm.tasks.request import Request

LENGTH = 128  # tokens of an answer where neither the caller nor the checkpoint says


def generate(
    model: MultimodalDLM,
    prompt: str | list[Message] | list[str] | list[list[Message]],
    *,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
    chat: bool | None = None,
) -> Any:
    """What a model says to a text or in a conversation; of a list of them, the list.

    Args:
        model: the model.
        prompt: a text, or a conversation as a list of {"role": "system", "user" or "assistant",
            "content": text}, or a list of either.
        length: tokens of the canvas; None for the checkpoint's own, else 128.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: prompts decoded together; it does not change the answers.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers; equal prompts get equal answers.
        chat: True: a text is what a user says; False: it is continued as it is, without the chat
            template; None: as the checkpoint's files say, see `MultimodalDLM.prompt`.
    Raises:
        ValueError: a prompt is empty, holds the mask token or is no conversation, or the checkpoint
            lacks the tokenizer or chat template it takes.
    """
    is_many = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], Mapping))
    own = (model.preset.get("generate") or {}).get("length")
    length = own or LENGTH if length is None else length
    how = settings(model, "generate", None, length, strategies, needs_prompt=False)
    canvas = blank(model, how.length)
    requests = [
        Request(model.prompt(one, chat=chat), canvas) for one in (prompt if is_many else [prompt])
    ]
    empty = next((i for i, request in enumerate(requests) if not len(request.prompt)), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} is empty; say something")
    answers = fill_in(model, requests, how.strategies, batch_size=batch_size, seed=seed)
    return shown(answers, is_many, details)
