"""What the layout of a model rules out, said to whoever asks for it all the same."""

from __future__ import annotations

from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


def full_attention(strategy: Strategy, state: DecodeState) -> None:
    """Refuses models whose answers cannot change their length.

    Raises:
        ValueError: the model's attention is not full.
    """
    kind = state.model.spec.attention
    if kind != "full":
        raise ValueError(
            f"{type(strategy).__name__} changes the length of the answer, which is for full "
            f"attention only; this model has {kind}. Leave it out"
        )


def any_order(strategy: Strategy, state: DecodeState) -> None:
    """Refuses models whose answers grow in one direction.

    Raises:
        ValueError: the answer is made in blocks that do not see those behind them.
    """
    if not state.even:
        raise ValueError(
            f"{type(strategy).__name__} goes back and forth in the answer, but this model makes it "
            f"block by block ({state.model.spec.attention} attention), and nothing behind a block "
            "changes it; leave it out, the default keeps all that is final"
        )


def aligned(strategy: Strategy, state: DecodeState) -> None:
    """Checks that all rows compute the same positions of the answer.

    Raises:
        ValueError: the model's own blocks are not the same in each row, so that a row would see,
            and commit, more of its next block than it does alone.
    """
    level = state.level[:, state.prompt :]  # -1 behind the end of a row that is shorter
    lowest = level.masked_fill(level < 0, int(level.max())).amin(0)
    if bool((level.amax(0) > lowest).any()):
        raise ValueError(
            f"{type(strategy).__name__} commits what it sees beyond the block, but the blocks of "
            "this model end elsewhere in rows whose prompts are of unequal length; decode such "
            "rows one by one, or leave the strategy out"
        )


def columns(strategy: Strategy, state: DecodeState) -> tuple[int, int]:
    """Bounds of a window that stands at the same columns in every row.

    Raises:
        ValueError: the blocks are the model's own, which begin at other columns in every row.
    """
    start, stop, turn = state.window
    if turn is not None:
        raise ValueError(
            f"{type(strategy).__name__} recomputes the same columns in all rows, but this model's "
            "own blocks begin elsewhere in each; leave the cache out (the default keeps all that "
            "is final), take SubBlockCache, or give Blocks a size"
        )
    return start, stop
