"""The hooks a decoding method may override."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from mmdlm.decoding.state import DecodeState


class Window(NamedTuple):
    """Canvas positions [start, stop), shared by all rows of a batch.

    Args:
        start: first position.
        stop: position after the last.
        turn: only the positions of this number in `DecodeState.turns`; for blocks that start at
            different canvas positions in different rows. None: no such limit.
    """

    start: int
    stop: int
    turn: int | None = None


class Refresh(NamedTuple):
    """Canvas rows [start, stop) to recompute in a step.

    Args:
        start: first row.
        stop: row after the last.
        cached: keep their keys and values for later steps, and attend to those kept from earlier
            ones. Without it the rows must be the whole canvas.
        attend: end of the keys the rows may see, for rows behind which nothing is valid yet; None:
            the whole canvas.
        fill: positions that later steps of the block cannot score. Batch rows that have a mask
            there commit it and nothing else, in the others `select` decides. None: in all of them.
        store: rows that a forward of its own computes before, for nothing but their keys and
            values, which `cached` keeps; None: there is no such forward.
        renew: [B L] bool on the CPU, the computed rows whose new keys and values are kept, the
            others keep the old ones; for batches whose rows renew different positions. None: all.
        rows: [B L] bool on the CPU, the rows within [start, stop) to compute, others in every row
            of the batch and at least one in each; only positions they score can commit. None: all.
        seen: [B L] bool on the CPU, the only keys that queries may attend to; None: all that the
            layout allows.
    """

    start: int
    stop: int
    cached: bool
    attend: int | None = None
    fill: Window | None = None
    store: Window | None = None
    renew: Tensor | None = None
    rows: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True)
class Strategy:
    """One decoding method: hyperparameters here, the state of a run in `DecodeState`.

    A step asks, in this order: refresh, (the model runs), guide, pick, score, stop, select, edit;
    then the loop writes and asks revise, end, resize and plan. A method overrides the hooks it
    decides. `plan`, `refresh`, `pick`, `score`, `select`, `edit` and `resize` have one owner per
    decode; of `guide`, `stop`, `revise` and `end` there may be many, applied in the order given.

    The loop, never a strategy, keeps these rules: the mask id is never committed; only masked
    positions of the open window commit, so prompt and known tokens stay; at least one of them
    commits per row and step (unless `may_idle`); revising ends after twice as many of a
    row's own steps as there are positions; a finished row leaves the batch.

    Attributes:
        ONE_OWNER: hooks that two strategies cannot both decide.
        paper: where the method comes from, "name, arXiv 2505.22618"; empty for our own.
        exact: the answer a reader sees is that of the same decode without the strategy.
        excludes: names of strategies, or of hooks, that it cannot be combined with.
        may_idle: `select` may commit nothing in a step (schedules with a fixed number of steps).
        steady: `plan` keeps its window as long as any row has a mask in it.
        sees: which logits the hooks need. "open": masked positions of the window, give or take;
            "window": the whole window; "answer": the whole canvas, as far as `refresh` computes it.
    """

    ONE_OWNER: ClassVar[tuple[str, ...]] = (
        *("plan", "refresh", "pick", "score", "select", "edit", "resize"),
    )
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    excludes: ClassVar[tuple[str, ...]] = ()
    may_idle: ClassVar[bool] = False
    steady: ClassVar[bool] = False
    sees: ClassVar[Literal["open", "window", "answer"]] = "open"

    def begin(self, state: DecodeState) -> None:
        """Called once before the first step, to check the model and to set up memory."""

    def plan(self, state: DecodeState) -> Window:
        """The open window, empty to end; called before the first step and after every write."""
        raise TypeError(f"{type(self).__name__} does not decide plan")

    def refresh(self, state: DecodeState) -> Refresh:
        """The rows to recompute in this step."""
        raise TypeError(f"{type(self).__name__} does not decide refresh")

    def guide(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Rewritten logits [B R V] of the read positions."""
        raise TypeError(f"{type(self).__name__} does not decide guide")

    def pick(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Candidate [B R] int64 of each read position, a column of the logits."""
        raise TypeError(f"{type(self).__name__} does not decide pick")

    def score(self, state: DecodeState, logits: Tensor, tokens: Tensor) -> Tensor:
        """Confidence [B R] float32 of the candidates; higher commits earlier."""
        raise TypeError(f"{type(self).__name__} does not decide score")

    def stop(self, state: DecodeState) -> Tensor:
        """[B] bool, True for rows that commit every masked position read in this step."""
        raise TypeError(f"{type(self).__name__} does not decide stop")

    def select(self, state: DecodeState) -> Tensor:
        """[B R] bool, which open positions commit in this step."""
        raise TypeError(f"{type(self).__name__} does not decide select")

    def lasts(self, state: DecodeState) -> bool:
        """Whether `select` surely leaves a mask in the window, in some row, after this step.

        For schedules that need not see what they did, so that the host does not wait for the
        device in every step; asked before the step, where nothing else writes.
        """
        return False

    def edit(self, state: DecodeState) -> Tensor:
        """[B R] bool, which written answer positions take their candidate instead.

        The loop leaves those as they are that see no mask any more (see `mmdlm.layout`).
        """
        raise TypeError(f"{type(self).__name__} does not decide edit")

    def revise(self, state: DecodeState) -> Tensor:
        """[B L] bool, which known answer positions become masks again; asked after the write."""
        raise TypeError(f"{type(self).__name__} does not decide revise")

    def end(self, state: DecodeState) -> Tensor:
        """[B L] bool, masks that can only become end tokens; asked first and after every write."""
        raise TypeError(f"{type(self).__name__} does not decide end")

    def resize(self, state: DecodeState) -> Tensor | None:
        """[B N] int64 on the CPU, a canvas of another length, or None to leave it as it is.

        Each entry says which position of the old canvas (0 is the first of the answer) stands
        there: `DecodeState.NEW` for a fresh mask, `DecodeState.EOS` for an end token,
        `DecodeState.GONE` behind the end of a row that is shorter than others. Asked after every
        write; models of full attention only. All caches are dropped, of the rows that keep their
        length too. Strategies begin again, but keep what they had set up in `begin` as a tensor [B]
        (per row), [B G ...] or [B L ...] (per position of the answer or the canvas): fresh
        positions get what `begin` gives them.
        """
        raise TypeError(f"{type(self).__name__} does not decide resize")

    def idle(self, length: int) -> bool:
        """Whether this changes nothing in an answer of so many positions."""
        return False

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """Names of the hooks this strategy decides."""
        names = (*cls.ONE_OWNER, "guide", "stop", "revise", "end")
        return tuple(n for n in names if getattr(cls, n) is not getattr(Strategy, n))
