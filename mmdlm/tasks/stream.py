"""Answers step by step: `mmdlm.stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

from mmdlm.model import MultimodalDLM, require_model
from mmdlm.tasks.answer import answer
from mmdlm.tasks.caption import caption
from mmdlm.tasks.chat import generate
from mmdlm.tasks.describe import describe
from mmdlm.tasks.draw import draw
from mmdlm.tasks.infill import infill
from mmdlm.tasks.transcribe import transcribe
from mmdlm.tasks.watch import Canvas, watching

TASKS = {
    task.__name__: task for task in (answer, caption, describe, draw, generate, infill, transcribe)
}
"""What `stream` takes by name."""


def stream(
    model: MultimodalDLM, task: str | Callable[..., Any], *given: Any, **options: Any
) -> Stream:
    """The canvases of a task: before the first step, and after each.

        for canvas in mmdlm.stream(model, "caption", "cat.jpg"):
            print("".join(piece or "_" for piece in canvas.pieces))

    The task runs in a thread, at most one step ahead of what was taken. Several items of one call
    are decoded together, so their canvases alternate.

    Args:
        model: the model.
        task: "caption", "answer", "describe", "draw", "transcribe", "generate" or "infill"; or a
            function that takes a model and calls one of these.
        *given: what the task takes after the model.
        **options: see there.
    Returns:
        an iterator of `mmdlm.tasks.watch.Canvas`, whose `result` is what the task returned.
    Raises:
        ValueError: there is no such task. What the task itself raises comes while iterating.
    """
    require_model(model, "stream")
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
        task = TASKS[task]
    chosen = task
    return Stream(lambda: chosen(model, *given, **options))


class Stream:
    """An iterator over the canvases of a task.

    Args:
        run: the task.

    Attributes:
        result: what the task returned; None before the last canvas was taken.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.result: Any = None
        self._canvases = _canvases(run)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Canvas:
        try:
            return next(self._canvases)
        except StopIteration as end:
            self.result = self.result if end.value is None else end.value
            raise

    def close(self) -> None:
        """Ends the task after the current step."""
        self._canvases.close()


class _ClosedError(Exception):
    """Nobody takes the canvases any more."""


def _canvases(run: Callable[[], Any]) -> Iterator[Canvas]:
    """The canvases of a task that runs in a thread; returns its result.

    Args:
        run: the task.
    """
    ready: Queue[Canvas | None] = Queue(1)
    closed, outcome = Event(), {}

    def show(canvas: Canvas) -> None:
        ready.put(canvas)
        if closed.is_set():
            raise _ClosedError

    def work() -> None:
        try:
            with watching(show):
                outcome["result"] = run()
        except BaseException as error:  # raised where the canvases are taken
            outcome["error"] = error
        ready.put(None)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (canvas := ready.get()) is not None:
            yield canvas
    finally:
        closed.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.05)
            except Empty:
                continue
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
