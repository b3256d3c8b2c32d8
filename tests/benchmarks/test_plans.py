"""Plans against recorded ones."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdlm.benchmarks import plans as module
from mmdlm.benchmarks.plans import agreement
from mmdlm.commands.main import main
from mmdlm.tasks.drive import OBJECTS, Plan


def value(objects="no", longitudinal="cruise", lateral="straight", ahead=20.0):
    return {
        "critical_objects": dict.fromkeys(OBJECTS, objects),
        "explanation": "",
        "future_meta_behavior": {"longitudinal": longitudinal, "lateral": lateral},
        "trajectory": [[ahead * t, 0.0] for t in range(1, 6)],
    }


def planned(probability=0.2, **parts):
    objects = "yes" if probability > 0.5 else "no"
    return Plan(value(objects, **parts), dict.fromkeys(OBJECTS, probability), None)


RECORDED = [value("yes"), value("no", "brake"), value("no", lateral="left"), value("no", ahead=22)]


def test_equal_plans_agree_completely():
    plans = [
        Plan(one, dict.fromkeys(OBJECTS, float(i == 0)), None) for i, one in enumerate(RECORDED)
    ]
    found = agreement(plans, RECORDED)
    assert (found.rows, found.objects, found.longitudinal, found.lateral) == (4, 1, 1, 1)
    assert (found.roc, found.distance, found.last) == (1, 0, 0)
    assert (found.objects_constant, found.longitudinal_constant) == (0.75, 0.75)
    # Speeds are 20, 20, 20 and 22; their mean is 20.5, and waypoints are 1 to 5 s away.
    assert found.distance_constant == pytest.approx((3 * 0.5 + 1.5) / 4 * 3)


def test_shares_and_distances_are_means():
    plans = [planned(0.6), planned(0.6), planned(0.7), planned(0.1, ahead=23)]
    found = agreement(plans, RECORDED)
    assert found.objects == pytest.approx(0.5)  # "yes" is wrong twice
    assert found.roc == pytest.approx((0.5 + 0 + 1) / 3)  # a tie, one higher, one lower
    assert found.longitudinal == found.lateral == 0.75
    assert found.distance == pytest.approx(1 * 3 / 4)
    assert found.last == pytest.approx(5 / 4)
    lines = str(found).splitlines()
    assert lines[1] == "critical objects: 50.0% (75.0%), area under the ROC curve 0.500"
    assert lines[-1].startswith("waypoints: 0.75 m off")
    same = agreement(plans[:1], RECORDED[1:2])
    assert same.roc is None


def test_command_reads_recorded_plans(tmp_path, monkeypatch, capsys):
    rows = []
    for i, one in enumerate(RECORDED):
        names = [f"{i}_{k}.png" for k in range(3)]
        for name in names:
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
        question = {"from": "human", "value": "<image>\n" * 3 + f"row {i}"}
        turns = [question, {"from": "gpt", "value": json.dumps(one)}]
        rows.append({"image": names, "conversations": turns})
    (tmp_path / "val.json").write_text(json.dumps(rows))
    asked = []

    def fixed(model, scenes, **options):
        asked.extend(scenes)
        return [planned() for _ in scenes]

    monkeypatch.setattr(module, "plan", fixed)
    words = ["bench", "plans", str(tmp_path / "val.json"), "--model", "tiny", "--rows", "3"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    assert "3 plans" in capsys.readouterr().out
    assert [text for _, text in asked] == ["row 0", "row 1", "row 3"]
    assert [path.name for path in asked[1][0]] == ["1_0.png", "1_1.png", "1_2.png"]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == 3
    assert main([*words[:-1], "0"]) == 2
    assert "rows is 0" in capsys.readouterr().err
