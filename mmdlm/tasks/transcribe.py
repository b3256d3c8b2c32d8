"""Transcribe speech."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import generate_from_media


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
    """Transcribe the speech in a recording, or in each recording of a list.

    Args:
        model: a model that takes audio.
        audio: path, file bytes or (samples, rate), see `mmdlm.media.read_audio`; or a list of
            them.
        prompt: instruction; None: the checkpoint's default.
        length: canvas length in tokens; None: the checkpoint's default, else 32.
        strategies: preset name or list, see `mmdlm.decode`; None: the checkpoint's default.
        batch_size: recordings per batch; in float32 it does not change the transcripts, see `fill`.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: random seed, the same for every recording; None: torch's default generator.
    Returns:
        str, or list[str] for a list; `Answer` instead of str if details=True.
    Raises:
        ValueError: a recording is not valid, the model has no audio encoder, or there is no prompt.
    """
    given = (prompt, length, strategies, batch_size, details, seed)
    return generate_from_media(model, "transcribe", "audio", audio, *given)
