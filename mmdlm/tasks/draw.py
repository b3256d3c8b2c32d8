"""Draw images: new ones from a text, the missing part of one, or a changed one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from adapters.image_codes import OPEN, ImageCodes
from encoders.checks import shown
from mmdlm.decoding import preset
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.strategy import Strategy
from mmdlm.media import read_image
from mmdlm.messages import numbered
from mmdlm.model import MultimodalDLM, require_model
from mmdlm.tasks.draw_search import Score, search
from mmdlm.tasks.drawings import Drawing, Wanted, drawn, require_drawing
from mmdlm.tasks.generate import as_list, batches, resolve_settings


def draw(
    model: MultimodalDLM,
    text: str | list[str],
    *,
    n: int | None = None,
    best_of: int | None = None,
    score: Score | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int | list[int] | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    strategies: preset.Choice = None,
    image: Any = None,
    mask: Any = None,
    codes: Any = None,
    batch_size: int | None = None,
    details: bool = False,
) -> Any:
    """Draw an image of a text, or one of each text of a list.

    With `image` and `mask` only the part under the mask is drawn again (inpainting). With `image`
    alone the text says what to change, for models trained to edit. With `codes` only the missing
    codes of a grid are drawn.

    Args:
        model: a model that draws, such as MMaDA or Lumina-DiMOO.
        text: what the image shows, or a list.
        n: images of each text, with the seeds seed to seed + n - 1. None: one.
        best_of: images that are begun for each text; the n best are returned, best first, see
            `mmdlm.tasks.draw_search`. None: no search.
        score: of `best_of`; None: the model itself is asked.
        size: width and height in pixels, or one number for both; multiples of the side of a code.
            None: the model's, or that of `image` or `codes`.
        seed: seed of each text; a list has one per text. An image does not depend on the others.
            None: torch's default generator gives the seeds.
        guidance: scale of classifier-free guidance by the text, 0 for none; None: the model's.
        steps: decoding steps; None: the model's.
        strategies: preset name or list, see `mmdlm.decode`; None: the model's.
        image: path, file bytes, PIL image, array or tensor; or one per text.
        mask: with `image`: bright where it is drawn again; an image of the same size, or a list.
        codes: [Y X] integers, -1 where a code is drawn; or a list.
        batch_size: images per batch; in float32 it does not change them. None: n, at least 4.
        details: return `Drawing` instead of the image.
    Returns:
        PIL image, or a list of n; a list of these for a list of texts.
    Raises:
        ValueError: the model cannot draw, or an argument is not valid.
    """
    require_model(model, "draw")
    edits = image is not None and mask is None and model.preset.get("edit")
    wanted = _requests(model, text, size, seed, {"image": image, "mask": mask, "codes": codes})
    chosen = adjusted(model, "edit" if edits else "draw", strategies, guidance, steps)
    count = _count(n, best_of, score)
    if best_of is None:
        found = _drawn(model, wanted, chosen, count, batch_size or max(4, count))
    else:
        found = [search(model, one, chosen, best_of, count, score) for one in wanted]
    found = [[each if details else each.image for each in many] for many in found]
    results = [many[0] for many in found] if n is None else found
    return results if isinstance(text, list) else results[0]


def _count(n: int | None, best_of: int | None, score: Score | None) -> int:
    """Images of each text.

    Raises:
        ValueError: it is not positive, or more than are begun.
    """
    if best_of is None and score is not None:
        raise ValueError("score= is for best_of=; pass best_of= too")
    for name, value in (("n", n), ("best_of", best_of)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {shown(value)}, expected at least 1")
    count = n or 1
    if best_of is not None and best_of < count:
        raise ValueError(f"n is {n} and best_of is {best_of}; expected best_of to be at least n")
    return count


def _drawn(
    model: MultimodalDLM,
    wanted: list[Wanted],
    strategies: list[Strategy],
    count: int,
    batch_size: int,
) -> list[list[Drawing]]:
    """`count` images of each request, in batches of one grid."""
    every = [replace(one, seed=one.seed + i) for one in wanted for i in range(count)]
    sizes = [one.codes.shape[0] * 2**20 + one.codes.shape[1] for one in every]
    done: dict[int, Drawing] = {}
    for batch in batches(sizes, batch_size):
        done |= zip(batch, drawn(model, [every[i] for i in batch], strategies, batch), strict=True)
    return [[done[i * count + j] for j in range(count)] for i in range(len(wanted))]


def _requests(
    model: MultimodalDLM,
    text: str | list[str],
    size: int | tuple[int, int] | None,
    seed: int | list[int] | None,
    given: dict[str, Any],
) -> list[Wanted]:
    """The image that is wanted of each text.

    Args:
        model: the model.
        text: see `draw`.
        size: see `draw`.
        seed: see `draw`.
        given: `image`, `mask` and `codes`, see `draw`.
    """
    codec, texts = require_drawing(model), as_list(text)
    if not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError(f"text is {shown(text)}, expected a text or a list of texts")
    each = [_each(name, value, len(texts)) for name, value in given.items()]
    items = list(zip(texts, *each, _seeds(seed, len(texts)), strict=True))
    return numbered(lambda item: _wanted(model, codec, size, *item), items)


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
