"""Two data workers deliver at least 1.5 times the samples of none."""

import pytest

import mmdlm
from mmdlm.data.scenes import Scenes
from mmdlm.training.steps import Steps
from tests.speed.workers import speedup


@pytest.mark.slow
def test_two_workers_deliver_more_than_none():
    model = mmdlm.load("tiny")
    steps = Steps(model.processor, {"scenes": Scenes()}, {"scenes": 32}, seed=0)
    steps[0]  # the first batch also loads fonts and vocabularies
    assert speedup(steps) >= 1.5
