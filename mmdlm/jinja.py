"""Render chat templates of checkpoints; a separate module because importing Jinja is slow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from mmdlm.files import weigh
from mmdlm.sandbox import ABSENT, CHARACTERS, LONGEST, METER, Environment, Meter, bounded

if TYPE_CHECKING:
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
        ValueError: the template is not valid Jinja, rejects these messages, fails, or takes too
            many steps or too much time or memory.
    """
    ready = compiled(template)
    usual = {"tools": None, "documents": None, "add_generation_prompt": begins}
    given = weigh(messages, 2**40, 1)
    with _metered("rejects this conversation", Meter(max(CHARACTERS, 8 * given))):
        return ready.render(messages=messages, **usual | variables)


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
        ValueError: the template is not valid Jinja, or too long.
    """
    if len(template) > LONGEST:
        raise ValueError(
            f"the chat template has {len(template):,} characters, expected at most {LONGEST:,}"
        )
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.filters = {
        name: bounded(name, each)
        for name, each in environment.filters.items()
        if name not in ABSENT
    }
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _now,
        "namespace": Namespace,
        "dict": lambda *pairs, **more: dict(*pairs, **more),
    }
    with _metered("is not valid Jinja", Meter()):  # constant expressions are computed here
        parsed = environment.parse(template)
        for loop in parsed.find_all(nodes.For):
            tick = nodes.EnvironmentAttribute("tick", lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
        return environment.from_string(parsed)


@contextmanager
def _metered(problem: str, meter: Meter) -> Iterator[None]:
    """Counts on a meter, and turns whatever goes wrong into a ValueError."""
    token = METER.set(meter)
    try:
        yield
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template {problem}: {error}") from error
    except Exception as error:  # an expression such as 1/0 or '%d' % 'a' raises anything
        what = f"{type(error).__name__}: {_short(error)}"
        raise ValueError(f"the chat template fails at line {_line(error)} ({what})") from error
    finally:
        METER.reset(token)


def _line(error: Exception) -> int | str:
    """Line of the template that raised an error."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1] if lines else "unknown"


def _short(value: Any) -> str:
    return str(value)[:500]


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

    __repr__ = (
        object.__repr__
    )  # what it holds may be shared, so that its text is exponentially long


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    """The date in a format, whose fields have no widths."""
    if len(form) > 100 or re.search(r"%\d", form):
        raise jinja2.TemplateError(f"date format {form[:100]!r} is not supported")
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON text, without the HTML escapes of Jinja's filter."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    if len(str(indent)) > 100 or (isinstance(indent, int) and indent > 100):
        raise jinja2.TemplateError("tojson is indented by more than 100")
    return Environment.concat(encoder.iterencode(value))
