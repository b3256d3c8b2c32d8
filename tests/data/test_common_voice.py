"""Common Voice's TSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmdlm.data.common_voice import CommonVoice
from mmdlm.data.formats import open_data

HEADER = ("client_id", "path", "sentence", "up_votes", "accents")


def write(path: Path, *rows: tuple[str, ...]) -> Path:
    path.write_text("\n".join("\t".join(row) for row in (HEADER, *rows)) + "\n", encoding="utf-8")
    return path


def test_sentences_with_lone_quotation_marks_stay_whole(tmp_path: Path) -> None:
    rows = [("a", "x.mp3", '"No, he said.', "2", ""), ("b", "y.mp3", "Grüße", "1", "Bavarian")]
    data = open_data(write(tmp_path / "train.tsv", *rows), length=4)
    assert isinstance(data, CommonVoice)
    examples = [data.sample(i, np.random.default_rng(0)) for i in range(2)]
    assert [one.turns[0].answer for one in examples] == ['"No, he said.', "Grüße"]
    assert [one.group for one in examples] == ["", "Bavarian"]
    assert examples[1].conversations[0][0].parts[0].item == tmp_path / "clips" / "y.mp3"


def test_clips_may_be_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.tsv", ("a", "x.mp3", "Yes.", "2", ""))
    example = open_data(path, clips=tmp_path / "wav", length=4).sample(0, np.random.default_rng(0))
    assert example.conversations[0][0].parts[0].item == tmp_path / "wav" / "x.mp3"


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", ("a", "x.mp3", "Yes.", "2", ""), ("b", "y.mp3"))
    with pytest.raises(ValueError, match="test.tsv, line 3 has another number of columns"):
        open_data(path)
