"""The canvases of a running command, drawn in the terminal: `--live`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mmdlm.tasks.watch import Canvas

OPEN = "░"
"""Drawn for a position that is still open."""
LINES = 12
"""Most answers drawn at a time: those that changed last."""
COLOURS = ((0.5, "red"), (0.8, "dark_orange"), (0.95, "yellow"), (1.01, "green"))
"""Colour of a token by its confidence: the first whose bound is above it."""


@contextmanager
def live(wanted: bool = True, console: Console | None = None) -> Iterator[None]:
    """Within it, tasks of this thread draw their canvases on stderr after each step.

    Args:
        wanted: False draws nothing.
        console: where to draw; None for stderr.
    """
    if not wanted:
        yield
        return
    from rich.console import Console, Group
    from rich.live import Live

    from mmdlm.tasks.watch import watching

    shown: dict[int, Text] = {}
    with Live(
        console=console or Console(stderr=True), auto_refresh=False, transient=True
    ) as screen:

        def show(canvas: Canvas) -> None:
            shown.pop(canvas.item, None)
            shown[canvas.item] = drawn(canvas)  # the latest comes last
            for item in list(shown)[:-LINES]:
                del shown[item]
            screen.update(Group(*(shown[item] for item in sorted(shown))), refresh=True)

        with watching(show):
            yield


def drawn(canvas: Canvas) -> Text:
    """One answer as a line: tokens coloured by confidence, those of the latest step bold."""
    from rich.text import Text

    open_count = sum(piece is None for piece in canvas.pieces)
    line = Text().append(f"{canvas.step:>4}  ", style="dim")
    if not canvas.pieces:
        return line.append(f"{len(canvas.committed)} tokens in this step", style="default")
    for i, (piece, confidence) in enumerate(zip(canvas.pieces, canvas.confidence, strict=True)):
        if piece is None:
            line.append(OPEN, style="dim")
            continue
        bold = "bold " if i in canvas.committed else ""
        line.append(piece, style=bold + colour(confidence))
    return line.append(f"  {open_count} left" if open_count else "", style="dim")


def colour(confidence: float) -> str:
    """Name of the colour of a token; one that was given, with confidence 0, has none.

    Args:
        confidence: 0 to 1.
    """
    if confidence == 0:
        return "default"
    return next(name for bound, name in COLOURS if confidence < bound)
