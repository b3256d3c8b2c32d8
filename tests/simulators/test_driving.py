"""The closed loop: the same seeds for every driver, collisions, speeds, videos."""

import json
import re

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("highway_env", reason='pip install "mmdlm[sim]"')

from mmdlm.checkpoint import save  # noqa: E402
from mmdlm.commands.main import main  # noqa: E402
from mmdlm.simulators import driving  # noqa: E402
from mmdlm.simulators.driving import Constant, Drive, Planner, Result, Rules, drive, run  # noqa: E402
from mmdlm.tasks.drive import LATERAL, OBJECTS, Plan  # noqa: E402


class Recorded(Planner):
    """Plans of fixed text in place of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(None, follow="trajectory")
        self.asked: list[list[str]] = []
        monkeypatch.setattr(driving, "plan", self.plan)

    def plan(self, model, scenes, **options):
        self.asked.append([text for _, text in scenes])
        assert all(len(images) == 3 for images, _ in scenes)
        assert options["batch_size"] == len(scenes)
        speeds = [float(re.findall(r"v ([\d.]+)", text)[-1]) for _, text in scenes]
        return [planned(speed, -6.0) for speed in speeds]


def planned(speed: float, acceleration: float, lateral: str = "straight") -> Plan:
    points = [[speed * t + acceleration * t * t / 2, 0.0] for t in range(1, 6)]
    behavior = {"longitudinal": "decelerate", "lateral": lateral}
    assert lateral in LATERAL
    value = {"explanation": "slow down", "future_meta_behavior": behavior, "trajectory": points}
    return Plan(value, dict.fromkeys(OBJECTS, 0.5), None)


def test_drivers_get_the_same_seeds_and_constant_speed_collides():
    rules = run(Rules(), [0, 1], size=16, horizon=40)
    constant = run(Constant(), [0, 1], size=16, horizon=40)
    assert [one.seed for one in rules.drives] == [one.seed for one in constant.drives] == [0, 1]
    assert (rules.collisions, constant.collisions) == (0, 2)
    assert all(one.seconds == 20 for one in rules.drives)
    assert all(one.seconds < 20 for one in constant.drives)
    assert constant.speed == pytest.approx(25, abs=0.1)
    assert rules.speed < constant.speed
    assert rules.plan_ms == constant.plan_ms == 0
    again = run(Rules(), [1], size=16, horizon=40)
    assert again.drives[0] == rules.drives[1]


def test_plans_are_batched_and_obeyed(monkeypatch):
    driver = Recorded(monkeypatch)
    result = run(driver, [0, 1, 2], size=16, horizon=4)
    assert [len(texts) for texts in driver.asked] == [3] * 4
    assert driver.plans == 12
    assert result.plan_ms > 0
    assert "t-0.0 [0, 0.0] v 25.0" in driver.asked[0][0]
    last = [float(re.findall(r"v ([\d.]+)", text)[-1]) for text in driver.asked[-1]]
    assert last == pytest.approx([25 - 3 * 3.0] * 3, abs=0.3)  # 6 m/s2 for 1.5 s


def test_finished_cars_leave_the_batch(monkeypatch):
    driver = Recorded(monkeypatch)
    monkeypatch.setattr(
        driver, "plan", lambda model, scenes, **o: [planned(25.0, 0.0) for _ in scenes]
    )
    monkeypatch.setattr(driving, "plan", driver.plan)
    sizes = []
    act = driver.act
    monkeypatch.setattr(
        driver, "act", lambda cars, seen: sizes.append(len(cars)) or act(cars, seen)
    )
    result = run(driver, [0, 1, 2], size=16, horizon=60)
    assert result.collisions == 3
    assert sizes[0] == 3
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == sum(round(one.seconds * 2) for one in result.drives)


def test_result_is_printed_with_its_interval():
    drives = (Drive(0, True, 20.0, 3.0), Drive(1, False, 22.0, 30.0))
    result = Result("policy", drives, 12.3)
    assert str(result).startswith("policy: collisions 1/2 = 50 % [9, 91], mean speed 21.0 m/s, 12")
    assert result.to_dict()["drives"][0] == {
        "seed": 0,
        "collided": True,
        "speed": 20.0,
        "seconds": 3.0,
    }


@pytest.mark.filterwarnings("ignore:values were changed")
def test_command_compares_drivers_and_writes_results_and_videos(speller, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg", reason='pip install "mmdlm[sim]"')
    from adapters.pixel_shuffle import PixelShuffle
    from encoders.vit import ViT
    from mmdlm.model import MultimodalDLM

    text = speller()
    encoders = {"image": ViT(size=32, patch=8, dim=16, depth=1, heads=2)}
    adapters = {"image": PixelShuffle(16, 16, factor=2, layers=1)}
    model = MultimodalDLM(text.spec, encoders, adapters, text.tokenizer).eval()
    model.backbone.load_state_dict(text.backbone.state_dict())
    save(model, tmp_path / "model")
    words = ["drive", "--model", str(tmp_path / "model"), "--episodes", "2", "--horizon", "2"]
    words += ["--decoding", "one_step", "--out", str(tmp_path / "out.json")]
    assert main([*words, "--video", str(tmp_path / "films"), "--seed", "7"]) == 0
    said = capsys.readouterr().out
    for name in ("policy", "rule-based", "constant speed"):
        assert f"{name}: collisions " in said
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in found["results"]] == ["policy", "rule-based", "constant speed"]
    assert [d["seed"] for one in found["results"] for d in one["drives"]] == [7, 8] * 3
    assert found["settings"]["versions"]["highway-env"].startswith("1.1")
    films = sorted(path.name for path in (tmp_path / "films").glob("*.mp4"))
    assert films == ["constant-speed-seed7.mp4", "policy-seed7.mp4", "rule-based-seed7.mp4"]


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="episodes is 0"):
        drive("tiny", episodes=0)
    with pytest.raises(ValueError, match="no seeds"):
        run(Rules(), [])
    assert np.array_equal(Constant().act([None], [{}])[0][0], np.zeros(2))
