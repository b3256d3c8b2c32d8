"""Render chat templates in a Jinja sandbox; a separate module because importing Jinja is slow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser


def rendered(
    template: str, messages: Items[Mapping[str, Any]], begins: bool = True, **variables: Any
) -> str:
    """Render a conversation as text, up to the start of the assistant's answer.

    Args:
        template: Jinja text.
        messages: {"role": ..., "content": text or parts} each, and other keys.
        begins: the text ends with the header of a new answer (`add_generation_prompt`).
        **variables: other variables of the template, "bos_token" etc.
    Raises:
        ValueError: the template is not valid Jinja, or rejects these messages.
    """
    try:
        usual = {"tools": None, "documents": None, "add_generation_prompt": begins}
        return compiled(template).render(messages=messages, **usual | variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template rejects this conversation: {error}") from error


def rendered_prompt(
    template: str, messages: list[dict[str, Any]], stop: str, **variables: Any
) -> str:
    """Text up to the answer, or to the end of its beginning if the assistant's message is the last.

    Args:
        template: Jinja text.
        messages: see `rendered`.
        stop: character that no message contains.
        **variables: see `rendered`.
    Raises:
        ValueError: the template leaves out a message of another role than system, user and
            assistant, tool calls, or part of the beginning of the answer.
    """
    begins = messages[-1]["role"] != "assistant"
    if begins:
        text = rendered(template, messages, **variables)
    else:
        text = _continued(template, messages, stop, variables)
    for i, message in enumerate(messages):
        if message["role"] in ("developer", "tool"):
            name, rest = f"role {message['role']!r}", [*messages[:i], *messages[i + 1 :]]
        elif "tool_calls" in message:
            less = {key: value for key, value in message.items() if key != "tool_calls"}
            name, rest = "tool_calls", [*messages[:i], less, *messages[i + 1 :]]
        else:
            continue
        try:
            is_same = rendered(template, rest, begins, **variables).startswith(text)
        except ValueError:  # the template needs the message
            continue
        if is_same:
            raise ValueError(
                f"the chat template of this checkpoint leaves out message {i} with {name}; write "
                "it as a message of the system or the user"
            )
    return text


def _continued(template: str, messages: list[dict[str, Any]], stop: str, variables: Any) -> str:
    """Text up to the end of the last message, by the rules of transformers.

    Source: huggingface/transformers: utils/chat_template_utils.py (continue_final_message).
    """
    last, tag = messages[-1], f"{stop} "
    content = last.get("content")
    if isinstance(content, list):
        begun = content[-1]["text"]
        tagged = [*content[:-1], {**content[-1], "text": begun + tag}]
    else:
        begun, tagged = content, f"{content}{tag}"
    text = rendered(template, [*messages[:-1], {**last, "content": tagged}], False, **variables)
    if begun is None or stop not in text or begun.strip() not in text:
        raise ValueError(
            "the chat template does not render the assistant's last message as it is, so it cannot "
            "be continued; end the conversation with a message of the user"
        )
    at = text.rindex(stop)
    # A template that trims the message has removed the space of the tag.
    return text[:at] if text.startswith(tag, at) else text[:at].rstrip()


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """Compile a template as in transformers; it is untrusted code and runs in a sandbox.

    Raises:
        ValueError: the template is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": lambda *pairs, **more: dict(*pairs, **more),
    }
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


class Generation(Extension):
    """Replaces {% generation %}, which marks answers for training, by its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Statements up to {% endgeneration %}."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with _, which give access to Python internals."""

    def __init__(self, *pairs: Iterable[Any], **more: Any) -> None:
        super().__init__()
        for name, value in dict(*pairs, **more).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"namespace name {name!r} begins with _, which is not allowed"
            )
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON text, without the HTML escapes of Jinja's filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
