"""Action bins against the published tokenizer, round trips and invalid input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.action_bins import ActionBins

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "action" / "action_tokenizer.json").read_text()
)
NAMES = ["dream_len151923", "llama_vocab32000"]


def published(name: str) -> ActionBins:
    return ActionBins(last_id=GOLDEN[name]["vocab"] - 1)


@pytest.mark.parametrize("name", NAMES)
def test_bins_encode_as_published(name):
    probe = np.array(GOLDEN["probe"])
    assert published(name).encode(probe[:, None]).tolist() == GOLDEN[name]["ids"]


@pytest.mark.parametrize("name", NAMES)
def test_bins_decode_as_published(name):
    bins, table = published(name), GOLDEN[name]
    for ids, values in [("ids", "decoded"), ("all_ids", "all_decoded")]:
        ids, values = np.array(table[ids]), np.array(table[values])
        decoded = bins.decode(ids, len(ids), 1)
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded[:, 0], values.astype(np.float32))
    np.testing.assert_allclose(bins.centers, np.unique(table["all_decoded"]), rtol=0, atol=1e-12)


def test_bins_give_the_columns_of_dream_and_openvla():
    dream, openvla = (published(name).ids for name in NAMES)
    assert (dream.start, dream[-1], len(dream)) == (151667, 151922, 256)
    assert (openvla.start, openvla[-1]) == (31744, 31999)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("last_id", [None, 700])
def test_round_trip_is_within_half_a_bin(reverse, last_id):
    bins = ActionBins(64, -2.0, 3.0, last_id=last_id, reverse=reverse)
    values = torch.empty(5, 8, 4).uniform_(-2, 3, generator=torch.Generator().manual_seed(0))
    ids = bins.encode(values)
    assert ids.shape == (5, 32)
    assert ids.dtype == torch.int64
    assert bins.ids.start <= ids.min()
    assert ids.max() < bins.ids.stop
    back = bins.decode(ids, 8, 4, strict=True)
    assert back.dtype == torch.float32
    assert (back - values).abs().max() <= 5 / 63 / 2 + 1e-6
    assert torch.equal(bins.decode(bins.encode(back), 8, 4), back)  # centres stay where they are


def test_increasing_ids_mirror_decreasing_ids():
    values = torch.linspace(-1, 1, 40).reshape(1, 10, 4)
    falling, rising = ActionBins().encode(values), ActionBins(reverse=False).encode(values)
    assert torch.equal(falling, 255 - rising)
    assert bool((rising.diff() >= 0).all())


def test_numpy_and_torch_agree_and_keep_their_kind():
    values = np.random.default_rng(0).uniform(-1.3, 1.3, (2, 3, 4, 5))
    bins = ActionBins(last_id=31999)
    ids = bins.encode(values)
    assert isinstance(ids, np.ndarray)
    assert ids.shape == (2, 3, 20)
    assert torch.equal(bins.encode(torch.tensor(values)), torch.tensor(ids))
    decoded = bins.decode(ids, 4, 5)
    assert isinstance(decoded, np.ndarray)
    assert torch.equal(bins.decode(torch.tensor(ids), 4, 5), torch.tensor(decoded))


def test_values_beyond_the_limits_are_clipped():
    bins = ActionBins()
    ids = bins.encode(torch.tensor([[-5.0, 5.0]]))
    assert ids.tolist() == [255, 0]


def test_ids_that_are_not_actions_are_clipped_or_raise_if_strict():
    bins = ActionBins(last_id=999)
    ids = torch.tensor([0, 743, 1000, 5000])
    assert bins.decode(ids, 4, 1).flatten().tolist() == pytest.approx(
        [0.9960784] * 2 + [-0.9960784] * 2
    )
    with pytest.raises(ValueError, match="4 ids are not actions.*744 to 999"):
        bins.decode(ids, 4, 1, strict=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_rejected(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        ActionBins().encode(torch.tensor([[0.0, bad]]))


def test_wrong_shapes_and_settings_are_rejected():
    bins = ActionBins()
    with pytest.raises(ValueError, match=r"\[7\].*\[\.\.\. 8\]"):
        bins.decode(torch.zeros(7, dtype=torch.int64), 4, 2)
    with pytest.raises(ValueError, match="float32"):
        bins.decode(torch.zeros(8), 4, 2)
    with pytest.raises(ValueError, match=r"\[\.\.\. K A\]"):
        bins.encode(torch.zeros(8))
    with pytest.raises(ValueError, match="low < high"):
        ActionBins(low=1, high=-1)
    with pytest.raises(ValueError, match="expected at least bins - 1"):
        ActionBins(last_id=100)
