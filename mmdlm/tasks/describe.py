"""What a sound is."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import ask


def describe(
    model: MultimodalDLM,
    audio: Any,
    *,
    prompt: str | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
) -> Any:
    """The description of a sound; of a list of sounds, the list of their descriptions.

    Args:
        model: a model that takes audio.
        audio: path, file bytes or (samples, rate), see `mmdlm.media.read_audio`; or a list of
            them.
        prompt: the instruction; None for the checkpoint's own.
        length: tokens of the canvas; None for the checkpoint's own, else 32.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: recordings decoded together; it does not change the descriptions.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers; equal recordings get equal descriptions.
    Raises:
        ValueError: a recording is not valid, the model takes none, or there is no instruction.
    """
    return ask(
        model,
        "describe",
        "audio",
        audio,
        prompt=prompt,
        length=length,
        strategies=strategies,
        batch_size=batch_size,
        details=details,
        seed=seed,
    )
