"""The model that is trained further, from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmdlm.checkpoint import load
from mmdlm.model import MultimodalDLM
from mmdlm.training import ranges
from mmdlm.training.vocabulary import grow


def existing(
    source: str,
    statistics: dict[str, Any] | None,
    words: Items[str] = (),
    keep: Literal["data", "source"] | None = None,
    quantize: str | None = None,
) -> tuple[MultimodalDLM, list[str]]:
    """The model of a source on the CPU in float32, ready to be trained, and its new words.

    Args:
        source: see `mmdlm.load`.
        statistics: "action" and "state" of the data, None if they hold no actions.
        words: of the data, see `mmdlm.training.vocabulary.grow`.
        keep: whose statistics a policy gets, see `Module`.
        quantize: see `mmdlm.load`.

    Raises:
        ValueError: the data hold actions and the model has no action vocabulary.
    """
    model = load(source, device="cpu", dtype="float32", pack=False, quantize=quantize)
    if statistics is not None:
        if model.robot is None:
            raise ValueError(
                f"the data hold actions, but {source} has no action vocabulary; train a policy, or "
                "a new model (blueprint)"
            )
        ranges.settle(model, statistics, source, keep)
    new = grow(model, words)
    if new:
        some = ", ".join(new[:6]) + (", ..." if len(new) > 6 else "")
        rank_zero_info(f"{source} learns {len(new)} new words: {some}")
    return model.train(), new
