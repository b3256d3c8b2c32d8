"""Upper bounds for the number of our files and call levels that one warm call runs through.

The bounds may only be lowered. Aim: 20 files and 12 levels for caption; 22 files for transcribe,
`policy.infer`, and `load` of a published folder.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import mmdlm
from mmdlm.discover import names

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("encoders", "adapters", "mmdlm"))
IMAGE = np.zeros((64, 64, 3), np.uint8)
CLIP = (np.linspace(-0.1, 0.1, 16000, dtype=np.float32), 16000)
# (files, levels) of each call. `load` calls `matches` of every published system.
BOUNDS = {
    "caption": (42, 15),
    "transcribe": (41, 15),
    "infer": (44, 14),
    "load": (22 + len(names("mmdlm.systems")), 14),
}


@dataclass
class Trace:
    """Our files that ran, and the deepest stack of our functions."""

    files: set[str] = field(default_factory=set)
    deepest: list[str] = field(default_factory=list)
    depth: int = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """See `sys.setprofile`."""
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return
        if event == "return":
            self.depth -= 1
        elif event == "call":
            self.depth += 1
            self.files.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))
            if self.depth > len(self.deepest):
                self.deepest = stack(frame)


def stack(frame: FrameType | None) -> list[str]:
    """Our functions from the outermost to this frame."""
    functions = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(FOLDERS):
            functions.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return functions[::-1]


def traced(call: Callable[[], Any]) -> Trace:
    """Trace of the second call."""
    call()
    trace, before = Trace(), sys.getprofile()
    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(before)
    return trace


@pytest.fixture(scope="module")
def calls(golden: Path) -> dict[str, Callable[[], Any]]:
    model, policy = mmdlm.load("tiny"), mmdlm.load_policy("tiny")
    size = policy.robot.state.size
    observation = {
        "image": IMAGE,
        "state": np.zeros(size, np.float32),
        "prompt": "close the drawer",
    }
    return {
        "caption": lambda: mmdlm.caption(model, IMAGE),
        "transcribe": lambda: mmdlm.transcribe(model, CLIP),
        "infer": lambda: policy.infer(observation),
        "load": lambda: mmdlm.load(golden / "backbones" / "llada"),
    }


@pytest.mark.parametrize("name", BOUNDS)
def test_call_stays_within_its_bounds(calls, name: str) -> None:
    trace = traced(calls[name])
    files, levels = BOUNDS[name]
    assert len(trace.files) <= files, "\n".join(sorted(trace.files))
    assert len(trace.deepest) <= levels, " > ".join(trace.deepest)


def test_trace_counts_files_and_levels() -> None:
    from mmdlm.messages import Message, Text

    trace = traced(lambda: Message("user", (Text("a"),)).text)
    assert trace.files == {"mmdlm/messages.py"}
    assert trace.deepest == ["messages.text", "messages.<genexpr>", "messages.<genexpr>"]
