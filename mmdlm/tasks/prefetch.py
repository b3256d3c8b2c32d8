"""Apply a function to items in threads, in order, ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
MOST = 16
"""Most threads by default: each may hold a decoded image of up to 256 MB."""


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prefetch(
    function: Callable[[Item], Any], items: Iterable[Item], ahead: int, workers: int | None = None
) -> Iterator[tuple[Item, Future[Any]]]:
    """Yields each item with the future of its result, in the order of `items`.

    Closing the iterator waits for the calls in progress and cancels the others.

    Args:
        function: called in threads; libraries that decode files release the interpreter lock.
        items: arguments of the calls.
        ahead: number of items whose results are computed, or waiting, before they are needed.
        workers: threads; None: one per core, at most 16.
    """
    waiting: deque[tuple[Item, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(workers or min(cores(), MOST), thread_name_prefix="mmdlm-prefetch")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
