"""Contact sheet: an image with a card per question, its media, targets and answers."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmdlm.benchmarks.evaluate import Failure
from mmdlm.benchmarks.metrics import same
from mmdlm.media import read_audio, read_image
from mmdlm.messages import Media

WIDE, VIEW, EDGE, SIZE = 320, 200, 12, 16  # pixels: card, height of its medium, margin, font
LINE = SIZE + 5
COLUMNS = 4
MOST_LINES = 6  # of one text
PAPER, CARD, INK, PALE = (238, 238, 238), (255, 255, 255), (30, 30, 30), (120, 120, 120)
RIGHT, WRONG = (20, 120, 50), (180, 40, 30)
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
"""Fonts with more alphabets than Pillow's own, where one is installed."""

Line = tuple[str, tuple[int, int, int]]


def draw_sheet(failures: Items[Failure], names: Items[str], out: Path) -> Path:
    """Draws a card per question and returns the path of the file.

    A card shows the first image, or the waveform of the first clip; then the question, the target
    and each model's answer with its first score, in green where it is a target, else in red.

    Args:
        failures: questions, see `mmdlm.benchmarks.evaluate.failures`.
        names: of the models.
        out: image file, such as .png.

    Raises:
        ValueError: the format of `out` is unknown.
    """
    check_name(out)
    font = _font()
    cards = [_card(one, names, font) for one in failures]
    rows = [cards[i : i + COLUMNS] for i in range(0, len(cards), COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    wide = EDGE + (WIDE + EDGE) * max(1, min(COLUMNS, len(cards)))
    sheet = Image.new("RGB", (wide, EDGE + sum(h + EDGE for h in heights) or WIDE), PAPER)
    top = EDGE
    for row, height in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            sheet.paste(card, (EDGE + i * (WIDE + EDGE), top))
        top += height + EDGE
    if not cards:
        ImageDraw.Draw(sheet).text((EDGE, EDGE), "Every answer is right.", fill=INK, font=font)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def check_name(out: Path) -> None:
    """Raises a ValueError if a file name is not that of an image."""
    if Path(out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"sheet is {out}, expected the name of an image file, such as sheet.png")


def _card(one: Failure, names: Items[str], font: ImageFont.FreeTypeFont) -> Image.Image:
    lines: list[Line] = [(one.asked.place.rpartition("/")[2], PALE)]
    lines += [(part, INK) for part in _wrapped(one.asked.question or "(no question)", font)]
    targets = list(dict.fromkeys(one.asked.targets))
    lines += [(part, PALE) for part in _wrapped(f"target: {' | '.join(targets)}", font)]
    for name, reply, scores in zip(names, one.replies, one.scores, strict=True):
        is_right = any(same(reply.text, target) for target in targets)
        metric, value = next(iter(scores.items()))
        text = f"{name}: {reply.text or '(empty)'} ({metric} {100 * value:.0f})"
        lines += [(part, RIGHT if is_right else WRONG) for part in _wrapped(text, font)]
    medium = next(iter(one.asked.media), None)
    view = None if medium is None else _view(medium)
    top = EDGE + (0 if view is None else VIEW + EDGE)
    card = Image.new("RGB", (WIDE, top + LINE * len(lines) + EDGE), CARD)
    if view is not None:
        card.paste(view, ((WIDE - view.width) // 2, EDGE + (VIEW - view.height) // 2))
    pen = ImageDraw.Draw(card)
    for i, (text, colour) in enumerate(lines):
        pen.text((EDGE, top + LINE * i), text, fill=colour, font=font)
    return card


def _view(medium: Media) -> Image.Image:
    """An image fitted into a card, or the waveform of a clip."""
    wide = WIDE - 2 * EDGE
    if medium.kind == "image":
        image = read_image(medium.item)
        scale = min(wide / image.width, VIEW / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = scale > 2  # tiny images keep their pixels
        return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    view = Image.new("RGB", (wide, VIEW), CARD)
    if medium.kind != "audio":
        return view
    samples, _ = read_audio(medium.item)
    pen, middle = ImageDraw.Draw(view), VIEW // 2
    scale = (middle - 1) / max(float(np.abs(samples).max()), 1e-6)
    for x, part in enumerate(np.array_split(samples, wide)):
        if len(part):
            ends = (middle - scale * float(part.max()), middle - scale * float(part.min()))
            pen.line((x, ends[0], x, ends[1]), fill=PALE)
    return view


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines that fit into a card, at most `MOST_LINES`."""
    wide = WIDE - 2 * EDGE
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, wide):
            joined = f"{lines[-1]} {piece}".strip()
            if font.getlength(joined) <= wide:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _pieces(word: str, font: ImageFont.FreeTypeFont, wide: int) -> list[str]:
    """A word, cut where it is wider than a card."""
    pieces = [""]
    for letter in word:
        if font.getlength(pieces[-1] + letter) > wide:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _font() -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, SIZE)
        except OSError:
            continue  # not installed
    return ImageFont.load_default(SIZE)
