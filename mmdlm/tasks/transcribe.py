"""What is said in a recording."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import ask


def transcribe(
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
    """The words spoken in a recording; of a list of recordings, the list of their words.

    Args:
        model: a model that takes audio.
        audio: path, file bytes or (samples, rate), see `mmdlm.media.read_audio`; or a list of
            them.
        prompt: the instruction; None for the checkpoint's own.
        length: tokens of the canvas; None for the checkpoint's own, else 32.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: recordings decoded together; it does not change the transcripts.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers; equal recordings get equal transcripts.
    Raises:
        ValueError: a recording is not valid, the model takes none, or there is no instruction.
    """
    return ask(
        model,
        "transcribe",
        "audio",
        audio,
        prompt=prompt,
        length=length,
        strategies=strategies,
        batch_size=batch_size,
        details=details,
        seed=seed,
    )
