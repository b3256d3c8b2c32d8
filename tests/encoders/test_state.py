"""StateEncoder: shapes, checks of the state vector, independence of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoders.arguments import Recorded
from encoders.features import Prepared
from encoders.state import StateEncoder
from mmdlm.blueprint import PARTS
from mmdlm.recipe import build, recipe


def test_state_gives_its_tokens_all_real_and_learns():
    encoder = StateEncoder(39, dim=24, tokens=3, hidden=8)
    features = encoder([encoder.prepare(np.zeros(39)), encoder.prepare([1.0] * 39)])
    assert features.tokens.shape == (2, 3, 24)
    assert features.mask.all()
    assert features.grid is None
    assert (encoder.kind, encoder.dim) == ("state", 24)
    features.tokens.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


def test_state_row_alone_equals_row_in_batch():
    encoder = StateEncoder.tiny()
    states = [encoder.prepare(StateEncoder.example(seed)) for seed in range(5)]
    batch = encoder(states).tokens
    for index, state in enumerate(states):
        torch.testing.assert_close(encoder([state]).tokens[0], batch[index])


def test_a_state_without_perceptron_is_its_own_token():
    encoder = StateEncoder(4, dim=None)
    states = [encoder.prepare(StateEncoder.example(seed)) for seed in range(2)]
    features = encoder(states)
    assert torch.equal(features.tokens[:, 0], torch.stack([state.tensor for state in states]))
    assert features.mask.all()
    assert encoder.dim == 4
    assert not list(encoder.parameters())
    assert build(recipe(encoder), PARTS, Recorded)(states).tokens.equal(features.tokens)
    with pytest.raises(ValueError, match="tokens=2 with dim=None"):
        StateEncoder(4, dim=None, tokens=2)


def test_state_prepare_takes_arrays_lists_and_tensors():
    encoder = StateEncoder.tiny()
    for item in ([1, 2, 3, 4], np.array([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4])):
        state = encoder.prepare(item).tensor
        assert state.dtype == torch.float32
        assert state.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1.0, 2.0], r"state is \[2\], expected \[4\]"),
        (np.zeros((1, 4)), r"state is \[1, 4\], expected \[4\]"),
        ([0, float("nan"), 0, float("inf")], r"not finite at \[1, 3\]"),
        (["a", "b", "c", "d"], "expected numbers"),
    ],
)
def test_unusable_states_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        StateEncoder.tiny().prepare(item)


def test_state_forward_names_the_row_that_does_not_fit():
    with pytest.raises(ValueError, match=r"state 1 is \[3\], expected \[4\]"):
        StateEncoder.tiny()([Prepared("state", torch.zeros(n)) for n in (4, 3)])
    with pytest.raises(ValueError, match="no states"):
        StateEncoder.tiny()([])


def test_state_sizes_are_checked():
    with pytest.raises(ValueError, match="tokens is 0"):
        StateEncoder(4, tokens=0)
