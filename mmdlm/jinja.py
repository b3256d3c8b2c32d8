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


def rendered(template: str, messages: Items[Mapping[str, str]], **variables: Any) -> str:
    """Render a conversation as text, up to the start of the assistant's answer.

    Args:
        template: Jinja text.
        messages: {"role": ..., "content": text} each.
        **variables: other variables of the template, "bos_token" etc.
    Raises:
        ValueError: the template is not valid Jinja, or rejects these messages.
    """
    try:
        usual = {"tools": None, "documents": None, "add_generation_prompt": True}
        return compiled(template).render(messages=messages, **usual | variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template rejects this conversation: {error}") from error


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
