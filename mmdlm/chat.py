"""Encode conversations with the chat template of a checkpoint or of its family.

Control tokens only come from the template. In messages they are encoded as plain text, so that a
message cannot end its turn and start one of another role (prompt injection).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
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
    "{% elif not loop.first %}{{ '<role>SYSTEM</role>' + m.content + '<|role_end|>' }}{% endif %}"
    "{% endfor %}{{ '<role>ASSISTANT</role>' }}",
}
"""Chat templates by name, see `Spec.template`; each ends with the header of the answer."""
# ZHZisZZ/dllm: dllm/utils/models.py; other families use the defaults of their templates.
VARIABLES = {"a2d": {"enable_thinking": False}}
MARKERS = re.compile(r"<\|\w+\|>|</?role>")
NOTHING = r"(?!)"  # matches nothing
QUESTION, ANSWER = "7b1d02", "0f3c9a"  # occur in no template


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
        """Dict of plain types, without unset fields."""
        fields = {
            "chat": self.chat,
            "media": dict(self.media),
            "system": self.system,
            "first": list(self.first),
        }
        return {name: value for name, value in fields.items() if value}


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
    said = {"user": QUESTION, "assistant": ANSWER}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    names = tokenizer.names | VARIABLES.get(family, {}) | {"add_generation_prompt": False}
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
    messages: Items[Mapping[str, str]],
    jinja: str,
    added: Mapping[str, tokenizers.AddedToken],
    marks: tuple[str, str, str] | None = None,
    media: Items[str] = (),
    **variables: Any,
) -> list[tuple[str, bool]]:
    """Render a conversation as pieces (text, is_control_token), up to the start of the answer.

    Control tokens are special tokens, and added tokens that occur in the template. In messages,
    they are put between two marker characters, so that they are recognised after rendering.
    Assistant messages keep added tokens that are not special, such as <think>.

    Args:
        messages: `{"role": ..., "content": text}` each.
        jinja: chat template.
        added: added tokens of the tokenizer.
        marks: three characters that no message contains; None to choose them.
        media: text around each medium, see `Template.media`; in `messages`, medium i is the number
            i between two of the third mark.
        **variables: other variables of the template, "bos_token" etc.
    Raises:
        ValueError: the template is not valid Jinja, or rejects these messages.
    """
    control = {t: flags for t, flags in added.items() if flags.special or t in jinja}
    control |= {t: f for t, f in added.items() if any(t in around for around in media)}
    control = {t: control[t] for t in sorted(control, key=len, reverse=True) if not t.isspace()}
    tokens = _alternatives(control)
    special = _alternatives(t for t, flags in control.items() if flags.special)
    start, end, mark = marks or _marks("".join(m["content"] for m in messages), 3)
    wrapped = []
    for message in messages:
        pattern = special if message["role"] == "assistant" else tokens
        content = re.sub(pattern, rf"{start}\g<0>{end}", message["content"])
        wrapped.append({"role": message["role"], "content": content})
    from mmdlm.jinja import rendered  # here, because importing Jinja is slow

    text = rendered(jinja, wrapped, **variables)
    for i, around in enumerate(media):
        medium = f"{mark}{i}{mark}"
        if text.count(medium) != 1:
            raise ValueError(
                f"the chat template renders medium {i} {text.count(medium)} times, expected once"
            )
        text = text.replace(medium, around.replace("{}", medium))
    return _split(text, control, f"{start}(?P<kept>{tokens}){end}", f"[{start}{end}]")


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
