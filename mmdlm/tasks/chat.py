"""Generate text from prompts and conversations."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Items
from typing import Any

from torch import Tensor

from mmdlm.decoding.preset import Choice
from mmdlm.messages import (
    Example,
    Message,
    Slot,
    assistant,
    conversation,
    is_conversation,
    numbered,
)
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.tasks.generate import (
    Settings,
    check_batch_size,
    fill,
    resolve_settings,
    to_answers,
    unwrap,
)

LENGTH = 128  # default canvas length in tokens


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
    features: dict[Hashable, Tensor] | None = None,
) -> Any:
    """Generate the reply to a prompt or conversation, or to each of a list.

    White space at both ends of the text is kept, so that prompt and text form one text. If the last
    message of a conversation is the assistant's, it is the beginning of the answer, and the text is
    what follows it.

    Args:
        model: model.
        prompt: text, or a conversation with text, images and clips (see
            `mmdlm.messages.conversation`), or a list of either. "" with chat=False: the model
            writes a text without a prompt.
        length: canvas length in tokens; None: the checkpoint's default, else 128.
        strategies: preset name or list, see `mmdlm.decode`; None: the checkpoint's default.
        batch_size: prompts per batch; in float32 it does not change the answers, see `fill`.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: random seed, the same for every prompt; None: torch's default generator.
        chat: True: a text is a user message; False: it is continued without the chat template;
            None: decided by the checkpoint's files, see `mmdlm.processor.Processor.prompt`.
        features: a dict, empty at first, that keeps what encoders make of images and clips from
            one turn of a conversation to the next; the weights must not change meanwhile.
    Returns:
        str, or list[str] for a list; `Answer` instead of str if details=True.
    Raises:
        ValueError: a prompt contains the mask token or half of a surrogate pair, or is not a valid
            conversation, or the checkpoint has no tokenizer or chat template.
    """
    require_model(model, "generate")
    is_many = isinstance(prompt, list) and not is_conversation(prompt)
    settings = resolve(model, length, strategies)
    prompts = prompt if is_many else [prompt]
    slot = assistant(Slot(length=settings.length))
    examples = [Example((*messages, slot)) for messages in numbered(_messages, prompts)]
    if chat is None and not all(isinstance(one, str) for one in prompts):
        chat = True  # conversations need the template; texts in the same list use it too
    run = {"batch_size": batch_size, "seed": seed, "chat": chat, "features": features}
    filled = fill(model, examples, settings.strategies, **run)
    return unwrap(to_answers(model, filled, verbatim=True), is_many, details)


def resolve(model: MultimodalDLM, length: int | None, strategies: Choice) -> Settings:
    """Settings of `generate`, see there and `resolve_settings`."""
    default = (model.preset.get("generate") or {}).get("length")
    length = default or LENGTH if length is None else length
    return resolve_settings(model, "generate", None, length, strategies, needs_prompt=False)


def _messages(prompt: Any) -> tuple[Message, ...]:
    """Messages of a prompt."""
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ValueError(f"the prompt is {prompt!r}, expected text or a conversation")
    return conversation(prompt)


def each(
    model: MultimodalDLM, prompts: Items[Any], *, batch_size: int = 16, **options: Any
) -> Iterator[Any]:
    """Yields the answer to each prompt, in order, or the error of one that cannot be answered.

    If a batch fails, its prompts are run one by one.

    Args:
        model: model.
        prompts: see `generate`.
        batch_size: see `generate`.
        **options: keyword arguments of `generate`.
    Raises:
        ValueError: the options are not valid; raised before the first answer.
    """
    resolve(model, options.get("length"), options.get("strategies"))
    check_batch_size(batch_size)
    for start in range(0, len(prompts), batch_size):
        yield from _answers(model, prompts[start : start + batch_size], options)


def _answers(model: MultimodalDLM, prompts: Items[Any], options: dict[str, Any]) -> list[Any]:
    """Answers of a batch, or errors."""
    try:
        return generate(model, list(prompts), batch_size=len(prompts), **options)
    except ImportError:
        raise  # a missing library fails for every prompt
    except Exception as error:  # noqa: BLE001 - one failure must not cost the other answers
        if len(prompts) == 1:
            return [error]
    return [found for one in prompts for found in _answers(model, [one], options)]
