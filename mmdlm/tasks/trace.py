"""Draw a decoding trace: which token was committed at which step, with what confidence."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from mmdlm.decoding.decode import Decoded
from mmdlm.tasks.generate import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from mmdlm.model import MultimodalDLM

Cell = tuple[str, int, float]
"""(word, commit step, confidence)."""
PAPER, INK, PALE, OLD = (255, 255, 255), (30, 30, 30), (200, 200, 200), (236, 236, 236)
LOW, HIGH = (238, 110, 80), (92, 190, 110)
CELL, GAP, EDGE, TEXT = 30, 6, 16, 15  # pixels: cell height, gap, margin, font size
THUMBNAIL = 192  # side of the image on the left, pixels
MAX_STEPS = 40  # only the first ones are drawn, since late steps fill end tokens


def draw_trace(
    trace: Answer | Decoded | Items[Cell],
    out: Path,
    tokens: Items[str] | None = None,
    image: Image.Image | None = None,
    title: str = "",
    row: int = 0,
) -> Path:
    """Draw a decoding trace with one line per step, and return the path of the file.

    New words are coloured by confidence, from red (0) to green (1); earlier words are grey and
    masked positions are outlines. A step with a pale label committed only positions after the end
    of the text. A .gif file is an animation with one frame per step.

    Args:
        trace: an `Answer` (details=True), its words, or the result of `mmdlm.decode`.
        out: path of a .png or .gif file; missing folders are created.
        tokens: for a `Decoded`, the G tokens of its answer as text, see `token_texts`; those after
            the first "<eos>" are not drawn.
        image: input image, drawn on the left.
        title: line above the trace.
        row: batch row of a `Decoded`.
    Raises:
        ValueError: `tokens` does not have G items, or `out` has another suffix.
    """
    if isinstance(trace, Decoded):
        cells = _cells(trace, tokens or (), row)
    else:
        cells = list(trace.words if isinstance(trace, Answer) else trace)
    out = Path(out)
    if out.suffix not in (".png", ".gif"):
        raise ValueError(f"trace file is {out}, expected a name ending in .png or .gif")
    last = min(max((step for _, step, _ in cells), default=0), MAX_STEPS - 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        _page(cells, last, last, image, title).save(out)
        return out
    pages = [_page(cells, step, last, image, title) for step in range(-1, last + 1)]
    wait = [400] * (len(pages) - 1) + [2500]
    pages[0].save(out, save_all=True, append_images=pages[1:], duration=wait, loop=0)
    return out


def _cells(decoded: Decoded, tokens: Items[str], row: int) -> list[Cell]:
    """(text, step, confidence) of each token of a batch row, up to the end token."""
    history = decoded.history
    steps, confidence = history.step[row].tolist(), history.confidence[row].tolist()
    if len(tokens) != len(steps):
        raise ValueError(
            f"tokens has {len(tokens)} items, expected one per position ({len(steps)})"
        )
    size = next((i + 1 for i, token in enumerate(tokens) if token == "<eos>"), len(tokens))
    return list(zip(tokens, steps, confidence, strict=True))[:size]


def token_texts(model: MultimodalDLM, ids: Tensor) -> list[str]:
    """Text of each token of an answer [G]; end tokens are "<eos>".

    Raises:
        ValueError: the checkpoint has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            "this checkpoint has no tokenizer.json, which is needed to show its tokens"
        )
    backend, eos = model.tokenizer.backend, model.spec.eos_id
    ends = {eos, *model.spec.stop_ids}
    ids = torch.as_tensor(ids).tolist()
    return ["<eos>" if i in ends else backend.id_to_token(i) or "?" for i in ids]


def _page(
    cells: list[Cell],
    upto: int,
    last: int,
    image: Image.Image | None,
    title: str,
) -> Image.Image:
    """Image of steps 0 to `upto`, with the size needed for steps 0 to `last`."""
    font = ImageFont.load_default(TEXT)
    names = ["end" if word == "<eos>" else word for word, _, _ in cells]
    title = title if cells else f"{title} (empty answer)"
    widths = [max(26, round(font.getlength(name)) + 12) for name in names]
    label = round(font.getlength("step 00")) + 10
    left = EDGE + (THUMBNAIL + EDGE if image is not None else 0)
    top = EDGE + (TEXT + 12 if title else 0)
    rows = (last + 1) * (CELL + GAP)
    wide = left + label + sum(w + 4 for w in widths) + EDGE
    wide = max(wide, left + 250, EDGE * 2 + round(font.getlength(title)))
    body = max(rows + 34, THUMBNAIL if image is not None else 0)
    page = Image.new("RGB", (wide, top + body + EDGE), PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((EDGE, EDGE - 2), title, fill=INK, font=font)
    if image is not None:
        side = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST)
        page.paste(side, (EDGE, top))
    for step in range(upto + 1):
        y = top + step * (CELL + GAP)
        is_new = any(when == step for _, when, _ in cells)
        pen.text((left, y + 6), f"step {step + 1}", fill=INK if is_new else PALE, font=font)
        x = left + label
        for name, width, (_, when, confidence) in zip(names, widths, cells, strict=True):
            _cell(pen, font, (x, y, width), name, when - step, confidence)
            x += width + 4
    _legend(pen, font, left, top + rows + 8)
    return page


def _cell(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    place: tuple[int, int, int],
    name: str,
    remaining: int,
    confidence: float,
) -> None:
    """Draw one token at one step; it is committed `remaining` steps later."""
    x, y, width = place
    box = (x, y, x + width, y + CELL)
    if remaining > 0:
        pen.rounded_rectangle(box, 5, outline=PALE)
        return
    pen.rounded_rectangle(box, 5, fill=_colour(confidence) if remaining == 0 else OLD)
    pen.text((x + width / 2, y + CELL / 2), name, fill=INK, font=font, anchor="mm")


def _legend(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, x: int, y: int) -> None:
    pen.text((x, y), "confidence 0", fill=INK, font=font)
    start = x + round(font.getlength("confidence 0")) + 6
    for i in range(60):
        pen.line((start + i, y + 2, start + i, y + TEXT), fill=_colour(i / 59))
    pen.text((start + 66, y), "1", fill=INK, font=font)


def _colour(confidence: float) -> tuple[int, int, int]:
    share = min(1.0, max(0.0, confidence))
    return tuple(round(a + (b - a) * share) for a, b in zip(LOW, HIGH, strict=True))
