"""Recorded driving: rows that training reads, labels, mirrored scenes."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.sim
pytest.importorskip("highway_env", reason='pip install "mmdlm[sim]"')

from mmdlm.data.formats import open_data  # noqa: E402
from mmdlm.simulators.demonstrations import (  # noqa: E402
    critical_objects,
    make,
    mirrored,
    plan,
    scenes,
)
from mmdlm.simulators.highway import Future, Highway, Neighbour  # noqa: E402
from mmdlm.tasks.drive import CAMERAS, SCHEMA, prompt  # noqa: E402


class Seen:
    """What the labels depend on."""

    speed = 25.0

    def __init__(self, *others: tuple[float, int, float]) -> None:
        self.others = [Neighbour(*other) for other in others]

    def neighbours(self) -> list[Neighbour]:
        return self.others


@pytest.fixture(scope="module")
def recorded():
    """Scenes of one episode."""
    with Highway(size=32, vehicles=8, horizon=24, cameras=CAMERAS) as road:
        yield list(scenes(road, 1003))


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ((30.0, 0, 25.0), {"front_vehicle"}),
        ((30.0, 0, 19.0), {"front_vehicle", "conflicting_vehicle"}),
        ((60.0, 0, 10.0), {"conflicting_vehicle"}),
        ((60.0, 0, 25.0), set()),
        ((-15.0, 0, 30.0), {"rear_vehicle"}),
        ((-25.0, 0, 30.0), set()),
        ((10.0, -1, 20.0), {"left_vehicle"}),
        ((-10.0, 1, 20.0), {"right_vehicle"}),
        ((10.0, 2, 20.0), set()),
    ],
)
def test_critical_objects_are_those_nearby(other, found):
    labels = critical_objects(Seen(other))
    assert {name for name, is_there in labels.items() if is_there} == found


@pytest.mark.parametrize(
    ("speed", "lane", "behavior", "said"),
    [
        (26.0, 0, ("accelerate", "straight"), "the lane is free, speed up"),
        (25.2, -1, ("cruise", "left"), "the lane is free, keep the speed; the left lane is faster"),
        (23.0, 1, ("decelerate", "right"), "slow down early for the vehicle ahead; the right"),
        (22.0, 0, ("brake", "straight"), "brake early for the vehicle ahead"),
    ],
)
def test_behavior_is_what_the_driver_will_do(speed, lane, behavior, said):
    points = np.array([[25.04, -0.01], [50.0, 0.0]])
    label = plan(Seen(), Future(points, np.array([speed, speed]), lane, False))
    assert tuple(label["future_meta_behavior"].values()) == behavior
    assert label["explanation"].startswith(said)
    assert json.dumps(label["trajectory"]) == "[[25.0, 0.0], [50.0, 0.0]]"


def test_mirrored_scene_exchanges_left_and_right(recorded):
    scene = max(recorded, key=lambda one: abs(one.plan["trajectory"][-1][1]))
    other = mirrored(scene)
    assert np.array_equal(other.images[0], scene.images[2][:, ::-1])
    assert other.plan["trajectory"][-1] == [
        scene.plan["trajectory"][-1][0],
        -scene.plan["trajectory"][-1][1],
    ]
    objects, swapped = scene.plan["critical_objects"], other.plan["critical_objects"]
    assert objects["left_vehicle"] == swapped["right_vehicle"]
    again = mirrored(other)
    assert again.plan == scene.plan
    assert prompt(again.history) == prompt(scene.history)
    assert all(np.array_equal(a, b) for a, b in zip(again.images, scene.images, strict=True))


def test_scenes_depend_on_the_seed_only(recorded):
    with Highway(size=32, vehicles=8, horizon=24, cameras=CAMERAS) as road:
        list(scenes(road, 1001))
        again = list(scenes(road, 1003))
    assert [one.plan for one in again] == [one.plan for one in recorded]
    assert len(recorded) > 4


def test_rows_are_read_by_training(tmp_path):
    out, counts = tmp_path / "driving", []
    said = make(out, 5, size=16, horizon=8, on_rows=counts.append)
    assert len(counts) > 1  # an episode to train on, one held out
    assert counts[-1] >= 5
    assert counts == sorted(counts)
    sizes = [len(json.loads((out / f"{name}.json").read_text())) for name in ("train", "val")]
    assert said == f"{out}: {sizes[0]} rows to train on, {sizes[1]} held out"
    assert sum(sizes) == counts[-1]
    for name in ("train", "val"):
        data = open_data(out / f"{name}.json")
        example = data.sample(0, np.random.default_rng(0))
        images = [part.item for part in example.branches[0][0].parts[:3]]
        assert [Image.open(path).size for path in images] == [(16, 16)] * 3
        assert [path.stem.rpartition("_")[2] for path in images] == ["left", "image", "right"]
        (turn,) = example.turns
        assert turn.prompt.startswith("Drive the yellow car.")
        assert list(json.loads(turn.answer)) == list(SCHEMA["properties"])
    assert json.loads((out / "schema.json").read_text()) == SCHEMA
    with pytest.raises(ValueError, match="not empty"):
        make(out, 4)
    with pytest.raises(ValueError, match="count is 0"):
        make(tmp_path / "other", 0)
