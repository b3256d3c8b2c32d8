"""`mmdlm data show`: the first rows of a data set as the model gets them."""

from __future__ import annotations

import string
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmdlm.messages import Media, Message, Slot

if TYPE_CHECKING:
    from rich.text import Text

    from mmdlm.data.dataset import Dataset
    from mmdlm.processor import Processor

Style = Literal["prompt", "target", "special", "end", "media"]
TERMINAL = {
    "prompt": "dim",
    "target": "bold green",
    "special": "magenta",
    "end": "dim green",
    "media": "cyan",
}
PAPER, INK = (255, 255, 255), (30, 30, 30)
PAGE: dict[str, tuple[int, int, int]] = {
    "prompt": (236, 236, 236),
    "target": (160, 222, 170),
    "special": (232, 200, 240),
    "end": (220, 240, 224),
    "media": (190, 228, 240),
}
CURVES = (
    (200, 60, 60),
    (50, 110, 220),
    (60, 160, 80),
    (210, 140, 30),
    (140, 80, 190),
    (60, 60, 60),
)
WIDE, SIDE, CELL, EDGE, FONT = 1000, 160, 26, 14, 14  # pixels: page, medium, token, margin, text
WRITTEN = str.maketrans({"⏎": "\\n", "⇥": "\\t", "×": "x"})
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Shown:
    """One conversation as the model gets it.

    Args:
        title: where it comes from.
        pieces: text and style of each token or medium.
        media: kind and image of each medium; None for what has no image.
        actions: [K A] action chunk of a robot, which is the answer; None for text.
    """

    title: str
    pieces: list[tuple[str, Style]]
    media: list[tuple[str, Image.Image | None]] = field(default_factory=list)
    actions: np.ndarray | None = None


def show(
    file: Path,
    model: str = "tiny",
    rows: int = 3,
    length: int | None = None,
    option: list[str] | None = None,
    out: Path | None = None,
) -> int:
    """Shows the first rows of a data set as the model gets them.

    mmdlm data show my.jsonl --model tiny --out sheet.png

    Tokens are separated by a bar: the prompt with its chat template is dim, the tokens to learn
    are green, special tokens are named. For robots it shows the images and the action chunk.

    Args:
        file: your file or folder; see mmdlm data formats.
        model: the model that is to be trained: bundled name, folder, or hub id (owner/name).
        rows: number of rows.
        length: canvas of the answers in tokens; by default that of the longest answer.
        option: NAME=VALUE, an argument of the format, such as answer=label; may be repeated.
        out: a .png file to draw as well, with the images as the model gets them.
    """
    from rich.console import Console

    from mmdlm.checkpoint import load
    from mmdlm.commands.own_data import opened, options

    if out is not None and out.suffix.lower() != ".png":
        raise ValueError(f"--out is {out}, expected a name ending in .png")
    if rows < 1:
        raise ValueError(f"--rows is {rows}, expected at least 1")
    loaded = load(model, device="meta")
    data = opened(file, loaded, options(option or ()), length)
    found = [
        one for i in range(min(rows, len(data))) for one in conversations(data, i, loaded.processor)
    ]
    console = Console(highlight=False)
    for one in found:
        console.print(one.title, style="bold", markup=False)
        console.print(line(one), end="\n\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(found).save(out)
        console.print(f"{out}: drawn", markup=False)
    return 0


def conversations(data: Dataset, index: int, processor: Processor) -> Iterator[Shown]:
    """Each conversation of a row.

    Args:
        data: connected.
        index: of the row.
        processor: of the model.
    """
    example = data.sample(index, np.random.default_rng(index))
    for number, messages in enumerate(example.conversations):
        several = f", answer {number + 1}" if len(example.conversations) > 1 else ""
        title = f"{data.place(index)}{several}"
        (slot,) = messages[-1].parts
        if isinstance(slot, Slot) and slot.output != "text":
            pieces, media = _prompt(messages[:-1], processor)
            yield Shown(title, pieces, media, np.asarray(slot.value))
            continue
        pieces, media = _prompt(messages[:-1], processor)
        canvas = processor.canvas(messages).tolist()
        yield Shown(title, [*pieces, *_target(canvas, processor)], media)


def _prompt(
    messages: Items[Message], processor: Processor
) -> tuple[list[tuple[str, Style]], list[tuple[str, Image.Image | None]]]:
    """Pieces of a prompt, and its media."""
    pieces: list[tuple[str, Style]] = []
    media = []
    for part in processor.prompt(tuple(messages)) if messages else ():
        if isinstance(part, Media):
            name, image = _medium(part, processor)
            media.append((name, image))
            pieces.append((name, "media"))
        else:
            pieces += [(text, style) for text, style in _tokens(part.tolist(), processor)]
    return pieces, media


def _tokens(ids: Items[int], processor: Processor) -> Iterator[tuple[str, Style]]:
    """Text and style of each token of a prompt."""
    backend, spec = processor.tokenizer.backend, processor.spec
    named = {spec.mask_id, spec.eos_id, spec.pad_id, *spec.stop_ids}
    special = {text for text, flags in processor.tokenizer.added.items() if flags.special}
    for number in ids:
        name = backend.id_to_token(number) or "?"
        if number in named or name in special:
            yield name, "special"
            continue
        text = name
        if processor.tokenizer.words is None:
            text = backend.decode([number], skip_special_tokens=False)
            text = name if not text or "\ufffd" in text else text
        yield text.replace("\n", "⏎").replace("\t", "⇥"), "prompt"


def _target(canvas: Items[int], processor: Processor) -> Iterator[tuple[str, Style]]:
    """Text and style of each token to learn; end tokens at the end are counted."""
    eos = processor.spec.eos_id
    for number, run in groupby(canvas):
        count = len(list(run))
        for text, style in _tokens([number], processor):
            if number == eos:
                yield f"{text}{f' ×{count}' if count > 1 else ''}", "end"
            else:
                yield from [(text, "target" if style == "prompt" else style)] * count


def _medium(part: Media, processor: Processor) -> tuple[str, Image.Image | None]:
    """Name and image of a medium as the encoder gets it."""
    if part.kind == "state":  # as recorded: the statistics of the model may be of another robot
        return f"[state {_numbers(part.item)}]", None
    prepared = processor.prepare(part.kind, part.item)
    shape = "x".join(map(str, prepared.tensor.shape))
    source = f" {Path(part.item).name}" if isinstance(part.item, str | Path) else ""
    name = f"[{part.kind}{source} {shape}]"
    if part.kind == "image":
        return name, _pixels(prepared.tensor, processor.inputs["image"], part.item)
    return name, _spectrum(prepared.tensor)


def _pixels(tensor: Any, preprocess: Any, item: Any) -> Image.Image:
    """The views of an image without the normalisation; the image itself if it is in patches."""
    scale = preprocess if hasattr(preprocess, "mean") else getattr(preprocess, "view", None)
    if tensor.ndim not in (3, 4) or not hasattr(scale, "mean"):
        from mmdlm.media import read_image

        return read_image(item)
    views = tensor[None] if tensor.ndim == 3 else tensor  # [V 3 Y X]
    pixels = views.movedim(1, -1).numpy() * np.array(scale.std) + np.array(scale.mean)
    rows = np.concatenate(list(pixels), 1)
    return Image.fromarray((255 * rows.clip(0, 1) + 0.5).astype(np.uint8))


def _spectrum(tensor: Any) -> Image.Image | None:
    """Log-mel frames [mels T] as an image, low frequencies at the bottom."""
    if tensor.ndim != 2:
        return None
    values = tensor.numpy()[::-1]
    low, high = float(values.min()), float(values.max())
    return Image.fromarray(((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8))


def _numbers(values: Any) -> str:
    listed = [f"{value:.3g}" for value in np.asarray(values, np.float64).flatten()]
    return ", ".join(listed)


# -- terminal


def line(one: Shown) -> Text:
    """A conversation as one coloured text."""
    from rich.text import Text

    text = Text()
    for i, (piece, style) in enumerate(one.pieces):
        text.append("│" if i else "", style="dim")
        text.append(piece, style=TERMINAL[style])
    if one.actions is not None:
        for i, values in enumerate(one.actions.T):
            text.append(f"\naction {i}  ", style="dim")
            text.append(f"{spark(values)}  {_numbers(values)}", style=TERMINAL["target"])
    return text


def spark(values: np.ndarray) -> str:
    """A curve of block characters, from the lowest value to the highest."""
    low, spread = values.min(), max(float(np.ptp(values)), 1e-9)
    return "".join(BLOCKS[int((v - low) / spread * (len(BLOCKS) - 1) + 0.5)] for v in values)


# -- sheet


def sheet(found: Items[Shown]) -> Image.Image:
    """A page with the media, tokens and action curves of conversations."""
    panels = [_panel(one) for one in found]
    page = Image.new("RGB", (WIDE, sum(panel.height for panel in panels)), PAPER)
    top = 0
    for panel in panels:
        page.paste(panel, (0, top))
        top += panel.height
    return page


def _panel(one: Shown) -> Image.Image:
    """One conversation: title, media, then tokens as boxes."""
    font = ImageFont.load_default(FONT)
    panel = Image.new("RGB", (WIDE, 4000), PAPER)
    pen = ImageDraw.Draw(panel)
    pen.text((EDGE, EDGE), _drawable(one.title), fill=INK, font=font)
    left, top = EDGE, EDGE + 2 * FONT
    images = [image for _, image in one.media if image is not None]
    for image in images:
        scale = SIDE / image.height
        wide = max(1, min(WIDE - left - EDGE, round(image.width * scale)))
        if wide < SIDE // 4:
            break
        panel.paste(
            image.convert("RGB").resize((wide, SIDE), Image.Resampling.NEAREST), (left, top)
        )
        left += wide + EDGE
    if one.actions is not None:
        _curves(pen, font, (left, top, min(left + 3 * SIDE, WIDE - EDGE), top + SIDE), one.actions)
    if images or one.actions is not None:
        top += SIDE + EDGE
    left = EDGE
    for piece, style in one.pieces:
        name = _drawable(piece)
        wide = round(font.getlength(name)) + 10
        if left + wide > WIDE - EDGE:
            left, top = EDGE, top + CELL + 4
        pen.rounded_rectangle((left, top, left + wide, top + CELL), 4, fill=PAGE[style])
        pen.text((left + 5, top + CELL / 2), name, fill=INK, font=font, anchor="lm")
        left += wide + 3
    return panel.crop((0, 0, WIDE, min(4000, top + CELL + 2 * EDGE)))


def _drawable(text: str) -> str:
    """A text without characters that Pillow's own font lacks."""
    known = {*string.printable, *map(chr, range(0xC0, 0x180))}
    short = text if len(text) <= 100 else f"{text[:97]}..."
    return "".join(c if c in known else "?" for c in short.translate(WRITTEN))


def _curves(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    box: tuple[int, int, int, int],
    actions: np.ndarray,
) -> None:
    """Each dimension of an action chunk [K A] over its steps."""
    left, top, right, bottom = box
    low, high = float(actions.min()), float(actions.max())
    spread = max(high - low, 1e-9)
    pen.rectangle(box, outline=PAGE["prompt"])
    for i, values in enumerate(actions.T):
        x = np.linspace(left + 4, right - 4, max(2, len(values)))
        y = bottom - 4 - (np.resize(values, len(x)) - low) / spread * (bottom - top - 8)
        colour = CURVES[i % len(CURVES)]
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=colour, width=2)
    pen.text((left + 6, top + 2), f"{high:.3g}", fill=INK, font=font)
    pen.text((left + 6, bottom - FONT - 6), f"{low:.3g}", fill=INK, font=font)
