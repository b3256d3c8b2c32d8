"""Images while they are drawn: prompts, canvases, and codes that become pixels."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adapters.image_codes import OPEN, ImageCodes
from mmdlm.decoding.decode import decode
from mmdlm.decoding.events import Finished
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.state import Streams
from mmdlm.decoding.strategy import Strategy
from mmdlm.image_prompt import image_prompt
from mmdlm.layout import Row
from mmdlm.messages import Media
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.watch import WATCHER, Watched

GREY = 128
"""Value of the pixels of codes that are still open."""


@dataclass(frozen=True)
class Drawing:
    """A drawn image with decoding statistics.

    Args:
        image: RGB.
        codes: [Y X] int64 codes of the image tokenizer.
        forwards: forwards of the backbone, those of guidance included.
        seconds: wall time of its batch, without reading files and without turning codes to pixels.
        step: [Y X] int64, 0-based step that committed each code; -1 for given codes.
        confidence: [Y X] float32, probability of each code when it was committed; 0 for given ones.
    """

    image: Image.Image
    codes: Tensor
    forwards: int
    seconds: float
    step: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Wanted:
    """One image to draw.

    Args:
        text: what it shows, or what to change.
        codes: [Y X] int64, `OPEN` where a code is to be drawn.
        image: image to be changed, as preprocessed by the model; None for a new image.
        seed: of its random numbers.
    """

    text: str
    codes: Tensor
    image: Any
    seed: int


def require_drawing(model: MultimodalDLM) -> ImageCodes:
    """The model's codec of images.

    Raises:
        ValueError: it has none.
    """
    if model.drawing is None:
        raise ValueError(
            "this model cannot draw: it has no image tokenizer; use a checkpoint such as MMaDA, "
            "with showlab/magvitv2 in its sub-folder magvitv2, or Lumina-DiMOO, with vqvae"
        )
    return model.drawing


def preview(
    model: MultimodalDLM, tokens: Items[int], grid: tuple[int, int] | None = None
) -> Image.Image:
    """The image of an answer so far; grey where it is open.

    Args:
        model: a model that draws.
        tokens: ids of the answer.
        grid: rows and columns of codes; None: those that the ids after each row show, or the
            model's usual ones.
    """
    codec = require_drawing(model)
    if grid is None and codec.newline is not None:
        columns = list(tokens).index(codec.newline) - len(codec.begin)
        count = len(tokens) - len(codec.begin) - len(codec.end)
        grid = count // (columns + 1), columns
    codes = codec.decode(torch.tensor(tokens), grid)
    drawn = _pixels(model, codes[None])[0]
    is_open = (codes == OPEN).to(torch.uint8) * 255
    cover = Image.fromarray(is_open.numpy()).resize(drawn.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", drawn.size, (GREY,) * 3), drawn, cover)


def stream(model: MultimodalDLM, *seeds: int) -> Streams:
    """The random numbers of images, one stream per seed, as the published code draws them."""
    return Streams.exactly([torch.Generator(model.device).manual_seed(seed) for seed in seeds])


def request(
    model: MultimodalDLM, wanted: Items[Wanted], strategies: list[Strategy]
) -> dict[str, Any]:
    """Arguments of `decode` for images of one grid: prompts, canvas, columns and alternatives."""
    codec = require_drawing(model)
    canvas = torch.stack([codec.canvas(one.codes, model.spec.mask_id) for one in wanted])
    rows = [_prompts(model, one) for one in wanted]
    guided = [one for one in strategies if isinstance(one, CFG)]
    scales = {"text": guided[0].scale, "image": guided[0].image} if guided else {}
    held: dict[Any, Tensor] = {}
    return {
        "prompt": model.embed([row[""] for row in rows], held),
        "length": canvas.shape[1],
        "strategies": strategies,
        "columns": slice(codec.ids.start, codec.ids.stop),
        "canvas": canvas,
        "alternatives": {
            name: model.embed([row[name] for row in rows], held)
            for name in rows[0]
            if scales.get(name)
        },
    }


@torch.inference_mode()
def drawn(
    model: MultimodalDLM, wanted: Items[Wanted], strategies: list[Strategy], numbers: list[int]
) -> list[Drawing]:
    """Images of one grid, decoded together.

    Args:
        model: the model.
        wanted: the images.
        strategies: of the decode.
        numbers: their names for those who watch, see `mmdlm.tasks.watch`.
    """
    show, begin = WATCHER.get(), time.perf_counter()
    given = request(model, wanted, strategies)
    decoded = decode(
        model,
        **given,
        generator=stream(model, *(one.seed for one in wanted)),
        on_step=None if show is None else Watched(numbers, show, pieces=False),
    )
    seconds = time.perf_counter() - begin
    tables = (decoded.tokens[:, -given["length"] :], decoded.history.step)
    fields = zip(numbers, *tables, decoded.history.confidence, decoded.forwards, strict=True)
    return drawings(model, wanted, [Finished(*each) for each in fields], seconds)


def drawings(
    model: MultimodalDLM, wanted: Items[Wanted], answers: Items[Finished], seconds: float
) -> list[Drawing]:
    """The images of complete answers.

    Args:
        model: the model.
        wanted: what was asked for, of one grid; one per answer.
        answers: the answers.
        seconds: see `Drawing`.
    """
    codec, grid = require_drawing(model), wanted[0].codes.shape
    codes = torch.stack([codec.decode(each.tokens.cpu(), grid) for each in answers])
    found = []
    for pixels, own, one, each in zip(_pixels(model, codes), codes, wanted, answers, strict=True):
        step = _at_codes(codec, each.step.cpu(), grid).masked_fill(one.codes != OPEN, -1)
        confidence = _at_codes(codec, each.confidence.cpu(), grid)
        found.append(Drawing(pixels, own, each.forwards, seconds, step, confidence))
    return found


def _at_codes(codec: ImageCodes, row: Tensor, grid: tuple[int, int]) -> Tensor:
    """[Y X] entries of an answer's table [n] at its codes."""
    inner = row[len(codec.begin) : len(row) - len(codec.end)]
    return inner.view(grid[0], -1)[:, : grid[1]]


def _pixels(model: MultimodalDLM, codes: Tensor) -> list[Image.Image]:
    """RGB images of codes [B Y X]; open ones are drawn as code 0."""
    return model.encoders["image"].images(codes.clamp(min=0).to(model.device))


def _prompts(model: MultimodalDLM, wanted: Wanted) -> dict[str, Row]:
    """The prompt under "", and by name the prompts that guidance compares with."""
    media = () if wanted.image is None else (Media("image", wanted.image),)

    def row(text: str | None, *media: Media) -> Row:
        parts = image_prompt(model.processor, text, *media, edits=wanted.image is not None)
        return Row(tuple(part.item if isinstance(part, Media) else part for part in parts))

    found = {"": row(wanted.text, *media), "text": row(None, *media)}
    return found | ({"image": row(wanted.text)} if media else {})
