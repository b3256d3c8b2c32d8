"""Synthetic scenes as files: images with captions and questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmdlm.data.scenes import GRID, Scenes
from mmdlm.messages import Example


def make(
    out: Path,
    count: int = 1000,
    seed: int = 0,
    size: int = GRID,
    asked: int = 4,
    format: Literal["imagefolder", "llava"] = "imagefolder",
) -> Path:
    """Writes PNG images and their texts, and returns the path of the latter.

    "imagefolder": `metadata.jsonl`, one line per image as in Hugging Face's `imagefolder`:
    `file_name`, `text`, `questions`. "llava": `conversations.json` in LLaVA's format; the caption
    and the questions of an image are turns of one conversation.

    Args:
        out: folder to write; created if missing, must be empty.
        count: number of images.
        seed: seed of the scenes, as in `Scenes`, and of the questions.
        size: side of the images in pixels.
        asked: number of questions per image.
        format: see above.
    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the format is unknown.
    """
    from PIL import Image
    from tqdm import tqdm

    if format not in ("imagefolder", "llava"):
        raise ValueError(f"make: format is {format!r}, expected imagefolder or llava")

    scenes = Scenes(size=size, count=count, seed=seed, questions=asked)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"make: {out} is not empty; give a new folder or remove it first")
    is_llava = format == "llava"
    path = out / ("conversations.json" if is_llava else "metadata.jsonl")
    rows = []
    for index in tqdm(range(count), desc="drawing scenes", unit="image"):
        sample = scenes.sample(index, np.random.default_rng((seed, index)))
        name = f"{index:07d}.png"
        Image.fromarray(sample.media("image")[0]).save(out / name)
        rows.append(json.dumps(_conversation(sample, name) if is_llava else _line(sample, name)))
    text = "[\n" + ",\n".join(rows) + "\n]\n" if is_llava else "".join(f"{r}\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return path


def _line(sample: Example, name: str) -> dict[str, Any]:
    """A scene in the format of imagefolder."""
    pairs = [{"prompt": turn.prompt, "answer": turn.answer} for turn in sample.turns]
    return {"file_name": name, "text": pairs[0]["answer"], "questions": pairs[1:]}


def _conversation(sample: Example, name: str) -> dict[str, Any]:
    """A scene in LLaVA's format."""
    turns = []
    for turn in sample.turns:
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": mark + turn.prompt})
        turns.append({"from": "gpt", "value": turn.answer})
    return {"id": name.removesuffix(".png"), "image": name, "conversations": turns}
