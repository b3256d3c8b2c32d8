"""VQA's questions and annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmdlm.data.formats import open_data
from mmdlm.data.vqa import VQA

QUESTIONS = [
    {"question_id": 70, "image_id": 7, "question": "What is it?"},
    {"question_id": 71, "image_id": 12, "question": "How many?"},
]
GIVEN = {70: ["a cat", "cat", "tabby", "cat", *["dog"] * 3, *["cat"] * 3], 71: ["2"] * 10}


def write(root: Path, questions: list = QUESTIONS, given: dict = GIVEN, image: str = "") -> Path:
    notes = [
        {"question_id": number, "image_id": 1, "answers": [{"answer": text} for text in texts]}
        for number, texts in given.items()
    ]
    file = root / "v2_mscoco_val2014_annotations.json"
    file.write_text(json.dumps({"info": {}, "annotations": notes}))
    path = root / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    image_file = root / (image or "val2014/COCO_val2014_000000000007.jpg")
    image_file.parent.mkdir(parents=True, exist_ok=True)
    image_file.write_bytes(b"")
    return path


def test_the_most_common_answer_is_learnt_and_all_are_kept(tmp_path: Path) -> None:
    data = open_data(write(tmp_path), length=4)
    examples = [data.sample(i, np.random.default_rng(i)) for i in range(2)]
    assert [one.turns[0][:2] for one in examples] == [("What is it?", "cat"), ("How many?", "2")]
    assert data.rows[0]["answers"] == GIVEN[70]
    media = [one.conversations[0][0].parts[0].item for one in examples]
    assert media[1] == tmp_path / "val2014" / "COCO_val2014_000000000012.jpg"


def test_either_file_names_the_pair(tmp_path: Path) -> None:
    path = write(tmp_path)
    other = open_data(tmp_path / "v2_mscoco_val2014_annotations.json")
    assert other.rows == open_data(path).rows
    assert other.places[1] == f"{path}, questions entry 2"


def test_the_folders_of_the_official_code(tmp_path: Path) -> None:
    path = write(tmp_path, image="Images/mscoco/val2014/COCO_val2014_000000000007.jpg")
    notes = tmp_path / "v2_mscoco_val2014_annotations.json"
    for file, folder in ((path, "Questions"), (notes, "Annotations")):
        (tmp_path / folder).mkdir()
        file.rename(tmp_path / folder / file.name)
    data = open_data(tmp_path / "Questions" / path.name)
    assert data.rows[0]["answers"] == GIVEN[70]
    assert data.root == tmp_path / "Images" / "mscoco" / "val2014"


@pytest.mark.parametrize("image", ["val2014/000000000007.jpg", "images/7.jpg", "7.png"])
def test_images_are_found_by_their_usual_names(tmp_path: Path, image: str) -> None:
    data = VQA(write(tmp_path, image=image))
    found = [data.root / row["messages"][0]["content"][0]["image"] for row in data.rows]
    assert found[0] == tmp_path / image
    assert found[1].name == image.split("/")[-1].replace("07.", "12.").replace("7.", "12.")


def test_images_and_annotations_may_be_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, image="x/img-7.webp")
    notes = (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "notes.json")
    with pytest.raises(FileNotFoundError, match="no annotations beside it.*annotations="):
        VQA(path)
    with pytest.raises(FileNotFoundError, match="give the folder of the images"):
        VQA(path, annotations=notes)
    data = VQA(path, annotations=notes, images=tmp_path / "x", name="img-{id}.webp")
    assert data.rows[0]["messages"][0]["content"][0]["image"] == "img-7.webp"


def test_errors_name_the_entry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="questions entry 2: question_id 71 has no annotation"):
        VQA(write(tmp_path, given={70: ["cat"]}))
    with pytest.raises(ValueError, match=r"annotations entry 1: answers are \[\], expected"):
        VQA(write(tmp_path, given={70: []}))
    with pytest.raises(ValueError, match="entry 1: question is None, expected str"):
        VQA(write(tmp_path, questions=[{"question_id": 70, "image_id": 7}]))
