"""`mmdlm data formats | check`, and the check before a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdlm.commands.main import main
from mmdlm.commands.own_data import different, histogram, options
from mmdlm.data.chat import Chat
from mmdlm.data.split import Split


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), (200, 10, 10)).save(tmp_path / "a.png")
    return tmp_path


def row(image: str = "a.png", answer: str = "a red circle") -> dict[str, Any]:
    return {"image": image, "question": "what is red", "answer": answer}


def write(name: str, *rows: Any) -> Path:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return Path(name)


def test_formats_lists_each_with_a_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "formats"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("Chat", "WebDataset", "Episodes", "LibriSpeech"))
    assert "Conversations, one per row." in said


@pytest.mark.parametrize("name", ["Table", "table", "Episodes", "COCOCaptions"])
def test_a_format_is_explained(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "formats", name]) == 0
    said = capsys.readouterr().out
    assert "needed" in said
    assert "Example:" in said
    assert "see `Conversations`" not in said


def test_an_unknown_format_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "formats", "Tables"]) == 2
    assert "'Tables'; known: AudioCaps" in capsys.readouterr().err


def test_a_good_file_passes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write("x.jsonl", row(), row(answer="a blue cat"))
    assert main(["data", "check", "x.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "grows by 1 words: cat" in said
    assert "4 tokens" in said
    assert "none" in said


def test_every_problem_is_listed_in_the_order_of_the_lines(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [row() for _ in range(12)]
    rows[1], rows[9], rows[10] = row("gone.png"), {"question": 3}, row(answer=" ")
    write("x.jsonl", *rows)
    assert main(["data", "check", "x.jsonl", "--length", "2"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("x.jsonl,")]
    assert lines[1].startswith("x.jsonl, line 2: answer too long:")
    assert lines[2].startswith("x.jsonl, line 2: missing file:")
    places = [line.split(":")[0] for line in lines]
    assert places == sorted(places, key=lambda place: int(place.split()[-1]))
    assert len(lines) == 13
    assert "'question': 3" not in lines[0]


def test_columns_are_named_with_options(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write("x.jsonl", {"label": "a circle", "picture": "a.png"})
    assert main(["data", "check", "x.jsonl"]) == 1
    assert "no known format" in capsys.readouterr().out
    given = ["--option", "answer=label", "--option", "image=picture"]
    assert main(["data", "check", "x.jsonl", *given]) == 0
    assert options(["seed=3", "a=b=c"]) == {"seed": 3, "a": "b=c"}
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        options(["seed"])


def test_robot_data_are_checked(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')
    from mmdlm.data.lerobot_writer import Writer

    with Writer("robot", {"action": (2,)}, fps=10) as writer:
        writer.add_episode("push", {"action": np.zeros((5, 2), np.float32)})
        writer.add_episode("push", {"action": np.zeros((1, 2), np.float32)})
    assert main(["data", "check", "robot", "--option", "state=''"]) == 1
    said = capsys.readouterr().out
    assert "robot, episode 1: episode too short: it has 1 frames" in said


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1, 2], ["1 2", "2 1"]),
        ([5], ["5 1"]),
        ([1, 100], ["1-13 1", "92-104 1"]),
    ],
)
def test_histogram(lengths: list[int], expected: list[str]) -> None:
    lines = [line.replace("█", "").split() for line in histogram(lengths)]
    shown = [" ".join(line) for line in lines if line[-1] != "0"]
    assert shown == expected


def test_shares_of_one_file_are_checked_once(folder: Path) -> None:
    write("x.jsonl", *[row()] * 4)
    write("y.jsonl", *[row()] * 4)
    shares = [Split(Chat(Path("x.jsonl")), part) for part in ("train", "held_out")]
    assert len(different([*shares, Chat(Path("y.jsonl"))])) == 2


def fit(path: str, *more: str) -> int:
    given = ["--source", "tiny", "--data", path, "--steps", "1", "--batch-size", "2"]
    return main(["fit", "-c", "finetune/full", *given, "--out", "run", *more])


def test_training_stops_before_its_first_step_and_lists_all(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [row() for _ in range(20)]
    rows[6], rows[16] = row("gone.png"), {"question": "what"}
    write("x.jsonl", *rows)
    with pytest.raises(SystemExit) as end:
        fit("x.jsonl")
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.count("x.jsonl, line") == 2
    assert "x.jsonl, line 7: missing file" in said
    assert "x.jsonl, line 17: not valid" in said
    assert "nothing was trained" in said
    assert not Path("run").exists()


def test_training_goes_on_if_told_so(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write("x.jsonl", *[row() for _ in range(11)], row("gone.png"))
    with pytest.raises(SystemExit):
        fit("x.jsonl", "--check=all")
    assert "line 12: missing file" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save("gone.png")
    assert fit("x.jsonl", "--check=texts") == 0
    assert "missing" not in capsys.readouterr().err


def test_memory_is_estimated_and_nothing_is_trained(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    write("x.jsonl", *[row() for _ in range(11)])
    with pytest.raises(SystemExit) as end:
        fit("x.jsonl", "--estimate")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(
        text in said for text in ("peak per device", "full", "LoRA, rank 16", "LoRA on 8 bits")
    )
    assert "Batch of 2 rows" in said
    assert not Path("run").exists()
