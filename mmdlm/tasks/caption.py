"""What a picture shows."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import ask


def caption(
    model: MultimodalDLM,
    image: Any,
    *,
    prompt: str | None = None,
    length: int | None = None,
    strategies: Choice = None,
    batch_size: int = 16,
    details: bool = False,
    seed: int | None = None,
) -> Any:
    """The caption of a picture; of a list of pictures, the list of their captions.

    Args:
        model: a model that takes images.
        image: path, file bytes, PIL image, array or tensor, see `mmdlm.media.read_image`; or a
            list of them.
        prompt: the instruction; None for the checkpoint's own.
        length: tokens of the canvas; None for the checkpoint's own, else 32.
        strategies: a preset's name or a list, see `mmdlm.decode`; None for the checkpoint's own.
        batch_size: pictures decoded together; it does not change the captions.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: of strategies that draw random numbers; equal pictures get equal captions.
    Raises:
        ValueError: a picture is not valid, the model takes none, or there is no instruction.
    """
    return ask(
        model,
        "caption",
        "image",
        image,
        prompt=prompt,
        length=length,
        strategies=strategies,
        batch_size=batch_size,
        details=details,
        seed=seed,
    )
