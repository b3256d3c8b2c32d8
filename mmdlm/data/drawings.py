"""Images to draw: JSON Lines of texts with the codes of their images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from encoders.checks import UnitFloat, check_arguments
from mmdlm.data.dataset import Dataset, Preset
from mmdlm.image_prompt import image_prompt
from mmdlm.lines import as_line, read_records
from mmdlm.messages import RAW, Example, Media, Message, Slot, Text, assistant
from mmdlm.processor import Processor

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


class Drawings(Dataset):
    """Texts with images as codes: one JSON object with "text" and "codes" [Y X] per line.

    `tokenize` writes such a file. The codes depend on the image tokenizer only, so they are
    computed once and not in every epoch.

    Args:
        path: the file.
        drop: share of the draws without their text, for guidance.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another form, or there is none.
    """

    def __init__(self, path: Path, drop: UnitFloat = 0.1) -> None:
        check_arguments(type(self).__init__, {"drop": drop})
        self.path, self.drop = Path(path), drop
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist; write it with drawings.tokenize")
        self.rows = []
        for number, record in read_records(self.path):
            text, codes = record.get("text"), np.asarray(record.get("codes"))
            if not isinstance(text, str) or codes.ndim != 2 or codes.dtype.kind != "i":
                raise ValueError(
                    f'{path}, line {number}: expected {{"text": ..., "codes": [[...], ...]}} with '
                    "rows of integers of equal length"
                )
            self.rows.append((text, codes))
        if not self.rows:
            raise ValueError(f"{path} has no rows")
        self.processor: Processor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def connect(self, processor: Processor, preset: Preset | None = None) -> Self:
        """Takes the model's prompt and codes.

        Raises:
            ValueError: the model does not draw, or has fewer codes.
        """
        codec = processor.outputs.get("image")
        if codec is None:
            raise ValueError(f"{self.path} holds images to draw, but this model does not draw")
        highest = max(int(codes.max()) for _, codes in self.rows)
        if highest >= codec.count:
            raise ValueError(f"{self.path} has code {highest}, but the model only {codec.count}")
        self.processor = processor
        return self

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """Prompt and image at `index`; the draw decides whether the text is left out."""
        if self.processor is None:
            raise ValueError("Drawings needs connect(processor) before the first sample")
        text, codes = self.rows[index]
        parts = image_prompt(self.processor, None if rng.random() < self.drop else text)
        prompt = tuple(part if isinstance(part, Media) else Text(part) for part in parts)
        ids = self.processor.outputs["image"].encode(torch.from_numpy(codes))
        return Example((Message(RAW, prompt), assistant(Slot("image", len(ids), ids))))

    def vocabulary(self) -> list[str]:
        """No words: models that draw have a vocabulary of their own."""
        return []


@torch.inference_mode()
def tokenize(model: MultimodalDLM, pairs: Iterable[tuple[str, Any]], path: Path) -> int:
    """Writes the file of `Drawings` for texts and images; returns the number of rows.

    Args:
        model: a model that draws; its image tokenizer is used alone.
        pairs: texts and images, see `mmdlm.media.read_image`.
        path: file to write.
    """
    count, encoder = 0, model.encoders["image"]
    weight = next(encoder.parameters())
    with Path(path).open("wb") as file:
        for text, image in pairs:
            pixels = model.processor.prepare("image", image).tensor[None].to(weight)
            file.write(as_line({"text": text, "codes": encoder.encode(pixels)[0].tolist()}))
            count += 1
    return count
