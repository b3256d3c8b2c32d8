"""LibriSpeech's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmdlm.data.formats import open_data
from mmdlm.data.librispeech import LibriSpeech
from mmdlm.media import read_audio

RNG = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for speaker, texts in (("84", ("GO DO YOU HEAR", "BUT IN LESS")), ("1272", ("MISTER",))):
        folder = tmp_path / "dev-clean" / speaker / "9"
        folder.mkdir(parents=True)
        table = folder / f"{speaker}-9.trans.txt"
        names = [f"{speaker}-9-{i:04d}" for i in range(len(texts))]
        table.write_text("".join(f"{n} {t}\n" for n, t in zip(names, texts, strict=True)))
        for name in names:
            soundfile.write(folder / f"{name}.flac", np.full(160, 0.1), 16000)
    (tmp_path / "README.TXT").write_text("about")
    return tmp_path


def test_all_clips_below_a_folder_with_their_transcripts(root: Path) -> None:
    data = open_data(root, length=4)
    assert isinstance(data, LibriSpeech)
    examples = [data.sample(i, RNG) for i in range(len(data))]
    answers = [one.turns[0].answer for one in examples]
    assert answers == ["MISTER", "GO DO YOU HEAR", "BUT IN LESS"]
    assert [one.group for one in examples] == ["1272", "84", "84"]
    clip = examples[2].conversations[0][0].parts[0].item
    assert clip == root / "dev-clean" / "84" / "9" / "84-9-0001.flac"
    assert read_audio(clip)[0].shape == (160,)


def test_one_chapter_in_lower_case(root: Path) -> None:
    data = open_data(root / "dev-clean" / "84" / "9", lower=True, length=4)
    assert [data.sample(i, RNG).turns[0].answer for i in (0, 1)] == [
        "go do you hear",
        "but in less",
    ]


def test_clips_of_another_extension_are_found(root: Path) -> None:
    folder = root / "dev-clean" / "1272" / "9"
    soundfile.write(folder / "1272-9-0000.wav", np.full(160, 0.1), 16000)
    (folder / "1272-9-0000.flac").unlink()
    item = open_data(folder, length=2).sample(0, RNG).conversations[0][0].parts[0].item
    assert item == folder / "1272-9-0000.wav"


def test_a_line_without_transcript_is_named(root: Path) -> None:
    table = root / "dev-clean" / "84" / "9" / "84-9.trans.txt"
    table.write_text("84-9-0000 GO\n\n84-9-0001 \n")
    with pytest.raises(
        ValueError, match=r"84-9.trans.txt, line 3 is '84-9-0001 ', expected a name"
    ):
        open_data(root)
