"""The check of a robot data set: every problem of every episode."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')
import pyarrow.parquet as pq  # noqa: E402

from mmdlm.data.check_robot import check_robot  # noqa: E402
from mmdlm.data.lerobot import LeRobot  # noqa: E402
from mmdlm.data.lerobot_writer import Writer  # noqa: E402

IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
GOLDEN = Path(__file__).parents[1] / "golden" / "lerobot" / "v3_video"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "robot"
    with Writer(folder, {IMAGE: (16, 16, 3), STATE: (2,), ACTION: (2,)}, fps=10) as writer:
        for length, task in ((12, "push"), (3, "push"), (20, " "), (12, "push")):
            frames = {
                IMAGE: rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8),
                STATE: rng.random((length, 2), np.float32),
                ACTION: rng.random((length, 2), np.float32),
            }
            writer.add_episode(task, frames)
    return folder


def damaged(root: Path, **columns: dict[int, object]) -> Path:
    """The data set with other values at some frames."""
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    for name, cells in columns.items():
        key = name.replace("__", ".")
        values = table.column(key).to_pylist()
        for at, value in cells.items():
            values[at] = value
        at = table.column_names.index(key)
        table = table.set_column(at, table.field(key), pa.array(values, table.field(key).type))
    pq.write_table(table, path)
    return root


def listed(problems: list) -> list[tuple[str, str]]:
    return [(one.place.rpartition(", ")[2], one.kind) for one in problems]


def test_episodes_too_short_and_without_instruction(root: Path) -> None:
    found = check_robot([root])
    assert listed(found.problems) == [("episode 2", "no instruction")]
    assert (found.rows, found.media, found.opened) == (47, {"image": 47}, 47)
    with Writer(root.parent / "one", {STATE: (2,), ACTION: (2,)}, fps=10) as writer:
        writer.add_episode("push", dict.fromkeys((STATE, ACTION), np.ones((1, 2), np.float32)))
    short = check_robot([root.parent / "one"])
    assert listed(short.problems) == [("episode 0", "episode too short")]


def test_numbers_that_are_none_and_jumps_of_the_clock(root: Path) -> None:
    nan = [float("nan"), 0.0]
    actions = dict.fromkeys((16, 18, 19), nan)
    times = {i: 5.0 + i / 10 for i in range(40, 47)}
    damaged(root, action=actions, observation__state={36: [0.0, np.inf]}, timestamp=times)
    found = check_robot([root], media=False)
    assert listed(found.problems) == [
        ("episode 2", "not a number"),
        ("episode 2", "no instruction"),
        ("episode 3", "not a number"),
        ("episode 3", "clock jump"),
    ]
    assert "action is NaN or infinite at frames 1, 3, 4" in found.problems[0].text
    assert "observation.state is NaN or infinite at frame 1" in found.problems[2].text
    assert "frame 5 is 8.6 s, expected 0.1 s" in found.problems[3].text
    assert found.opened == 0


def test_images_that_are_damaged(root: Path) -> None:
    damaged(root, observation__image={13: {"bytes": b"no image", "path": None}})
    found = check_robot([root])
    assert listed(found.problems) == [
        ("episode 2", "no instruction"),
        ("episode 1", "unreadable image"),
    ]
    assert f"{IMAGE}, frame 1:" in found.problems[1].text


def test_videos_are_decoded_and_missing_ones_named(tmp_path: Path) -> None:
    pytest.importorskip("av", reason='pip install "mmdlm[data]"')
    found = check_robot([GOLDEN])
    assert found.problems == []
    assert found.opened == len(LeRobot(GOLDEN)) == 60
    copy = shutil.copytree(GOLDEN, tmp_path / "copy")
    next(copy.rglob("*.mp4")).unlink()
    found = check_robot([copy])
    assert {one.kind for one in found.problems} == {"unreadable image"}
    assert all(".mp4" in one.text for one in found.problems)


def test_a_feature_that_does_not_exist_and_a_folder_that_is_damaged(root: Path) -> None:
    found = check_robot([root], keys=("observation.other", ACTION), media=False)
    assert found.problems[0].kind == "not readable"
    assert "observation.other" in found.problems[0].text
    (root / "meta" / "info.json").write_text("{")
    assert check_robot([root]).problems[0].kind == "not valid"


def test_time_for_images_is_bounded(root: Path) -> None:
    found = check_robot([root], seconds=0)
    assert found.opened == 0
    assert "0 of 47 images were decoded in 0 s" in found.notes[0]


def test_one_number_robots_have_one_dimension(tmp_path: Path) -> None:
    with Writer(tmp_path / "one", {ACTION: (1,)}, fps=5) as writer:
        writer.add_episode("turn", {ACTION: np.zeros(9, np.float32)})
    assert check_robot([tmp_path / "one"], keys=("", ACTION)).problems == []
