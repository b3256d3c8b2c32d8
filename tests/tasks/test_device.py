"""Tasks with the weights on a fake device, see `pretend` in tests/conftest.py."""

from copy import deepcopy

import numpy as np
import pytest
from PIL import Image

import mmdlm
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.toy import Toy
from mmdlm.tasks.act import Policy

SOUND = (np.sin(np.arange(12_000) / 20).astype("float32"), 16_000)


@pytest.fixture(scope="module")
def tiny() -> MultimodalDLM:
    return mmdlm.load("tiny", device="cpu", pack=False)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    red, tall = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (30, 90), "blue")
    red.paste("red", (10, 10, 40, 40))
    return [red, tall]


def ask(name: str, model: MultimodalDLM, images: list[Image.Image]) -> object:
    if name == "caption":
        return mmdlm.caption(model, images)
    if name == "answer":
        return mmdlm.answer(model, "how many shapes are there", image=images)
    if name == "transcribe":
        return mmdlm.transcribe(model, [SOUND, (SOUND[0][:5_000], 16_000)])
    if name == "infill":
        return mmdlm.infill(model, "a [MASK] square", image=images[0])
    if name == "details":
        return [a.tokens for a in mmdlm.caption(model, images, details=True)]
    return mmdlm.embed(model, image=images).tolist()


@pytest.mark.parametrize("name", ["caption", "answer", "transcribe", "infill", "details", "embed"])
def test_tasks_on_a_fake_gpu_do_not_mix_devices(name: str, tiny, images, pretend) -> None:
    want = ask(name, tiny, images)
    moved = deepcopy(tiny)
    with pretend(moved) as mode:
        got = ask(name, moved, images)
    assert got == want
    assert not mode.mixed


def test_policy_on_a_fake_gpu_does_not_mix_devices(build, pretend) -> None:
    model = build()
    obs = [Toy().reset(seed) for seed in (0, 1)]
    want = [one["actions"] for one in Policy(model).infer_batch(obs)]
    moved = deepcopy(model)
    with pretend(moved) as mode:
        got = [one["actions"] for one in Policy(moved).infer_batch(obs)]
    assert np.array_equal(got, want)
    assert not mode.mixed
