"""Hugging Face data sets on disk."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmdlm.data.formats import of, open_data
from mmdlm.data.hugging_face import HuggingFace
from mmdlm.media import read_audio, read_image
from mmdlm.messages import Media, Text

RNG = np.random.default_rng(0)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets", reason='pip install "mmdlm[data]"')
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def png(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(stream, "png")
    return stream.getvalue()


def wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(160, 0.1), 16000, format="wav")
    return stream.getvalue()


def shown(data, index: int = 0) -> list[object]:
    """Texts, media and answer of a row's last conversation."""
    return [
        p.text if isinstance(p, Text) else p.item if isinstance(p, Media) else p.value
        for m in data.sample(index, RNG).conversations[-1]
        for p in m.parts
    ]


@pytest.fixture
def photos(datasets):
    """Two captioned images."""
    columns = {"photo": [{"bytes": png(10 * i), "path": None} for i in range(2)]}
    columns["caption"] = ["a", "b"]
    features = {"photo": datasets.Image(), "caption": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def test_saved_folder_and_parquet_file_give_the_same_rows(photos, tmp_path: Path) -> None:
    photos.save_to_disk(tmp_path / "saved")
    photos.to_parquet(tmp_path / "x.parquet")
    saved = open_data(tmp_path / "saved", length=2, prompt="describe")
    assert isinstance(saved, HuggingFace)
    assert [shown(saved, i) for i in (1, 0)] == [
        [png(10), "describe", "b"],
        [png(0), "describe", "a"],
    ]
    assert open_data(tmp_path / "x.parquet").rows == saved.rows
    assert read_image(shown(saved, 1)[0]).getpixel((0, 0)) == (10, 0, 0)
    assert shown(pickle.loads(pickle.dumps(saved)), 1) == shown(saved, 1)  # as in a worker


def test_rows_keep_the_order_of_a_data_set_that_was_selected(photos, tmp_path: Path) -> None:
    photos.select([1, 0, 1]).save_to_disk(tmp_path / "saved")
    data = open_data(tmp_path / "saved", length=2)
    assert [shown(data, i) for i in range(3)] == [[png(10), "b"], [png(0), "a"], [png(10), "b"]]


def test_splits_of_a_saved_folder_and_of_a_local_repository(photos, datasets, tmp_path) -> None:
    parts = {"train": photos.select([0]), "test": photos.select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(tmp_path / "repo" / "data" / f"{name}-00000-of-00001.parquet")
    for folder in ("saved", "repo"):
        path = tmp_path / folder
        assert of(path) is HuggingFace
        assert shown(open_data(path, length=2))[-1] == "a"
        assert shown(open_data(path, length=2, split="test"))[-1] == "b"
        with pytest.raises(ValueError, match="no split 'val'; give split= one of .*test"):
            open_data(path, split="val")


def test_columns_by_argument_and_clips(datasets, tmp_path: Path) -> None:
    columns = {"a": [{"bytes": wav(), "path": "x.wav"}], "b": ["who?"], "c": [["me", "I"]]}
    path = tmp_path / "x.parquet"
    rows = datasets.Dataset.from_dict(columns).cast_column("a", datasets.Audio(sampling_rate=16000))
    rows.to_parquet(path)
    data = open_data(path, question="b", answer="c", length=2)
    assert shown(data)[:2] == [wav(), "who?"]
    assert read_audio(shown(data)[0])[0].shape == (160,)
    assert data.rows[0]["answers"] == ["me", "I"]
    with pytest.raises(ValueError, match="lacks d: its columns are"):
        open_data(path, question="b", answer="d")


def test_binary_columns_and_files_without_features_of_datasets(datasets, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(2):
        table = pa.table({"pixels": [png(i), None], "q": ["what?", "1 + 1?"], "answer": ["x", "2"]})
        pq.write_table(table, tmp_path / f"p-{i}.parquet")
    data = open_data(tmp_path / "p-{0..1}.parquet", image="pixels", question="q", length=2)
    assert [shown(data, i) for i in (2, 1)] == [[png(1), "what?", "x"], ["1 + 1?", "2"]]


def test_messages_with_a_column_of_images(datasets, tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "or"}] * 2
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    rows = datasets.Dataset.from_dict({"messages": [turns], "images": [images]})
    features = rows.features.copy()
    features["images"] = datasets.List(datasets.Image())
    rows.cast(features).save_to_disk(tmp_path / "saved")
    data = open_data(tmp_path / "saved", length=2)
    assert shown(data) == [png(0), "or", png(1), "or", "b"]


def test_rows_that_are_not_valid_are_named(photos, tmp_path: Path) -> None:
    photos.add_column("second", photos["caption"]).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="a, row 1 lacks other"):
        open_data(tmp_path / "a", answer="other")
    broken = photos.select_columns(["photo"]).add_column("caption", ["a", None])
    broken.save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="b, row 2: caption is empty"):
        open_data(tmp_path / "b")


def test_damaged_files_are_named(photos, tmp_path: Path) -> None:
    photos.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    photos.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    for name in ("x.parquet", "saved"):
        with pytest.raises(ValueError, match=f"{name} is not readable by the library datasets"):
            open_data(tmp_path / name)


def test_several_columns_of_images_must_be_chosen_from(photos, tmp_path: Path) -> None:
    import datasets

    two = photos.add_column("other", photos.with_format("arrow")[:]["photo"].to_pylist())
    two.cast_column("other", datasets.Image()).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="photo, other; name one with image="):
        open_data(tmp_path / "a")
    assert shown(open_data(tmp_path / "a", image="other", length=2))[0] == png(0)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert of(tmp_path / "x.parquet") is HuggingFace
    with pytest.raises(ImportError, match=r'pip install "mmdlm\[data\]"'):
        open_data(tmp_path / "x.parquet")
