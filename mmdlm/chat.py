"""Conversations as prompts: the chat template of a checkpoint, or of its family.

Only the template writes control tokens. Those that stand in a message are encoded like any other
text, so whoever writes a message cannot end it and speak as somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.messages import Media, Message
from mmdlm.text import CHAT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

PLAIN = "plain"

_HEADERS = (
    "{{{{ '<|startoftext|>' }}}}{{% for m in messages %}}"
    "{{{{ '<|start_header_id|>' + m.role + '<|end_header_id|>{gap}' + m.content | trim }}}}"
    "{{{{ '<|eot_id|>' }}}}{{% endfor %}}"
    "{{{{ '<|start_header_id|>assistant<|end_header_id|>{gap}' }}}}"
)
_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)
TEMPLATES = {
    # Hub GSAI-ML/LLaDA-8B-Instruct: tokenizer_config.json; ZHZisZZ/dllm: dllm/utils/models.py.
    "llada": _HEADERS.format(gap="\\n\\n"),
    # Gen-Verse/MMaDA: one newline where LLaDA has two.
    "mmada": _HEADERS.format(gap="\\n"),
    # SDAR and other descendants of Qwen3.
    "chatml": _CHATML,
    # Dream and Fast-dLLM v2, like Qwen2.5, never go without a system message.
    "chatml_system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML,
    # Hub inclusionAI/LLaDA2.1-flash: tokenizer_config.json, with thinking off as there;
    # inclusionAI/dInfer: benchmarks/benchmark.py asks LLaDA-MoE in the same words.
    "llada_moe": "{{ '<role>SYSTEM</role>' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}"
    "{{ 'detailed thinking off<|role_end|>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<role>HUMAN</role>' + m.content + '<|role_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<role>ASSISTANT</role>' + (m.content"
    ".split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content)"
    " + '<|role_end|>' }}"
    "{% elif not loop.first %}{{ '<role>SYSTEM</role>' + m.content + '<|role_end|>' }}{% endif %}"
    "{% endfor %}{{ '<role>ASSISTANT</role>' }}",
}
"""Chat templates by their name in `Spec.template`, each with the head of the answer at its end."""
# ZHZisZZ/dllm: dllm/utils/models.py; others do not say, and their templates decide.
VARIABLES = {"a2d": {"enable_thinking": False}}
MARKERS = re.compile(r"<\|\w+\|>|</?role>")
NOTHING = r"(?!)"  # a pattern that is found nowhere


@dataclass(frozen=True)
class Template:
    """How a published system writes its prompts.

    Args:
        chat: name of a chat template, a key of `TEMPLATES` or "plain", or Jinja text, which comes
            before the template of the checkpoint's tokenizer files. None for `Spec.template`.
        media: by modality, the text around the embeddings of a medium, which go where "{}" stands.
            Control tokens in it count as written by the template.
        system: system message of conversations that have none.
        first: modalities whose embeddings stand before the whole prompt, wherever they are given.
    """

    chat: str | None = None
    media: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", tuple(self.first))
        for kind, text in self.media.items():
            if text.count("{}") != 1:
                raise ValueError(
                    f"Template.media[{kind!r}] is {text!r}, expected one {{}} for the embeddings"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without what is not set."""
        found = {
            "chat": self.chat,
            "media": dict(self.media),
            "system": self.system,
            "first": list(self.first),
        }
        return {name: value for name, value in found.items() if value}


def find(tokenizer: Tokenizer | None, name: str) -> str | None:
    """The chat template (Jinja) in force; None for text as it is.

    It is the checkpoint's own, else the family's where the vocabulary has its markers: a base
    checkpoint often shares everything with the instructed one but those.

    Args:
        tokenizer: the checkpoint's.
        name: the family's, a key of `TEMPLATES`, or "plain".
    Raises:
        ValueError: no template has that name.
    """
    if name not in (*TEMPLATES, PLAIN):
        raise ValueError(
            f"chat template {name!r} is unknown; expected {', '.join(TEMPLATES)} or {PLAIN}, or a "
            "checkpoint whose tokenizer_config.json carries its own"
        )
    if tokenizer is None or tokenizer.template is not None:
        return None if tokenizer is None else tokenizer.template
    if name == PLAIN:
        return None
    template = TEMPLATES[name]
    return template if all(tokenizer.id(m) is not None for m in MARKERS.findall(template)) else None


def encode(
    tokenizer: Tokenizer,
    messages: Items[Message],
    jinja: str | None,
    media: Mapping[str, str],
    family: str = "",
) -> list[Tensor | Media]:
    """A conversation as token ids int64 [n] and media, up to where the answer begins.

    Args:
        tokenizer: of the model.
        messages: of text and media.
        jinja: see `find`.
        media: see `Template.media`.
        family: name of the model's family.
    Raises:
        ValueError: there is no template, or see `render`.
    """
    if jinja is None:
        raise ValueError(
            "this checkpoint has no chat template: its folder names none, and its tokenizer lacks "
            "the markers of its family's; give one text as it is (chat=False, mmdlm generate), or "
            f"put {CHAT} into the folder"
        )
    start, end, mark = _marks("".join(message.text for message in messages), 3)
    found: list[Media] = []
    wrapped = [{"role": m.role, "content": _content(m, mark, found)} for m in messages]
    names = tokenizer.names | VARIABLES.get(family, {})
    around = [media.get(medium.kind, "{}") for medium in found]
    pieces = render(wrapped, jinja, tokenizer.added, (start, end, mark), around, **names)
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


def _content(message: Message, mark: str, found: list[Media]) -> str:
    """The text of a message, its media as numbers between marks; they are added to `found`."""
    content = ""
    for part in message.parts:
        if isinstance(part, Media):
            content += f"{mark}{len(found)}{mark}"
            found.append(part)
        elif isinstance(part.text, str):
            content += part.text
        else:
            raise TypeError(
                "token ids cannot stand in a chat template; use role 'raw' for a prompt of ids"
            )
    return content


def render(
    messages: Items[Mapping[str, str]],
    jinja: str,
    added: Mapping[str, tokenizers.AddedToken],
    marks: tuple[str, str, str] | None = None,
    media: Items[str] = (),
    **variables: Any,
) -> list[tuple[str, bool]]:
    """A conversation in pieces, (text, whether it is a control token), with an answer to follow.

    Control tokens are the special ones, and all added ones the template mentions. The template
    gets those in messages between two characters that no text contains, which show afterwards
    that the template did not write them. What the assistant said keeps those that are not special:
    its own <think> is a token, and templates look for it.

    Args:
        messages: `{"role": ..., "content": text}` each.
        jinja: the chat template.
        added: tokens that are recognised before a text is split into words.
        marks: three characters that stand in no message; None to choose them.
        media: the text around each medium, see `Template.media`; in `messages`, medium i is the
            number i between two of the third mark.
        **variables: what the template gets besides the messages, "bos_token" etc.
    Raises:
        ValueError: the template is not valid Jinja, or rejects these messages.
    """
    control = {t: flags for t, flags in added.items() if flags.special or t in jinja}
    control |= {t: f for t, f in added.items() if any(t in around for around in media)}
    control = {t: control[t] for t in sorted(control, key=len, reverse=True) if not t.isspace()}
    tokens = _any(control)
    special = _any(t for t, flags in control.items() if flags.special)
    start, end, mark = marks or _marks("".join(m["content"] for m in messages), 3)
    wrapped = []
    for message in messages:
        sought = special if message["role"] == "assistant" else tokens
        content = re.sub(sought, rf"{start}\g<0>{end}", message["content"])
        wrapped.append({"role": message["role"], "content": content})
    from mmdlm.jinja import rendered  # here, because importing Jinja takes a while

    text = rendered(jinja, wrapped, **variables)
    for i, around in enumerate(media):
        medium = f"{mark}{i}{mark}"
        if text.count(medium) != 1:
            raise ValueError(f"the chat template uses medium {i} {text.count(medium)} times")
        text = text.replace(medium, around.replace("{}", medium))
    return _cut(text, control, f"{start}(?P<kept>{tokens}){end}", f"[{start}{end}]")


def _cut(
    text: str, control: Mapping[str, tokenizers.AddedToken], wrapped: str, lone: str
) -> list[tuple[str, bool]]:
    """The pieces of a rendered conversation.

    Args:
        text: what the template gave.
        control: control tokens, longer ones first.
        wrapped: pattern of a token out of a message, named "kept", between its marks.
        lone: pattern of one mark.
    """
    written = [
        r"\s*" * flags.lstrip + re.escape(token) + r"\s*" * flags.rstrip
        for token, flags in control.items()
    ]
    pieces: list[tuple[str, bool]] = []
    plain, at = "", 0
    for found in re.finditer(f"{wrapped}|(?P<lone>{lone})|{'|'.join(written) or NOTHING}", text):
        plain += text[at : found.start()]
        at = found.end()
        if kept := found["kept"]:
            if control[kept].special:
                plain += kept
            else:  # is recognised wherever it stands in one piece
                pieces.append((plain + kept[:1], False))
                plain = kept[1:]
        elif found["lone"]:  # the template took a token apart, and no other may come of its parts
            pieces.append((plain, False))
            plain = ""
        else:
            token = found[0] if found[0] in control else found[0].strip()
            pieces += [(plain, False), (token, True)]
            plain = ""
    return [piece for piece in (*pieces, (plain + text[at:], False)) if piece[0]]


def _any(tokens: Iterable[str]) -> str:
    """A pattern that finds one of the tokens, earlier ones first."""
    return "|".join(map(re.escape, tokens)) or NOTHING


def _marks(text: str, count: int) -> list[str]:
    """Some of Unicode's noncharacters that the text does not contain."""
    free = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text]
    if len(free) < count:
        raise ValueError("the conversation contains every noncharacter from U+FDD0 on")
    return free[:count]
