"""`mmdlm bench prune`: what dropping tokens of images costs and saves."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from mmdlm.benchmarks import report
from mmdlm.benchmarks.answers import asked
from mmdlm.benchmarks.captions import caption_parts
from mmdlm.checkpoint import load
from mmdlm.decoding.pruning import option
from mmdlm.decoding.session import Session
from mmdlm.media import read_image
from mmdlm.media.search import search_media
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import fill, finish, resolve_settings

SHARES = (0.75, 0.5, 0.25)
LATE = "attention-late"
"""Name of `PruneMedia` in step 2, when the first tokens of the answer are known."""


@dataclass(frozen=True)
class Pruned:
    """What one method did with one budget.

    Args:
        method: its name; "" for the answers without pruning.
        share: of the tokens it was to keep.
        kept: image tokens per request at the end, mean.
        same: share of the answers that are those without pruning.
        right: share of the answers that are the reference; None without references.
        megabytes: keys and values of the image tokens of one request at the end.
        seconds: per request, encoders and decode.
    """

    method: str
    share: float
    kept: float
    same: float
    right: float | None
    megabytes: float
    seconds: float


def choice(method: str, share: float) -> Any:
    """The option `prune` of a method with a share."""
    if method == LATE:
        return {"rank": "attention", "step": 2, "keep": share}
    return f"{method}@{share}"


def compare(
    model: MultimodalDLM,
    examples: Items[Example],
    references: Items[str] | None,
    names: Items[str],
    shares: Items[float],
    batch: int = 32,
) -> list[Pruned]:
    """The same requests with every method and budget, those without pruning first.

    Args:
        model: the model; it prunes nothing afterwards.
        examples: requests with images.
        references: the right answer of each; None: there are none.
        names: see `mmdlm.decoding.pruning.option.methods`, and "attention-late".
        shares: of the image tokens to keep.
        batch: requests decoded together.
    """
    found: list[Pruned] = []
    plain: list[tuple[int, ...]] = []
    wanted = [tuple(model.tokenizer.encode(text)) for text in references or ()]
    jobs = [("", 1.0), *((name, share) for name in names for share in shares)]
    for name, share in track(jobs, description="pruning", transient=True):
        option.apply(model, choice(name, share) if name else None)
        strategies = resolve_settings(model, "caption").strategies
        begin = time.perf_counter()
        filled = fill(model, examples, strategies, batch_size=batch, seed=0)
        seconds = (time.perf_counter() - begin) / len(examples)
        answers = [finish(model, each).tokens for each in filled]
        plain = plain or answers
        right = None
        if references is not None:
            right = sum(map(tuple.__eq__, answers, wanted)) / len(answers)
        left = float(len(survivors(model, examples[0])[0]))
        same = sum(map(tuple.__eq__, answers, plain)) / len(answers)
        config, size = model.spec.transformer, model.backbone.embed.weight.element_size()
        bytes_each = 2 * config.layers * config.keys_heads * config.head_width * size
        found.append(Pruned(name, share, left, same, right, left * bytes_each / 1e6, seconds))
    option.apply(model, None)
    return found


def possible(model: MultimodalDLM) -> list[str]:
    """All methods that this model does not refuse."""
    found = []
    for name in (*option.methods(), LATE):
        try:
            option.apply(model, choice(name, 0.5))
        except ValueError:
            continue
        found.append(name)
    option.apply(model, None)
    return found


@torch.inference_mode()
def survivors(model: MultimodalDLM, example: Example) -> tuple[Tensor, int]:
    """The image tokens that are left at the end of a decode.

    Args:
        model: prunes as it is set.
        example: one request with one image.
    Returns:
        [K] int64 places among the tokens of the image, and their number without pruning.
    """
    pruner, packed = model.pruner, model.processor.pack([example])
    model.pruner = None
    whole = model.embed(packed.prompts)
    model.pruner = pruner
    session = Session(model, resolve_settings(model, "caption").strategies)
    generator = torch.Generator(model.device).manual_seed(0)
    key = session.add(packed, generator=generator, keep=True)
    while session.keys:
        session.advance(events=False)
    sequence = session.conversation(key)
    first = int(whole.positions[whole.is_medium].min())
    places = sequence.positions[sequence.is_medium].cpu() - first
    return places, int(whole.is_medium.sum())


def draw(model: MultimodalDLM, image: Image.Image, names: Items[str], share: float) -> Image.Image:
    """The image once per method, with the dropped tokens pale; the whole image first.

    Args:
        model: its image tokens are a grid.
        image: the image.
        names: see `compare`.
        share: of the image tokens to keep.

    Raises:
        ValueError: the image tokens are not on a grid.
    """
    from PIL import ImageDraw

    side, label = 192, 18
    example = request(model, image)
    item = model.processor.prepare("image", image)
    option.apply(model, None)
    with torch.inference_mode():
        ready = [item]
        embedded = model.adapters["image"].embed(model.encoders["image"](ready), ready)[0]
    if embedded.grid is None:
        raise ValueError(
            "the tokens of this model's images are not a grid (views with ends of rows); "
            "leave out --show"
        )
    rows, columns = embedded.grid
    sheet = Image.new("RGB", ((1 + len(names)) * (side + 8), side + label), "white")
    pen, square = ImageDraw.Draw(sheet), image.convert("RGB").resize((side, side))
    for i, name in enumerate(["", *names]):
        tile = square
        if name:
            option.apply(model, choice(name, share))
            places, _ = survivors(model, example)
            light = torch.full((rows * columns,), 60, dtype=torch.uint8)
            light[places] = 255
            grid = Image.fromarray(light.view(rows, columns).numpy())
            mask = grid.resize((side, side), Image.Resampling.NEAREST)
            tile = Image.composite(square, Image.new("RGB", square.size, "white"), mask)
        sheet.paste(tile, (i * (side + 8), label))
        pen.text((i * (side + 8) + 2, 3), name or "all tokens", fill="black")
    option.apply(model, None)
    return sheet


def request(model: MultimodalDLM, image: Any) -> Example:
    """A caption to be written for an image."""
    settings = resolve_settings(model, "caption")
    return Example(
        (user(Media("image", image), settings.prompt), assistant(Slot(length=settings.length)))
    )


def table(found: Items[Pruned], title: str) -> Any:
    """The results as a table."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for name in ("method", "keep", "tokens", "same answer", "right", "MB", "s each", "speed"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    base = found[0].seconds
    for one in found:
        right = "-" if one.right is None else f"{100 * one.right:.1f} %"
        shown.add_row(
            *(one.method or "none", f"{one.share:.0%}", f"{one.kept:.0f}"),
            *(f"{100 * one.same:.1f} %", right, f"{one.megabytes:.2f}"),
            *(f"{one.seconds:.3f}", f"{base / one.seconds:.2f}x"),
        )
    return shown


def draw_plot(found: Items[Pruned], out: Path) -> None:
    """Draws accuracy (or agreement) over the share of tokens kept, one line per method."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs the extra: pip install "mmdlm[demo]"') from error
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    panel = figure.subplots()
    scored = found[0].right is not None
    value = (lambda one: 100 * one.right) if scored else (lambda one: 100 * one.same)
    for i, name in enumerate(dict.fromkeys(one.method for one in found[1:])):
        line = [found[0], *(one for one in found[1:] if one.method == name)]
        line.sort(key=lambda one: one.share)
        inside = name in ("attention", "raters", "random", LATE)
        panel.plot(
            [100 * one.share for one in line],
            [value(one) for one in line],
            marker="o" if inside else "s",
            linestyle="-" if inside else "--",
            color=f"C{i % 10}" if i < 10 else "black",
            label=name,
        )
    panel.set_xlabel("image tokens kept, %")
    panel.set_ylabel("exact answers, %" if scored else "answers as without pruning, %")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, title="solid: inside the language model", title_fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def bench_prune(
    files: list[str] = (),
    model: str = "tiny",
    methods: list[str] = (),
    keep: list[float] = SHARES,
    count: int = 100,
    show: Path | None = None,
    plot: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> int:
    """Measures what dropping image tokens costs and saves.

    mmdlm bench prune --plot pruning.png
    mmdlm bench prune photos/ --model my-model --keep 0.5,0.25 --show survivors.png

    Prints, for each method and share: image tokens left, answers that are the same as without
    pruning, right answers (drawn scenes only), memory of their keys and values, and time.

    Args:
        files: images and folders that are captioned; by default scenes drawn for the bundled model,
            with reference captions.
        model: bundled name, folder or hub id.
        methods: by default all that the model can use; see mmdlm caption --help, --prune.
        keep: shares of the image tokens that stay.
        count: drawn scenes of each number of shapes, or at most this many files.
        show: picture of the tokens that stay, for the first image and the middle share.
        plot: plot to write, .png or .svg.
        device: "cpu", "cuda" or "auto".
        dtype: "float32", "bfloat16", "float16" or "auto".
    """
    console = report.terminal()
    loaded = load(model, device=device, dtype=dtype)
    names = [name for each in methods for name in each.split(",")] or possible(loaded)
    references: list[str] | None = None
    if files:
        found_files = search_media(files, "image").files[:count]
        images: list[Any] = [read_image(file) for file in found_files]
        examples = [request(loaded, image) for image in images]
    else:
        samples = [sample for part in caption_parts(count).values() for sample in part]
        examples = [one for sample in samples for one in asked(sample)]
        references = [turn.answer for sample in samples for turn in sample.turns]
        images = [
            part.item for m in examples[0].messages for part in m.parts if isinstance(part, Media)
        ]
    found = compare(loaded, examples, references, names, keep)
    console.print(table(found, f"{len(examples)} captions by {model}"))
    if plot is not None:
        draw_plot(found, plot)
        console.print(f"plot: {plot}", markup=False)
    if show is not None:
        middle = sorted(keep)[len(keep) // 2]
        picture = images[0] if isinstance(images[0], Image.Image) else Image.fromarray(images[0])
        show.parent.mkdir(parents=True, exist_ok=True)
        draw(loaded, picture, names, middle).save(show)
        console.print(f"tokens that stay: {show}", markup=False)
    return 0
