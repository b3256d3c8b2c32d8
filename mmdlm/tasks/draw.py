"""Draw images: new ones from a text, the missing part of one, or a changed one."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adapters.image_codes import OPEN, ImageCodes
from encoders.checks import shown
from mmdlm.decoding import preset
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.state import Streams
from mmdlm.decoding.strategy import Strategy
from mmdlm.image_prompt import image_prompt
from mmdlm.layout import Row
from mmdlm.media import read_image
from mmdlm.messages import Media, numbered
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.tasks.generate import as_list, batches, resolve_settings
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


def draw(
    model: MultimodalDLM,
    text: str | list[str],
    *,
    size: int | tuple[int, int] | None = None,
    seed: int | list[int] | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    strategies: preset.Choice = None,
    image: Any = None,
    mask: Any = None,
    codes: Any = None,
    batch_size: int = 4,
    details: bool = False,
) -> Any:
    """Draw an image of a text, or one of each text of a list.

    With `image` and `mask` the part of the image under the mask is drawn again (inpainting), the
    codes elsewhere stay. With `image` alone the text says what to change, for models trained to
    edit. With `codes` only the missing codes of a grid are drawn.

    Args:
        model: a model that draws, such as MMaDA or Lumina-DiMOO.
        text: what the image shows, or a list.
        size: width and height in pixels, or one number for both; multiples of the side of a code.
            None: the model's, or that of `image` or `codes`.
        seed: seed of each image; a list has one per text. An image does not depend on the others.
            None: torch's default generator gives the seeds.
        guidance: scale of classifier-free guidance by the text, 0 for none; None: the model's.
        steps: decoding steps; None: the model's.
        strategies: preset name or list, see `mmdlm.decode`; None: the model's.
        image: path, file bytes, PIL image, array or tensor; or a list of one per text.
        mask: with `image`: bright where it is drawn again; an image of the same size, or a list.
        codes: [Y X] integers, -1 where a code is drawn; or a list.
        batch_size: images per batch; in float32 it does not change them.
        details: return `Drawing` instead of the image.
    Returns:
        PIL image, or a list of them for a list of texts.
    Raises:
        ValueError: the model cannot draw, or an argument is not valid.
    """
    require_model(model, "draw")
    codec = require_drawing(model)
    texts = as_list(text)
    if not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError(f"text is {shown(text)}, expected a text or a list of texts")
    editing = image is not None and mask is None
    task = "edit" if editing and model.preset.get("edit") else "draw"
    chosen = adjusted(model, task, strategies, guidance, steps)
    given = [
        _each(name, value, len(texts))
        for name, value in (("image", image), ("mask", mask), ("codes", codes))
    ]
    seeds = _seeds(seed, len(texts))
    items = list(zip(texts, *given, seeds, strict=True))
    wanted = numbered(lambda item: _wanted(model, codec, size, *item), items)
    sizes = [one.codes.shape[0] * 2**20 + one.codes.shape[1] for one in wanted]
    done: dict[int, Drawing] = {}
    for batch in batches(sizes, batch_size):
        done |= zip(batch, _drawn(model, [wanted[i] for i in batch], chosen, batch), strict=True)
    results = [done[i] if details else done[i].image for i in range(len(wanted))]
    return results if isinstance(text, list) else results[0]


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


def adjusted(
    model: MultimodalDLM,
    task: str,
    strategies: preset.Choice = None,
    guidance: float | None = None,
    steps: int | None = None,
) -> list[Strategy]:
    """The strategies of a drawing with another strength of guidance or another number of steps.

    Args:
        model: the model.
        task: "draw" or "edit", an entry of the model's preset.
        strategies: see `draw`.
        guidance: see `draw`.
        steps: see `draw`; every strategy with a setting of this name gets it.
    Raises:
        ValueError: no strategy has the setting.
    """
    chosen = resolve_settings(model, task, None, 1, strategies, needs_prompt=False).strategies
    if guidance is not None:
        others = [one for one in chosen if not isinstance(one, CFG)]
        old = next((one for one in chosen if isinstance(one, CFG)), CFG(0.0))
        chosen = [replace(old, scale=float(guidance)), *others]
    if steps is not None:
        if not any(hasattr(one, "steps") for one in chosen):
            raise ValueError("steps has no effect with these strategies; leave it out")
        chosen = [replace(one, steps=steps) if hasattr(one, "steps") else one for one in chosen]
    return chosen


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


@torch.inference_mode()
def _drawn(
    model: MultimodalDLM, wanted: Items[Wanted], strategies: list[Strategy], numbers: list[int]
) -> list[Drawing]:
    """Images of one grid, decoded together."""
    codec, show = require_drawing(model), WATCHER.get()
    canvas = torch.stack([codec.canvas(one.codes, model.spec.mask_id) for one in wanted])
    rows = [_prompts(model, one) for one in wanted]
    guided = [one for one in strategies if isinstance(one, CFG)]
    scales = {"text": guided[0].scale, "image": guided[0].image} if guided else {}
    begin = time.perf_counter()
    held: dict[Any, Tensor] = {}
    sequence = model.embed([row[""] for row in rows], held)
    alternatives = {
        name: model.embed([row[name] for row in rows], held) for name in rows[0] if scales.get(name)
    }
    decoded = decode(
        model,
        sequence,
        canvas.shape[1],
        strategies,
        generator=Streams.exactly(
            [torch.Generator(model.device).manual_seed(one.seed) for one in wanted]
        ),
        columns=slice(codec.ids.start, codec.ids.stop),
        canvas=canvas,
        on_step=None if show is None else Watched(numbers, show, pieces=False),
        alternatives=alternatives,
    )
    seconds = time.perf_counter() - begin
    grid = wanted[0].codes.shape
    tokens = decoded.tokens[:, -canvas.shape[1] :].cpu()
    codes = torch.stack([codec.decode(row, grid) for row in tokens])
    given = canvas != model.spec.mask_id
    history = decoded.history
    found = (history.step.cpu().masked_fill(given, -1), history.confidence.cpu())
    step, confidence = (
        torch.stack([_at_codes(codec, row, grid) for row in table]) for table in found
    )
    fields = zip(_pixels(model, codes), codes, decoded.forwards, step, confidence, strict=True)
    return [Drawing(a, b, c, seconds, d, e) for a, b, c, d, e in fields]


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


def _wanted(
    model: MultimodalDLM,
    codec: ImageCodes,
    size: int | tuple[int, int] | None,
    text: str,
    image: Any,
    mask: Any,
    codes: Any,
    seed: int,
) -> Wanted:
    """One image to draw, with its inputs read and checked.

    Raises:
        ValueError: arguments exclude each other, or are not valid.
    """
    pair = (size, size) if isinstance(size, int) else size
    if sum(one is not None for one in (pair, image, codes)) > 1:
        raise ValueError("size=, image= and codes= exclude each other; each gives the size")
    if mask is not None and image is None:
        raise ValueError("mask= is for an image; pass image= too")
    if codes is not None:
        grid = torch.as_tensor(codes).to(torch.long)
        codec.canvas(grid, model.spec.mask_id)  # checks it
        return Wanted(text, grid, None, seed)
    if image is None:
        return Wanted(text, torch.full(codec.grid(pair), OPEN), None, seed)
    raw = read_image(image, on_damage=model.on_damage)
    preprocess = model.encoders["image"].preprocess
    if mask is None:
        if codec.edit_system is None:
            raise ValueError(
                "this model cannot edit an image by a text; pass mask= to draw a part of it again"
            )
        prepared = replace(preprocess, size=codec.edit_size)(raw)
        high, wide = prepared.tensor.shape[1:]
        return Wanted(text, torch.full(codec.grid((wide, high)), OPEN), prepared, seed)
    shape = read_image(mask, on_damage=model.on_damage)
    if shape.size != raw.size:
        raise ValueError(f"mask is {shape.size}, expected the size of the image, {raw.size}")
    weight = next(model.encoders["image"].parameters())
    with torch.inference_mode():
        pixels = preprocess(raw).tensor[None].to(weight)
        grid = model.encoders["image"].encode(pixels)[0].cpu()
    bright = torch.from_numpy(_bright(preprocess.cropped(shape)))[None, None]
    again = torch.nn.functional.avg_pool2d(bright, codec.stride)[0, 0] > 0.5
    if not bool(again.any()):
        raise ValueError("mask covers no code of the image; make it brighter or larger")
    return Wanted(text, grid.masked_fill(again, OPEN), None, seed)


def _bright(mask: Image.Image) -> Any:
    """[Y X] float32, 1 where a mask is brighter than the middle."""
    import numpy as np

    return (np.asarray(mask.convert("L")) > 127).astype(np.float32)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value per text.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, list) or (name == "codes" and value and not _is_grid(value[0])):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} texts")
    return value


def _is_grid(value: Any) -> bool:
    """Whether an entry of `codes` is a whole grid, so that the list holds several."""
    return torch.as_tensor(value).ndim == 2


def _seeds(seed: int | list[int] | None, count: int) -> list[int]:
    """One seed per text.

    Raises:
        TypeError: a seed is not an integer.
    """
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    seeds = _each("seed", seed, count)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in seeds):
        raise TypeError(f"seed is {shown(seed)}, expected an integer, or one per text")
    return seeds
