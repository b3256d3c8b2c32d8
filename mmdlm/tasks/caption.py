"""Caption images."""

from __future__ import annotations

from typing import Any

from mmdlm.decoding.preset import Choice
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import generate_from_media


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
    """Caption an image, or each image of a list.

    Args:
        model: a model that takes images.
        image: path, file bytes, PIL image, array or tensor, see `mmdlm.media.read_image`; or a
            list of them.
        prompt: instruction; None: the checkpoint's default.
        length: canvas length in tokens; None: the checkpoint's default, else 32.
        strategies: preset name or list, see `mmdlm.decode`; None: the checkpoint's default.
        batch_size: images per batch; in float32 it does not change the captions, see `fill`.
        details: return `mmdlm.tasks.generate.Answer` instead of text.
        seed: random seed, the same for every image; None: torch's default generator.
    Returns:
        str, or list[str] for a list; `Answer` instead of str if details=True.
    Raises:
        ValueError: an image is not valid, the model has no image encoder, or there is no prompt.
    """
    given = (prompt, length, strategies, batch_size, details, seed)
    return generate_from_media(model, "caption", "image", image, *given)
