"""Encode conversations with the chat template of a checkpoint or of its family.

Control tokens only come from the template. In messages they are encoded as plain text, so that a
message cannot end its turn and start one of another role (prompt injection).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.files import blaming
from mmdlm.messages import Media, Message, Text
from mmdlm.text import CHAT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

PLAIN = "plain"

_HEADERS = (
    "{{{{ '<|startoftext|>' }}}}{{% for m in messages %}}"
    "{{{{ '<|start_header_id|>' + m.role + '<|end_header_id|>{gap}' + m.content | trim }}}}"
    "{{{{ '<|eot_id|>' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}"
    "{{{{ '<|start_header_id|>assistant<|end_header_id|>{gap}' }}}}{{% endif %}}"
)
_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    # Hub GSAI-ML/LLaDA-8B-Instruct: tokenizer_config.json; ZHZisZZ/dllm: dllm/utils/models.py.
    "llada": _HEADERS.format(gap="\\n\\n"),
    # Gen-Verse/MMaDA: one newline where LLaDA has two.
    "mmada": _HEADERS.format(gap="\\n"),
    # SDAR and other descendants of Qwen3.
    "chatml": _CHATML,
    # Dream and Fast-dLLM v2, like Qwen2.5, have a default system message.
    "chatml_system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML,
    # Hub inclusionAI/LLaDA2.1-flash: tokenizer_config.json, with thinking off as there;
    # inclusionAI/dInfer: benchmarks/benchmark.py uses the same template for LLaDA-MoE.
    "llada_moe": "{{ '<role>SYSTEM</role>' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}"
    "{{ 'detailed thinking off<|role_end|>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content + '<|role_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + (m.content"
    ".split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content)"
    " + '<|role_end|>' }}"
    "{% elif m.role == 'system' and not loop.first %}"
    "{{ '<role>SYSTEM</role>' + m.content + '<|role_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}",
}
"""Chat templates by name, see `Spec.template`."""
# ZHZisZZ/dllm: dllm/utils/models.py; other families use the defaults of their templates.
VARIABLES = {"a2d": {"enable_thinking": False}}
MARKERS = re.compile(r"<\|\w+\|>|</?role>")
NOTHING = r"(?!)"  # matches nothing
QUESTION, ANSWER = "7b1d02", "0f3c9a"  # occur in no template
# Names that templates have for the reasoning of an answer, huggingface/transformers:
# utils/chat_template_utils.py.
REASONING = ("reasoning_content", "thinking", "reasoning")
MARKS = 4
"""Marker characters of `render`: start and end of a token, medium, end of the begun answer."""


@dataclass(frozen=True)
class Template:
    """Prompt template of a published system.

    Args:
        chat: name of a chat template (a key of `TEMPLATES` or "plain"), which is used if the
            tokenizer files have none; or Jinja text, which takes precedence. None for
            `Spec.template`.
        media: text around the embeddings of each modality, with "{}" in place of the embeddings.
            Control tokens in it are encoded as such.
        system: default system message.
        first: modalities whose embeddings are moved to the start of the prompt.
        last: modalities that are moved to the end of their message, after its text.
    """

    chat: str | None = None
    media: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind, text in self.media.items():
            if text.count("{}") != 1:
                raise ValueError(
                    f"Template.media[{kind!r}] is {text!r}, expected one {{}} for the embeddings"
                )

    def to_dict(self) -> dict[str, Any]:
        """Dict of plain types, without unset fields."""
        fields = {
            "chat": self.chat,
            "media": dict(self.media),
            "system": self.system,
            "first": list(self.first),
            "last": list(self.last),
        }
        return {name: value for name, value in fields.items() if value}

    def ordered(self, messages: Items[Message]) -> tuple[Message, ...]:
        """The messages with the modalities of `last` after the other parts of each."""
        if not self.last:
            return tuple(messages)

        def is_last(part: Any) -> bool:
            return isinstance(part, Media) and part.kind in self.last

        return tuple(Message(m.role, sorted(m.parts, key=is_last), m.extra) for m in messages)


def find(tokenizer: Tokenizer | None, name: str) -> str | None:
    """Chat template (Jinja) of a checkpoint; None if text is encoded without one.

    The template of the tokenizer files takes precedence. The family's template is used if the
    vocabulary has its markers, which base checkpoints often lack.

    Args:
        tokenizer: tokenizer of the checkpoint.
        name: name of the family's template, a key of `TEMPLATES`, or "plain"; or Jinja text,
            which takes precedence.
    Raises:
        ValueError: the name is unknown.
    """
    if "{" in name:
        return name
    if name not in (*TEMPLATES, PLAIN):
        raise ValueError(
            f"chat template {name!r} is unknown; expected {', '.join(TEMPLATES)} or {PLAIN}, or a "
            "checkpoint whose tokenizer_config.json has a chat template"
        )
    if tokenizer is None or tokenizer.template is not None:
        return None if tokenizer is None else tokenizer.template
    if name == PLAIN:
        return None
    template = TEMPLATES[name]
    return template if all(tokenizer.id(m) is not None for m in MARKERS.findall(template)) else None


def turn_end(tokenizer: Tokenizer, jinja: str | None, family: str = "") -> int | None:
    """Id of the control token that a template writes right after an answer; None for none.

    Args:
        tokenizer: tokenizer of the checkpoint.
        jinja: see `find`.
        family: name of the model's family.
    """
    if jinja is None:
        return None
    said = (("user", QUESTION), ("assistant", ANSWER), ("user", QUESTION))
    messages = [{"role": role, "content": text} for role, text in said]
    names = tokenizer.names | VARIABLES.get(family, {})
    try:
        pieces = render(messages, jinja, tokenizer.added, **names)
    except Exception:  # what is wrong with a template is reported where it is used
        return None
    before = takewhile(lambda piece: QUESTION not in piece[0], pieces)
    start = next((text for text, is_token in before if is_token), None)
    for (text, _), (token, is_token) in pairwise(pieces):
        _, is_there, after = text.rpartition(ANSWER)
        # A template without an end goes on with the start of the next turn.
        if is_there and not after.strip() and is_token and token != start:
            return tokenizer.id(token)
    return None


def encode(
    tokenizer: Tokenizer,
    messages: Items[Message],
    jinja: str | None,
    media: Mapping[str, str],
    family: str = "",
) -> list[Tensor | Media]:
    """Token ids int64 [n] and media of a conversation, up to the start of the answer.

    A last message of the assistant is the beginning of the answer (`continue_final_message` in
    transformers). Text parts of a message are joined, unless the template reads parts itself.

    Args:
        tokenizer: tokenizer of the model.
        messages: messages of text and media.
        jinja: see `find`.
        media: see `Template.media`.
        family: name of the model's family.
    Raises:
        ValueError: there is no template, or see `render`.
    """
    if jinja is None:
        raise ValueError(
            "this checkpoint has no chat template: there is none in its folder, and its tokenizer "
            "lacks the markers of its family's template; pass one text with chat=False, or add "
            f"{CHAT} to the folder"
        )
    marks = _marks("".join(text for message in messages for text in message.strings), MARKS)
    mark, found = marks[2], []
    names = tokenizer.names | VARIABLES.get(family, {})
    has_parts = any(len(message.parts) > 1 for message in messages)
    in_parts = has_parts and _reads_parts(jinja, names)
    given = [_fields(message, mark, found, in_parts) for message in messages]
    around = [media.get(medium.kind, "{}") for medium in found]
    own = tokenizer.source if jinja == tokenizer.template else None
    with blaming(own or "the model's chat template"):
        pieces = render(given, jinja, tokenizer.added, marks, around, **names)
    parts: list[Tensor | Media] = []
    ids: list[int] = []
    for text, is_token in pieces:
        if is_token:
            ids.append(tokenizer.id(text))
            continue
        for i, piece in enumerate(re.split(f"{mark}(\\d+){mark}", text)):
            if i % 2:
                parts += [torch.tensor(ids, dtype=torch.long), found[int(piece)]]
                ids = []
            elif piece:
                ids += tokenizer.encode(piece, special=False)
    parts.append(torch.tensor(ids, dtype=torch.long))
    return [part for part in parts if isinstance(part, Media) or len(part)]


def _fields(message: Message, mark: str, found: list[Media], in_parts: bool) -> dict[str, Any]:
    """A message as the template gets it; appends its media to `found`.

    Args:
        message: message of text and media.
        mark: see `_content`.
        found: media so far.
        in_parts: the template reads content that is a list of parts.
    """
    fields: dict[str, Any] = {"role": message.role}
    if message.parts:
        text = _content(message, mark, found)
        texts = [part.text for part in message.parts if isinstance(part, Text)]
        split = in_parts and len(texts) == len(message.parts) > 1
        fields["content"] = [{"type": "text", "text": one} for one in texts] if split else text
    fields |= message.extra
    reasoning = next((fields[key] for key in REASONING if key in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _reads_parts(jinja: str, names: Mapping[str, Any]) -> bool:
    """Whether a template renders a list of one text part as it renders the text."""
    from mmdlm.jinja import rendered

    def said(content: Any) -> str:
        return rendered(jinja, [{"role": "user", "content": content}], **names)

    try:
        return said([{"type": "text", "text": "text"}]) == said("text")
    except Exception:  # noqa: BLE001 - templates raise all kinds of errors for lists
        return False


def _content(message: Message, mark: str, found: list[Media]) -> str:
    """Text of a message, with media as numbers between marks; appends the media to `found`."""
    content = ""
    for part in message.parts:
        if isinstance(part, Media):
            content += f"{mark}{len(found)}{mark}"
            found.append(part)
        elif isinstance(part.text, str):
            content += part.text
        else:
            raise TypeError(
                "a message has token ids, expected text; use role 'raw' for a prompt of token ids"
            )
    return content


def render(
    messages: Items[Mapping[str, Any]],
    jinja: str,
    added: Mapping[str, tokenizers.AddedToken],
    marks: Items[str] | None = None,
    media: Items[str] = (),
    **variables: Any,
) -> list[tuple[str, bool]]:
    """Render a conversation as pieces (text, is_control_token), up to the start of the answer.

    Control tokens are special tokens, and added tokens that occur in the template. In messages,
    they are put between two marker characters, so that they are recognised after rendering.
    Assistant messages keep added tokens that are not special, such as <think>.

    Args:
        messages: `{"role": ..., "content": text or text parts}` each, and further keys.
        jinja: chat template.
        added: added tokens of the tokenizer.
        marks: `MARKS` characters that no message contains; None to choose them.
        media: text around each medium, see `Template.media`; in `messages`, medium i is the number
            i between two of the third mark.
        **variables: other variables of the template, "bos_token" etc.
    Raises:
        ValueError: the template is not valid Jinja, rejects these messages, or leaves one out.
    """
    control = {t: flags for t, flags in added.items() if flags.special or t in jinja}
    control |= {t: f for t, f in added.items() if any(t in around for around in media)}
    control = {t: control[t] for t in sorted(control, key=len, reverse=True) if not t.isspace()}
    tokens = _alternatives(control)
    special = _alternatives(t for t, flags in control.items() if flags.special)
    if marks is None:
        marks = _marks(json.dumps(messages, ensure_ascii=False), MARKS)
    start, end, mark, stop = marks
    wrapped = []
    for message in messages:
        pattern = special if message["role"] == "assistant" else tokens
        given = _wrapped({k: v for k, v in message.items() if k != "role"}, pattern, start, end)
        wrapped.append({"role": message["role"], **given})
    from mmdlm.jinja import rendered_prompt  # here, because importing Jinja is slow

    text = rendered_prompt(jinja, wrapped, stop, **variables)
    for i, around in enumerate(media):
        medium = f"{mark}{i}{mark}"
        if text.count(medium) != 1:
            raise ValueError(
                f"the chat template renders medium {i} {text.count(medium)} times, expected once"
            )
        text = text.replace(medium, around.replace("{}", medium))
    return _split(text, control, f"{start}(?P<kept>{tokens}){end}", f"[{start}{end}]")


def _wrapped(value: Any, pattern: str, start: str, end: str) -> Any:
    """The value with every match of the pattern in its strings between two marks."""
    if isinstance(value, str):
        return re.sub(pattern, rf"{start}\g<0>{end}", value)
    if isinstance(value, Mapping):
        return {
            _wrapped(key, pattern, start, end): _wrapped(one, pattern, start, end)
            for key, one in value.items()
        }
    return (
        [_wrapped(one, pattern, start, end) for one in value] if isinstance(value, list) else value
    )


def _split(
    text: str, control: Mapping[str, tokenizers.AddedToken], wrapped: str, lone: str
) -> list[tuple[str, bool]]:
    """Pieces of a rendered conversation, see `render`.

    Args:
        text: rendered template.
        control: control tokens, longer ones first.
        wrapped: pattern of a token of a message between its marks, as group "kept".
        lone: pattern of a single mark.
    """
    patterns = [
        r"\s*" * flags.lstrip + re.escape(token) + r"\s*" * flags.rstrip
        for token, flags in control.items()
    ]
    pieces: list[tuple[str, bool]] = []
    plain, at = "", 0
    for found in re.finditer(f"{wrapped}|(?P<lone>{lone})|{'|'.join(patterns) or NOTHING}", text):
        plain += text[at : found.start()]
        at = found.end()
        if kept := found["kept"]:
            if control[kept].special:
                plain += kept
            else:  # split it, because the tokenizer would encode it as one token
                pieces.append((plain + kept[:1], False))
                plain = kept[1:]
        elif found["lone"]:  # the template split a token; its parts must not form another one
            pieces.append((plain, False))
            plain = ""
        else:
            token = found[0] if found[0] in control else found[0].strip()
            pieces += [(plain, False), (token, True)]
            plain = ""
    return [piece for piece in (*pieces, (plain + text[at:], False)) if piece[0]]


def _alternatives(tokens: Iterable[str]) -> str:
    """Regular expression that matches one of the tokens, earlier ones first."""
    return "|".join(map(re.escape, tokens)) or NOTHING


def _marks(text: str, count: int) -> list[str]:
    """Unicode noncharacters that the text does not contain."""
    free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text]
    if len(free) < count:
        raise ValueError("the conversation contains every noncharacter from U+FDD0 on")
    return free[:count]
