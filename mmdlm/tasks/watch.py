"""Canvases while they are being decoded, for whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from mmdlm.decoding.events import Finished
from mmdlm.decoding.session import Session
from mmdlm.text import Tokenizer


@dataclass(frozen=True)
class Canvas:
    """One answer before its first step, or after a step.

    Args:
        item: index of the answer among those that were asked for.
        step: steps done.
        tokens: ids of the answer so far; open positions hold the mask id.
        committed: positions that the step filled or changed, ascending.
        confidence: per position, the probability of its token when it was committed, 0 to 1; 0
            where it is open or was given.
        pieces: per position, the text of its token, None where it is open; empty without a
            tokenizer.
        finished: the answer is complete.
    """

    item: int
    step: int
    tokens: tuple[int, ...]
    committed: tuple[int, ...]
    confidence: tuple[float, ...]
    pieces: tuple[str | None, ...]
    finished: bool


Watcher = Callable[[Canvas], None]
WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
"""Set by `watching`."""


@contextmanager
def watching(show: Watcher) -> Iterator[None]:
    """Within this context, tasks show their canvases before the first and after each step.

    Args:
        show: called with one canvas at a time.
    """
    token = WATCHER.set(show)
    try:
        yield
    finally:
        WATCHER.reset(token)


class Watched:
    """Shows the canvases of a session that have changed or are complete; see `mmdlm.decode`.

    Args:
        items: index of each row among the answers that were asked for.
        show: see `watching`.
        pieces: whether the canvases have the text of their tokens.
    """

    def __init__(self, items: Items[int], show: Watcher, pieces: bool = True) -> None:
        self.items, self.show, self.step, self.pieces = items, show, 0, pieces
        self.shown: dict[int, Canvas] = {}

    def __call__(self, session: Session, done: Mapping[int, Finished]) -> None:
        """See `on_step` of `mmdlm.decode`."""
        for key, item in enumerate(self.items):
            before = self.shown.get(key)
            if before is not None and before.finished:
                continue
            now = self.shown[key] = self._canvas(session, key, item, done.get(key), before)
            self.show(now)
        self.step += 1

    def _canvas(
        self, session: Session, key: int, item: int, done: Finished | None, before: Canvas | None
    ) -> Canvas:
        model = session.model
        if done is None:
            tokens, confidence = session.canvas(key), session.confidence(key)
        else:
            tokens, confidence = done.tokens, done.confidence
        ids, mask_id = tuple(tokens.tolist()), model.spec.mask_id
        old = ids if before is None else before.tokens
        changed = (i for i, new in enumerate(ids) if i >= len(old) or old[i] != new)
        return Canvas(
            item,
            self.step,
            ids,
            tuple(i for i in changed if ids[i] != mask_id),
            tuple(confidence.tolist()),
            pieces(model.tokenizer if self.pieces else None, ids, mask_id),
            done is not None,
        )


def pieces(tokenizer: Tokenizer | None, tokens: Items[int], mask_id: int) -> tuple[str | None, ...]:
    """The text that each token adds to those before it; None for masks, empty for special tokens.

    Args:
        tokenizer: None gives no pieces at all.
        tokens: ids.
        mask_id: id of the mask token.
    """
    if tokenizer is None:
        return ()
    found: list[str | None] = []
    for i, token in enumerate(tokens):
        if token == mask_id:
            found.append(None)
            continue
        # With the token before, as spaces belong to the second of two words.
        near = [t for t in tokens[max(0, i - 1) : i] if t != mask_id]
        before = tokenizer.decode(near)
        found.append(tokenizer.decode([*near, token])[len(before) :])
    return tuple(found)
