"""Scenes that are written to files are those of the data set, and training reads them."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.llava import LLaVA
from mmdlm.data.scene_files import make
from mmdlm.data.scenes import Scenes, describe, draw
from tests.data.test_scenes import truth


def test_make_writes_a_folder_that_reads_back(tmp_path):
    path = make(tmp_path / "new" / "scenes", count=6, seed=3, asked=2)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "metadata.jsonl"
    assert len(entries) == 6
    scenes = Scenes(seed=3)
    for index, entry in enumerate(entries):
        scene = scenes.scene(index)
        with Image.open(path.parent / entry["file_name"]) as image:
            assert np.array_equal(np.asarray(image), draw(scene))
        assert entry["text"] == describe(scene)
        assert len(entry["questions"]) == 2
        assert all(truth(scene, q["prompt"]) == q["answer"] for q in entry["questions"])
    again = make(tmp_path / "again", count=6, seed=3, asked=2)
    assert again.read_text() == path.read_text()


def test_make_rejects_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make(tmp_path, count=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_make_writes_conversations_of_llava(tmp_path):
    path = make(tmp_path / "scenes", count=3, seed=3, asked=2, format="llava")
    assert path.name == "conversations.json"
    assert LLaVA.matches(path)
    data, scenes = LLaVA(path), Scenes(seed=3)
    assert len(data) == 3
    for index in range(3):
        sample, scene = data.sample(index, np.random.default_rng(0)), scenes.scene(index)
        caption, *questions = sample.turns
        assert caption.prompt == "describe the picture"
        assert caption.answer == describe(scene)
        assert len(questions) == 2
        assert all(truth(scene, turn.prompt) == turn.answer for turn in questions)
        media = [p.item for p in sample.branches[0][0].parts if hasattr(p, "item")]
        assert media == [path.parent / f"{index:07d}.png"]
        with Image.open(media[0]) as image:
            assert np.array_equal(np.asarray(image), draw(scene))


def test_make_rejects_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format is 'coco', expected imagefolder or llava"):
        make(tmp_path / "new", count=1, format="coco")
    assert not (tmp_path / "new").exists()
