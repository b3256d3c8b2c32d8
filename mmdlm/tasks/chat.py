"""Answers to texts and conversations."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.messages import Example, Slot, assistant, conversation, is_conversation
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import generate as fill_in
from mmdlm.tasks.generate import settings, shown

LENGTH = 128  # tokens of an answer where neither the caller nor the checkpoint says


def generate(
    model: MultimodalDLM,
    prompt: Any,
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
        prompt: a text, or a conversation (see `mmdlm.messages.conversation`; text, images and
            clips), or a list of either.
        length: tokens of the canvas; None for the checkpoint's own, else 128.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: prompts decoded together; it does not change the answers.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers; equal prompts get equal answers.
        chat: True: a text is what a user says; False: it is continued as it is, without the chat
            template; None: as the checkpoint's files say, see `mmdlm.processor.Processor.prompt`.
    Raises:
        ValueError: a prompt is empty, holds the mask token or is no conversation, or the checkpoint
            lacks the tokenizer or chat template it takes.
    """
    is_many = isinstance(prompt, list) and not is_conversation(prompt)
    own = (model.preset.get("generate") or {}).get("length")
    length = own or LENGTH if length is None else length
    how = settings(model, "generate", None, length, strategies, needs_prompt=False)
    examples, prompts = [], prompt if is_many else [prompt]
    for i, one in enumerate(prompts):
        if not one or (isinstance(one, str) and not one.strip()):
            raise ValueError(f"prompt {i} is empty; say something")
        examples.append(Example((*conversation(one), assistant(Slot(length=how.length)))))
    if chat is None and not all(isinstance(one, str) for one in prompts):
        chat = True  # a conversation needs the template, and texts beside it take it too
    answers = fill_in(model, examples, how.strategies, batch_size=batch_size, seed=seed, chat=chat)
    return shown(answers, is_many, details)
