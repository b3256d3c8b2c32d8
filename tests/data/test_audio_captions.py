"""Clotho and AudioCaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mmdlm
from mmdlm.data.audio_captions import AudioCaps, Clotho
from mmdlm.data.formats import open_data

CLOTHO = (
    "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    'a b.wav,"Rain, then wind",It rains,Rain falls,Water drips,Drops fall\n'
    "c.wav,One,Two,Three,Four,\n"
)
AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n" + "".join(
    f"{i},vf_T-q{i % 2},{30 * (i % 2)},caption {i}\n" for i in range(4)
)


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def clip(data, index: int) -> Path:
    rng = np.random.default_rng(0)
    return data.sample(index, rng).conversations[0][0].parts[0].item


def test_clotho_draws_one_of_five_captions(tmp_path: Path) -> None:
    clip_file = touched(tmp_path / "evaluation" / "a b.wav")
    path = tmp_path / "clotho_captions_evaluation.csv"
    path.write_text(CLOTHO)
    data = open_data(path, length=4)
    assert isinstance(data, Clotho)
    assert clip(data, 0) == clip_file
    drawn = [data.sample(0, np.random.default_rng(i)).turns[0].answer for i in range(60)]
    assert data.rows[0]["answers"][0] == "Rain, then wind"
    assert set(drawn) == set(data.rows[0]["answers"])
    assert drawn[:5] == [data.sample(0, np.random.default_rng(i)).turns[0].answer for i in range(5)]
    assert data.rows[1]["answers"] == ["One", "Two", "Three", "Four"]


def test_clips_are_described_and_not_transcribed(tmp_path: Path) -> None:
    touched(tmp_path / "val" / "3.wav")
    (tmp_path / "val.csv").write_text(AUDIOCAPS)
    (tmp_path / "x.csv").write_text(CLOTHO)
    processor = mmdlm.load("tiny").processor
    for name in ("val.csv", "x.csv"):
        data = open_data(tmp_path / name, length=4).connect(processor)
        assert data.instructions == {"audio": "Describe the audio."}


def test_clotho_names_the_line_without_caption(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("file_name,caption_1\na.wav,Rain\nb.wav, \n")
    with pytest.raises(ValueError, match="x.csv, line 3 has no caption"):
        open_data(path, clips=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["vf_T-q1_30", "Yvf_T-q1", "vf_T-q1_30000_40000", "Yvf_T-q1_30000_40000", "vf_T-q1", "3"],
)
def test_audiocaps_clips_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    wanted = touched(tmp_path / "val" / "part" / f"{name}.flac")
    path = tmp_path / "val.csv"
    path.write_text(AUDIOCAPS)
    data = open_data(path, length=4)
    assert isinstance(data, AudioCaps)
    assert clip(data, 1) == wanted
    assert [row["answers"] for row in data.rows] == [
        ["caption 0", "caption 2"],
        ["caption 1", "caption 3"],
    ]


def test_audiocaps_clips_may_have_other_names_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(AUDIOCAPS)
    wanted = touched(tmp_path / "elsewhere" / "clip-30-vf_T-q1.mp3")
    with pytest.raises(FileNotFoundError, match="holds no clip such as vf_T-q1_30.wav; give"):
        open_data(path, clips=tmp_path / "elsewhere")
    data = open_data(path, clips=tmp_path / "elsewhere", name="clip-{start_time}-{youtube_id}.mp3")
    assert clip(data, 1) == wanted
    assert (
        clip(data, 0) == tmp_path / "elsewhere" / "clip-0-vf_T-q0.wav"
    )  # reported when it is read


@pytest.mark.parametrize("options", [{"name": "{nothing}"}, {}])
def test_audiocaps_errors_name_the_line(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "x.csv"
    start = "soon" if not options else "3"
    path.write_text(f"audiocap_id,youtube_id,start_time,caption\n1,q,{start},Rain\n")
    with pytest.raises(ValueError, match="x.csv, line 2: .*the columns are audiocap_id"):
        open_data(path, clips=tmp_path, **options)
