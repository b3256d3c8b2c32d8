"""Draws images of texts: `mmdlm draw`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdlm.commands.shown import Run, print_result

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.text import Text

    from mmdlm.model import MultimodalDLM
    from mmdlm.tasks.watch import Canvas

WIDTH = 64
"""Most columns of an image in the terminal."""
FRAME, LAST = 120, 1500
"""Milliseconds of a frame of an animation, and of its last one."""
HALF = "\N{UPPER HALF BLOCK}"


def draw(
    texts: list[str],
    run: Run,
    out: Path = Path("picture.png"),
    n: int = 1,
    best_of: int | None = None,
    size: str | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    decoding: str | None = None,
    seed: int | None = None,
    live: bool = False,
    gif: Path | None = None,
) -> int:
    """Draws images of texts, or changes an image.

    mmdlm draw "a red circle" --out circle.png --model my-mmada
    mmdlm draw "make it blue" --image circle.png --out blue.png --model my-lumina --live
    mmdlm draw "a hat" --image me.png --mask head.png --gif hat.gif --model my-mmada
    mmdlm draw "a hat" --best-of 16 --model my-mmada

    Args:
        texts: what the images show; with --image, what to change.
        run: which model runs, and where.
        out: file of the image; of several, a number is added before the ending.
        n: images of each text.
        best_of: images begun for each text; the n that the model itself finds best are completed.
        size: side in pixels, or width x height such as 768x512; by default the checkpoint's own.
        image: image to be changed.
        mask: image of the same size, bright where --image is drawn again; the rest stays.
        guidance: scale of classifier-free guidance; by default the checkpoint's own.
        steps: decoding steps; by default the checkpoint's own.
        decoding: decoding preset (see mmdlm list decoding) or YAML file.
        seed: of the random numbers; the second image (that is begun) has the next seed, and so on.
        live: show the image on stderr while it forms.
        gif: file of an animation of the image while it forms; of one image.
    """
    if gif is not None and (len(texts) * n > 1 or gif.suffix != ".gif"):
        raise ValueError(f"--gif {gif} is for one image, in a file whose name ends in .gif")
    if best_of is not None and (live or gif is not None):
        raise ValueError("--live and --gif show one image while it forms; leave --best-of out")
    from mmdlm.tasks.draw import draw as drawn
    from mmdlm.tasks.drawings import require_drawing

    pair, model = _size(size), run.load()
    grid = None if pair is None else require_drawing(model).grid(pair)
    seeds = None if seed is None else [seed + i * (best_of or n) for i in range(len(texts))]
    options: dict[str, Any] = {"guidance": guidance, "steps": steps, "strategies": decoding}
    options |= {"size": pair, "image": image, "mask": mask, "batch_size": run.batch_size}
    with _watched(model, live, gif, grid):
        found = drawn(model, list(texts), n=n, best_of=best_of, seed=seeds, details=True, **options)
    results = [(text, one) for text, many in zip(texts, found, strict=True) for one in many]
    for i, (text, result) in enumerate(results, 1):
        path = out if len(results) == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        result.image.save(path)
        record = {"text": text, "file": str(path), "forwards": result.forwards}
        print_result(record | {"seconds": round(result.seconds, 3)}, run.json, None)
    return 0


@contextmanager
def _watched(
    model: MultimodalDLM, live: bool, gif: Path | None, grid: tuple[int, int] | None
) -> Iterator[None]:
    """Within this context, images are shown and filmed while they form."""
    from mmdlm.tasks.drawings import preview
    from mmdlm.tasks.watch import watching

    frames: list[Image] = []
    if not live and gif is None:
        yield
        return
    with shown(live) as show:

        def see(canvas: Canvas) -> None:
            frames.append(preview(model, canvas.tokens, grid))
            show(frames[-1])

        with watching(see):
            yield
    if gif is not None:
        times = [FRAME] * (len(frames) - 1) + [LAST]
        gif.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)


def _size(size: str | None) -> tuple[int, int] | None:
    """Width and height of "512" or "768x512".

    Raises:
        ValueError: another form.
    """
    if size is None:
        return None
    numbers = size.lower().split("x")
    if len(numbers) > 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--size {size}: expected a side such as 512, or 768x512")
    return int(numbers[0]), int(numbers[-1])


@contextmanager
def shown(wanted: bool, console: Console | None = None) -> Iterator[Callable[[Image], None]]:
    """A function that shows an image in the terminal, in place of the one before.

    Args:
        wanted: False shows nothing.
        console: where to show it; None for stderr.
    """
    if not wanted:
        yield lambda image: None
        return
    from rich.console import Console
    from rich.live import Live

    screen = console or Console(stderr=True)
    with Live(console=screen, auto_refresh=False, transient=True) as live:
        yield lambda image: live.update(blocks(image, min(WIDTH, screen.width)), refresh=True)


def blocks(image: Image, width: int) -> Text:
    """An image as coloured half blocks, two pixels per character.

    Args:
        image: RGB.
        width: most columns.
    """
    from rich.text import Text

    columns = min(width, image.width)
    rows = max(1, round(image.height * columns / image.width / 2))
    small = image.resize((columns, 2 * rows))
    text = Text()
    for y in range(rows):
        for x in range(columns):
            upper, lower = (small.getpixel((x, 2 * y + half)) for half in (0, 1))
            text.append(HALF, style=f"{_colour(upper)} on {_colour(lower)}")
        text.append("\n")
    return text


def _colour(pixel: tuple[int, int, int]) -> str:
    """Name of a colour."""
    return "#{:02x}{:02x}{:02x}".format(*pixel)
