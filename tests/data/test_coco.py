"""COCO's captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmdlm.data.coco import COCOCaptions
from mmdlm.data.formats import of, open_data

CAPTIONS = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 4},
        {"id": 7, "file_name": "a.jpg"},
        {"id": 1, "file_name": "none.jpg"},
    ],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A cat.\n"},
        {"image_id": 9, "id": 2, "caption": "Two dogs."},
        {"image_id": 7, "id": 3, "caption": "The tabby."},
    ],
}


def write(path: Path, found: object, image: Path) -> Path:
    for file in (path, image):
        file.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    image.write_bytes(b"")
    return path


def test_one_row_per_image_with_all_its_captions(tmp_path: Path) -> None:
    file = tmp_path / "annotations" / "captions_val2017.json"
    data = open_data(write(file, CAPTIONS, tmp_path / "val2017" / "a.jpg"), length=4)
    assert [data.sample(i, np.random.default_rng(0)).turns[0].answer for i in (0,)] == ["Two dogs."]
    drawn = [data.sample(1, np.random.default_rng(i)) for i in range(20)]
    assert {one.turns[0].answer for one in drawn} == {"A cat.", "The tabby."}
    assert len(data) == 2
    assert data.rows[1]["answers"] == ["A cat.", "The tabby."]
    assert drawn[0].conversations[0][0].parts[0].item == tmp_path / "val2017" / "a.jpg"
    assert {"tabby", "dogs"} <= set(data.vocabulary())


@pytest.mark.parametrize("folder", ["a/images/train2014", "a/train2014", "images", "a/images", "a"])
def test_usual_folders_of_images_are_found(tmp_path: Path, folder: str) -> None:
    file = tmp_path / "a" / "captions_train2014.json"
    data = COCOCaptions(write(file, CAPTIONS, tmp_path / folder / "a.jpg"))
    assert data.root == tmp_path / folder


def test_the_folder_may_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", CAPTIONS, tmp_path / "elsewhere" / "a.jpg")
    assert of(file) is COCOCaptions
    with pytest.raises(FileNotFoundError, match="b.jpg is in none of .*give the folder"):
        COCOCaptions(file)
    assert COCOCaptions(file, images=tmp_path / "elsewhere").root == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 8, "caption": "x"}]}, "annotations entry 1: image_id 8 is"),
        ({"annotations": [{"image_id": 7, "caption": 3}]}, "entry 1: caption is 3, expected str"),
        ({"images": [{"id": 7}]}, "images entry 1: file_name is None, expected str"),
        ({"images": {}}, "has no list 'images'"),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, change: dict, message: str) -> None:
    file = write(tmp_path / "x.json", CAPTIONS | change, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        COCOCaptions(file)
