"""Prompts for drawn images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdlm.messages import Media, Message, Text

if TYPE_CHECKING:
    from adapters.image_codes import ImageCodes


def image_prompt(
    processor: Any, text: str | None, *media: Media, edits: bool = False
) -> tuple[Tensor | Media, ...]:
    """Token ids and media of the prompt for an image.

    Args:
        processor: `mmdlm.processor.Processor` of a model that draws.
        text: what the image shows, or how `media` change; None: the prompt without a text that
            guidance compares with.
        *media: images to be changed.
        edits: images are changed, even if none is given here.
    """
    codec: ImageCodes = processor.outputs["image"]
    if codec.before or codec.after:
        before, after = (torch.tensor(ids, dtype=torch.long) for ids in (codec.before, codec.after))
        ids = () if text is None else (processor.encode(text, special=False),)
        return before, *ids, after
    system = codec.edit_system if edits else codec.system
    first = () if system is None else (Message("system", (Text(system),)),)
    extra = {"unconditional": True} if text is None else {}
    return processor.prompt((*first, Message("user", (*media, Text(text or "")), extra)), chat=True)
