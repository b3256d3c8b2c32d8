"""Base class of the decoding methods, and checks that they fit one another and the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from encoders.checks import Checked
from mmdlm.backbones.kv import KV
from mmdlm.decoding.memory import Entry
from mmdlm.decoding.refresh import Refresh, Shown
from mmdlm.model import MultimodalDLM

if TYPE_CHECKING:
    from mmdlm.decoding.look import Look
    from mmdlm.decoding.view import View
from collections.abc import Sequence as Items

NEW, EOS, GONE = -1, -2, -3
"""Entries of a resized answer that are not positions of the old one, see `Strategy.resize`."""


@dataclass(frozen=True)
class Strategy(Checked):
    """One decoding method: hyperparameters here, what a decode needs to remember in `view.memory`.

    Every batch row has its own clock (step, block, step within the block), independent of
    the other rows. The hooks see all rows at once, through a read-only `View`; only the loop
    writes.

    A step calls, in this order: plan, narrow and block_size, refresh, show, look, (the model runs),
    guide and observe in the order of the strategies, pick, score, replan, stop, select, edit; then
    the loop writes and calls hold, revise, end and resize. The hooks of `ONE_OWNER` have one owner
    per decode; of the others there may be many.

    The loop, never a strategy, keeps these rules: the mask id is never committed; only masked
    positions that are open commit, so prompt and known tokens stay; at least one of them commits
    per row and step (unless `may_idle`); revising ends after twice as many steps of a row as its
    answer has positions; a finished row leaves the batch.

    Attributes:
        ONE_OWNER: hooks that two strategies cannot both decide.
        MANY: hooks that several strategies may decide.
        paper: where the method comes from, "name, arXiv 2505.22618"; empty for our own.
        exact: the answer a reader sees is that of the same decode without the strategy.
        requires: names of `PROPERTIES` that the decode must have.
        denies: properties that a decode with this strategy lacks. Deciding `edit`, `resize` or
            `stop` denies "final_tokens", "fixed_length" or "own_schedule" by itself, and buffers of
            its own (`cache`) deny "plain_cache".
        may_idle: `select` may commit nothing in a step (schedules with a fixed number of steps).
        steady: what `plan` and `narrow` open in a row stays the same until no mask is left in it,
            if none are added.
        sliding: the open positions of `plan` move; for the clock all of the answer is one block.
        sees: which logits the hooks need. "open": open masks, give or take; "block": all open
            positions, committed ones too; "answer": the whole answer. Always as far as `refresh`
            computes them.
    """

    ONE_OWNER: ClassVar[tuple[str, ...]] = (
        *("layout", "plan", "refresh", "show", "look"),
        *("pick", "score", "select", "edit", "resize"),
    )
    MANY: ClassVar[tuple[str, ...]] = (
        *("narrow", "block_size", "replan", "observe", "guide"),
        *("stop", "hold", "revise", "end"),
    )
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset()
    denies: ClassVar[frozenset[str]] = frozenset()
    may_idle: ClassVar[bool] = False
    steady: ClassVar[bool] = False
    sliding: ClassVar[bool] = False
    sees: ClassVar[Literal["open", "block", "answer"]] = "open"

    def prepare(self, model: MultimodalDLM, columns: slice | None) -> dict[str, Any]:
        """Objects that all requests share (networks, ids), made once per session; checks them.

        Args:
            model: the model.
            columns: ids that may be committed; None for the whole vocabulary.
        Raises:
            ValueError: the strategy does not fit the model.
        """
        return {}

    def begin(self, view: View) -> dict[str, Entry]:
        """What is remembered of new rows, by name; called once for each request that is added.

        Args:
            view: the new rows alone, before their first step.
        Raises:
            ValueError: the strategy does not fit the request.
        """
        return {}

    def layout(self, view: View) -> Tensor:
        """[B L] int64 level of each position (`mmdlm.layout`); called once for new rows."""
        raise TypeError(f"{type(self).__name__} does not decide layout")

    def plan(self, view: View) -> Tensor:
        """[B L] bool on the host, the open positions of each row: its block, committed or not.

        A row whose positions change begins a new block. A row without any is finished. Positions of
        the prompt that belong to the block may be included; they are never written.
        """
        raise TypeError(f"{type(self).__name__} does not decide plan")

    def narrow(self, view: View) -> Tensor:
        """[B L] bool on the host, which answer positions may be open; others of the plan are not.

        At least one that the plan opens, except in rows that are finished. Called with `plan`, and
        as there a row whose open positions change begins a new block.
        """
        raise TypeError(f"{type(self).__name__} does not decide narrow")

    def block_size(self, view: View) -> Tensor:
        """[B] int64 on the host, positions of a full block like each row's, for schedules.

        The smallest counts. If the owner of `plan` does not decide it, its open positions do.
        """
        raise TypeError(f"{type(self).__name__} does not decide block_size")

    def replan(self, view: View) -> Tensor | None:
        """[B L] bool on the host, a part of the open positions, once the candidates are known.

        Those left out close before anything is selected; the block of a row stays the same. None:
        nothing changes.
        """
        raise TypeError(f"{type(self).__name__} does not decide replan")

    def cache(self, view: View) -> KV | None:
        """Empty key/value buffers for all rows, of a special class; None: the model's own.

        For the owner of `refresh` only; called when rows are added.
        """
        return None

    def refresh(self, view: View) -> Refresh:
        """The positions to recompute in this step."""
        raise TypeError(f"{type(self).__name__} does not decide refresh")

    def look(self, view: View) -> Look | None:
        """What the layers of this step leave out, and what leaves the canvas after it; or None.

        What leaves are positions of the prompt; keys and values of all layers go with them, and
        the others keep their rotary positions. Called for each prompt of the rows, see
        `State.alternatives`; `begin` of the owner too.
        """
        raise TypeError(f"{type(self).__name__} does not decide look")

    def show(self, view: View) -> Shown:
        """The answers that the model reads in this step, with other tokens at undecided positions.

        For noise other than the mask token; without an owner the model reads the canvas itself.
        """
        raise TypeError(f"{type(self).__name__} does not decide show")

    def guide(self, view: View, logits: Tensor) -> Tensor:
        """Rewritten logits [B R V] of the scored positions."""
        raise TypeError(f"{type(self).__name__} does not decide guide")

    def observe(self, view: View, logits: Tensor) -> None:
        """Sees the logits [B R V] as the strategies before it in the list have left them."""
        raise TypeError(f"{type(self).__name__} does not decide observe")

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """Candidate [B R] int64 of each scored position, a column of the logits."""
        raise TypeError(f"{type(self).__name__} does not decide pick")

    def score(self, view: View, logits: Tensor, tokens: Tensor) -> Tensor:
        """Confidence [B R] float32 of the candidates; higher commits earlier."""
        raise TypeError(f"{type(self).__name__} does not decide score")

    def stop(self, view: View) -> Tensor:
        """[B] bool, True for rows that commit every masked position scored in this step."""
        raise TypeError(f"{type(self).__name__} does not decide stop")

    def select(self, view: View) -> Tensor:
        """[B R] bool, which open positions commit in this step."""
        raise TypeError(f"{type(self).__name__} does not decide select")

    def lasts(self, view: View) -> bool:
        """Whether `select` is guaranteed to leave an open mask in every row after this step.

        For schedules whose counts are known beforehand, so that the device-to-host sync of a step
        can be skipped; called before the step, where nothing else writes.
        """
        return False

    def edit(self, view: View) -> Tensor:
        """[B R] bool, which written answer positions take their candidate instead.

        The loop leaves those as they are that see no mask any more (see `mmdlm.layout`).
        """
        raise TypeError(f"{type(self).__name__} does not decide edit")

    def hold(self, view: View) -> Tensor:
        """[B L] bool on the host, written positions that count as masks of the block; after `edit`.

        They keep a row in its block for one more step although nothing in it is masked.
        """
        raise TypeError(f"{type(self).__name__} does not decide hold")

    def revise(self, view: View) -> Tensor:
        """[B L] bool, which known answer positions become masks again; called after the write."""
        raise TypeError(f"{type(self).__name__} does not decide revise")

    def end(self, view: View) -> Tensor:
        """[B L] bool, masks that can only become end tokens; called first and after every write."""
        raise TypeError(f"{type(self).__name__} does not decide end")

    def resize(self, view: View) -> Tensor | None:
        """[B N] int64 on the host, answers of another length, or None to leave them as they are.

        Each entry is a position of the old answer (0 is its first), or `NEW` for a mask, `EOS` for
        an end token, `GONE` after the end of a row that is shorter than others. Called after every
        write; models of full attention only. The keys and values of a row that changes are dropped.
        What strategies remember per position follows; new positions get the fill of their entry.
        """
        raise TypeError(f"{type(self).__name__} does not decide resize")

    def idle(self, length: int) -> bool:
        """Whether this changes nothing in an answer of `length` positions."""
        return False

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """Names of the hooks this strategy decides."""
        names = (*cls.ONE_OWNER, *cls.MANY)
        return tuple(n for n in names if getattr(cls, n) is not getattr(Strategy, n))


PROPERTIES = {
    "full_attention": "full attention",
    "any_order": "an answer that can be filled in any order",
    "all_scored": "all positions of the answer scored in each step",
    "fixed_length": "an answer whose length stays",
    "final_tokens": "committed tokens that do not change",
    "own_schedule": "a schedule that no early exit cuts short",
    "one_forward": "one forward per step",
    "plain_cache": "keys and values that are all the cache holds",
    "masks": "masks in place of undecided tokens",
}
"""Name of each property and what it means; see `Strategy.requires` and `Strategy.denies`."""

BY_HOOK = {"edit": "final_tokens", "resize": "fixed_length", "stop": "own_schedule"}
"""Properties that a decode lacks when a strategy decides the hook."""


def denied(strategy: Strategy | type[Strategy]) -> frozenset[str]:
    """Names of the properties that a decode with the strategy lacks."""
    kind = strategy if isinstance(strategy, type) else type(strategy)
    own_cache = set() if kind.cache is Strategy.cache else {"plain_cache"}
    hooks = {BY_HOOK[hook] for hook in strategy.hooks() if hook in BY_HOOK}
    return strategy.denies | hooks | own_cache


def check_together(strategies: Items[Strategy]) -> None:
    """Checks that no strategy takes away what another one requires.

    Raises:
        ValueError: one does.
    """
    for one in strategies:
        for other in strategies:
            missing = one.requires & denied(other) if one is not other else ()
            for name in sorted(missing):
                a, b = type(one).__name__, type(other).__name__
                raise ValueError(
                    f"{a} cannot be combined with {b}: {a} requires {PROPERTIES[name]}, which {b} "
                    "rules out; keep one"
                )


def check_model(strategy: Strategy, model: MultimodalDLM) -> None:
    """Checks that the model's attention offers what a strategy requires.

    Raises:
        ValueError: it does not.
    """
    spec = model.spec
    lacks = {"full_attention"} if spec.attention != "full" else set()
    in_blocks = spec.attention in ("block_causal", "canvas")
    if in_blocks or (spec.attention == "cascade" and spec.block_size):
        lacks.add("any_order")
    if spec.attention == "canvas":
        lacks.add("masks")
    if spec.attention == "prefix" and spec.block_size:
        lacks.add("any_order")
    for name in sorted(strategy.requires & lacks):
        detail = f" in blocks of {spec.block_size}" if name == "any_order" else ""
        raise ValueError(
            f"{type(strategy).__name__} requires {PROPERTIES[name]}, but this model has "
            f"{spec.attention} attention{detail}; leave {type(strategy).__name__} out"
        )
