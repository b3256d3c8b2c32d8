"""The normaliser against the published numbers, its inverse, and statistics that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.normalize import Normalizer, choose

GOLDEN = Path(__file__).parents[1] / "golden" / "action"
MODES = {"normal": "zscore", "bounds": "bounds", "bounds_q99": "quantile"}


def toy(feature: str) -> dict:
    return choose(
        json.loads((GOLDEN / "dataset_statistics.json").read_text()), feature, "libero_toy"
    )


@pytest.mark.parametrize("published", list(MODES))
@pytest.mark.parametrize("feature", ["action", "proprio"])
def test_training_normalisation_as_published(published, feature):
    golden = json.loads((GOLDEN / "train_normalisation.json").read_text())
    x = torch.tensor(golden[f"{feature}_in"], dtype=torch.float64)
    expected = torch.tensor(golden["out"][published][feature], dtype=torch.float64)
    got = Normalizer(toy(feature), MODES[published]).normalize(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_unnormalised_actions_and_proprio_as_published():
    io = load_file(GOLDEN / "action_io.safetensors")
    back = Normalizer(toy("action")).unnormalize(io["unnorm.in"])
    torch.testing.assert_close(back, io["unnorm.out"], rtol=0, atol=1e-9)
    state = Normalizer(toy("proprio"), zero_constant=False).normalize(io["proprio.in"])
    torch.testing.assert_close(state, io["proprio.out"], rtol=0, atol=1e-9)
    single = Normalizer(toy("action")).unnormalize(io["unnorm.in"].float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, io["unnorm.out"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["quantile", "bounds", "zscore", "identity"])
def test_inverse_is_exact_inside_the_bounds(mode):
    statistics = toy("proprio")
    low, high = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("q01", "q99"))
    x = low + (high - low) * torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0))
    normalizer = Normalizer(statistics, mode)
    y = normalizer.normalize(x)
    torch.testing.assert_close(normalizer.unnormalize(y), x, rtol=0, atol=1e-12)
    if mode != "zscore" and mode != "identity":
        assert y.abs().max() <= 1


def test_gripper_passes_unchanged_and_still_dimensions_become_zero():
    x = torch.full((2, 7), 9.0)
    y = Normalizer(toy("action")).normalize(x)
    assert y[:, 6].tolist() == [9.0, 9.0]
    assert y[:, 4].tolist() == [0.0, 0.0]
    assert y[:, 0].tolist() == [1.0, 1.0]
    assert Normalizer(toy("action"), zero_constant=False).normalize(x)[0, 4] == 1.0
    everything = Normalizer(toy("action"), mask=[True] * 7).normalize(x)
    assert everything[0, 6] == 1.0


def test_statistics_travel_through_json():
    made = Normalizer(toy("action"), "bounds", zero_constant=False)
    again = Normalizer.from_dict(json.loads(json.dumps(made.to_dict())))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.normalize(x), made.normalize(x))
    assert again.to_dict() == made.to_dict()


def test_missing_statistics_are_named():
    with pytest.raises(KeyError, match=r"quantile.*q01.*hold \['max', 'min'\]"):
        Normalizer({"min": [0.0], "max": [1.0]})
    with pytest.raises(KeyError, match="mode.*statistics"):
        Normalizer.from_dict({"action": {}})
    with pytest.raises(ValueError, match="'q99'.*expected one of"):
        Normalizer({}, mode="q99")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 8\].*7 dimensions"):
        Normalizer(toy("action")).normalize(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="7 dimensions"):
        Normalizer(toy("action")).unnormalize(torch.zeros(1))
    with pytest.raises(ValueError, match="one common size"):
        Normalizer({"q01": [0.0, 0.0], "q99": [1.0]})
    with pytest.raises(ValueError, match="NaN"):
        Normalizer({"q01": [float("nan")], "q99": [1.0]})


def test_integers_become_float32():
    y = Normalizer({"min": [0.0], "max": [4.0]}, "bounds").normalize(torch.tensor([[1], [4]]))
    assert y.dtype == torch.float32
    assert y.flatten().tolist() == pytest.approx([-0.5, 1.0])


def test_choosing_statistics_names_what_exists():
    file = json.loads((GOLDEN / "dataset_statistics.json").read_text())
    assert choose(file, "action") is file["libero_toy_no_noops"]["action"]
    with pytest.raises(KeyError, match="'bridge'.*libero_toy_no_noops"):
        choose(file, "action", "bridge")
    with pytest.raises(KeyError, match="'state'.*proprio"):
        choose(file, "state")
    with pytest.raises(KeyError, match="choose one of them"):
        choose({**file, "other": {}}, "action")
