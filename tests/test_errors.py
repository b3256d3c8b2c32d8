"""What public functions say about arguments that are not what they take."""

from typing import Any

import numpy as np
import pytest
import torch

import mmdlm
from mmdlm.backbones.family import MOST_TOKENS

IMAGE = np.zeros((64, 64, 3), np.uint8)
CLIP = (np.zeros(16000, np.float32), 16000)
CALLS: dict[str, Any] = {
    "answer": lambda model: mmdlm.answer(model, "what is this ?", IMAGE),
    "caption": lambda model: mmdlm.caption(model, IMAGE),
    "decode": lambda model: mmdlm.decode(model, torch.zeros(1, 2).long(), 4),
    "describe": lambda model: mmdlm.describe(model, CLIP),
    "embed": lambda model: mmdlm.embed(model, text="a"),
    "generate": lambda model: mmdlm.generate(model, "a"),
    "infill": lambda model: mmdlm.infill(model, "a [MASK]"),
    "stream": lambda model: mmdlm.stream(model, "caption", IMAGE),
    "transcribe": lambda model: mmdlm.transcribe(model, CLIP),
    "Policy": lambda model: mmdlm.Policy(model),
    "Session": lambda model: mmdlm.Session(model),
}


@pytest.fixture(scope="module")
def tiny():
    return mmdlm.load("tiny")


@pytest.mark.parametrize("name", CALLS)
def test_name_of_a_model_is_not_a_model(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: .* str.*mmdlm.load\('tiny'\); mmdlm.{name}\("):
        CALLS[name]("tiny")


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("length", 10**12, ValueError),
        ("length", "8", ValueError),
        ("batch_size", "a", TypeError),
        ("batch_size", 0, ValueError),
        ("seed", "a", TypeError),
        ("prompt", 5, TypeError),
        ("strategies", 5, TypeError),
        ("strategies", [5], ValueError),
        ("strategies", [{"class_path": 5}], ValueError),
    ],
)
def test_wrong_argument_is_named(tiny, argument: str, value: Any, error: type[Exception]) -> None:
    name = "recipe" if argument == "strategies" and isinstance(value, list) else argument
    with pytest.raises(error, match=name):
        mmdlm.caption(tiny, IMAGE, **{argument: value})


def test_huge_canvases_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_TOKENS:,}"):
        mmdlm.decode(tiny, torch.zeros(1, 2).long(), 10**10)
    with pytest.raises(ValueError, match=f"at most {MOST_TOKENS:,}"):
        mmdlm.infill(tiny, "the [MASK:1000000000] is red")


def test_wrong_options_of_load_are_named() -> None:
    for options, error in (
        ({"device": "quark"}, ValueError),
        ({"device": 5}, TypeError),
        ({"family": 5}, TypeError),
        ({"config": 5}, TypeError),
        ({"stop_ids": 5}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            mmdlm.load("tiny", **options)
