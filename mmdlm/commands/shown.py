"""What commands share: which model runs, how it is asked, how results are printed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM


SHORT = ("file", "question", "template", "prompt", "text")
"""What is printed of an answer without details."""


@dataclass(frozen=True)
class Run:
    """Which model runs, where, and how its results are shown.

    Args:
        model: bundled name, folder, or hub id (owner/name).
        device: "auto" takes the GPU if there is one; "cpu", "cuda".
        dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU.
        compile: compile the model first; worth a minute on a GPU when there is much to do.
        batch_size: items computed together; in float32 it does not change the results.
        json: print one JSON object per line.
        adapter: folder or hub id of a LoRA adapter of the model, merged into its weights.
        on_damage: what a damaged or truncated image or recording is: an "error", or a warning
            ("warn") after which its readable part is used.
        prune: drop tokens of images, METHOD@KEEP with a share or a number: divprune@0.25 before the
            language model, attention@0.35 inside it, or
            '{rank: attention, layer: 16, step: 1, keep: 0.35}' (see mmdlm bench prune).
    """

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    batch_size: int = 16
    json: bool = False
    adapter: str | None = None
    on_damage: Literal["error", "warn"] = "error"
    prune: str | None = None

    def load(self) -> MultimodalDLM:
        """The model."""
        from mmdlm.checkpoint import load

        names = ("device", "dtype", "compile", "adapter", "prune")
        model = load(self.model, **{name: getattr(self, name) for name in names})
        model.on_damage = self.on_damage
        return model


@dataclass(frozen=True)
class Output:
    """Where the results of many files are kept.

    Args:
        out: JSON Lines file that results are appended to. Run the same command again to resume: it
            processes what has no result yet, has changed, or failed. Failures are also listed in
            the same name with .failed before the ending; what is skipped is named on stderr.
        redo: process files again whose results in --out were made with another model, prompt or
            decoding; without --redo or --keep the command stops there.
        keep: keep such results as they are.
    """

    out: Path | None = None
    redo: bool = False
    keep: bool = False

    def check(self) -> None:
        """Raises ValueError for options without effect."""
        if self.out is None and (self.redo or self.keep):
            raise ValueError("--redo and --keep are about earlier results; name their file: --out")


@dataclass(frozen=True)
class Ask:
    """How an answer is asked for and decoded.

    Args:
        prompt: instruction; by default the checkpoint's own.
        length: tokens of the answer's canvas; by default the checkpoint's own.
        decoding: decoding preset (see mmdlm list decoding) or YAML file; by default the
            checkpoint's own.
        seed: of decodings that draw random numbers.
        details: also show forwards, time, and for each word its step and confidence.
        live: draw the answers on stderr while they are decoded, coloured by confidence.
        trace: draw when each word was committed, and how surely: a picture (.png) with a line per
            step, or an animation (.gif); of one answer.
    """

    prompt: str | None = None
    length: int | None = None
    decoding: str | None = None
    seed: int | None = None
    details: bool = False
    live: bool = False
    trace: Path | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the task functions."""
        given = {name: getattr(self, name) for name in ("prompt", "length", "seed")}
        details = self.details or self.trace is not None
        return given | {"details": details, "strategies": self.decoding}

    def check(self, count: int) -> None:
        """Raises unless there are as many answers as can be drawn."""
        if self.trace is not None and count != 1:
            raise ValueError(f"--trace draws one answer, here are {count}; name one file or text")

    def draw(self, record: dict[str, Any], image: str | Path | None = None) -> dict[str, Any]:
        """The record as it is to be printed, after its trace was drawn."""
        if self.trace is None or "words" not in record:
            return record
        from mmdlm.media import read_image
        from mmdlm.tasks.trace import draw_trace

        picture = None if image is None else read_image(image)
        draw_trace(record["words"], self.trace, image=picture, title=record["text"])
        print(f"{self.trace}: drawn", file=sys.stderr)
        return record if self.details else {k: v for k, v in record.items() if k in SHORT}


def plain(result: Any) -> dict[str, Any]:
    """A text, or an answer with its details, as a table."""
    return {"text": result} if isinstance(result, str) else result.to_dict()


def print_result(record: dict[str, Any], as_json: bool, label: str | None) -> None:
    """One result: a JSON line, or "label: text" with its details below."""
    if as_json:
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    if "embedding" in record:
        vector = record["embedding"]
        text = f"[{', '.join(f'{x:.3f}' for x in vector[:4])}, ...] {len(vector)} numbers"
    else:
        text = record["text"]
    print(text if label is None else f"{record[label]}: {text}", flush=True)
    if "words" not in record:
        return
    print(
        f"    {record['forwards']} forwards, {record['tokens_per_forward']:.2f} tokens each, "
        f"{record['seconds']:.3f} s"
    )
    print("    " + "  ".join(f"{word}@{step} {sure:.2f}" for word, step, sure in record["words"]))
    if record["probabilities"]:
        print("    " + "  ".join(f"{k} {v:.3f}" for k, v in record["probabilities"].items()))
