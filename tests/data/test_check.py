"""The check of a data set: every problem of every row, in one pass."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmdlm
from mmdlm.commands.own_data import counter
from mmdlm.data.chat import Chat
from mmdlm.data.check import Checked, check
from mmdlm.data.conversations import collecting
from mmdlm.data.dataset import Dataset
from mmdlm.data.formats import open_data
from mmdlm.data.media_folder import MediaFolder
from mmdlm.data.split import Split
from mmdlm.model import MultimodalDLM
from mmdlm.training.vocabulary import grow


@pytest.fixture(scope="module")
def tiny() -> MultimodalDLM:
    model = mmdlm.load("tiny", device="meta")
    grow(model, ["cat", "q", "a", "b", "one", "two", "three"])
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (90, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(1600, np.nan, np.float32), 16000, "FLOAT")
    return tmp_path


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def about(kind: str, name: str, answer: str = "a cat") -> dict[str, Any]:
    parts = [{"type": kind, kind: name}, {"type": "text", "text": "what is red"}]
    return talk(("user", parts), ("assistant", answer))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def found(path: Path, model: MultimodalDLM, **options: Any) -> Checked:
    return check(Chat(path, length=options.pop("length", None)), model.processor, **options)


def listed(result: Checked) -> list[tuple[str, str]]:
    """(line, kind) of each problem."""
    return [(one.place.rpartition("line ")[2], one.kind) for one in result.problems]


def test_good_rows_have_no_problem(folder: Path, tiny: MultimodalDLM) -> None:
    rows = [about("image", "a.png"), talk(("system", "q"), ("user", "a"), ("assistant", "b"))]
    result = found(lines(folder / "x.jsonl", *rows), tiny)
    assert result.problems == []
    assert (result.rows, result.media, result.opened) == (2, {"image": 1}, 1)
    assert sorted(result.lengths) == [1, 2]
    assert result.canvas == 3


def test_all_problems_of_all_rows_are_found_at_once(folder: Path, tiny: MultimodalDLM) -> None:
    rows = [
        about("image", "gone.png", ""),
        about("image", "cut.png"),
        about("image", "empty.png", "one two three"),
        about("audio", "nan.wav"),
        about("image", "https://example.com/a.png"),
        about("image", "data:image/png;base64,?"),
        talk(("user", "<image> q"), ("assistant", "a <mask> b")),
        talk(("assistant", "a"), ("user", "q <mask>"), ("assistant", "b"), ("user", "q")),
        about("image", "gone.png"),
    ]
    result = found(lines(folder / "x.jsonl", *rows), tiny, length=2)
    assert listed(result) == [
        ("1", "empty answer"),
        ("1", "missing file"),
        ("2", "unreadable image"),
        ("3", "answer too long"),
        ("3", "unreadable image"),
        ("4", "unreadable audio"),
        ("5", "unreadable image"),
        ("6", "unreadable image"),
        ("7", "mask token"),
        ("7", "unknown mark"),
        ("8", "roles"),
        ("8", "roles"),
        ("8", "mask token"),
        ("9", "missing file"),
    ]
    texts = {one.place: one.text for one in result.problems}
    assert "3 tokens, but the canvas 2" in result.problems[3].text
    assert "download" in texts[f"{folder / 'x.jsonl'}, line 5"]
    assert result.media == {"image": 5, "audio": 1}  # gone.png counts once


@pytest.mark.parametrize("mark", ["<video>", "<|image_pad|>", "<image_1>", "<IMG>", "<audio>"])
def test_marks_of_other_formats_are_named(mark: str, folder: Path, tiny: MultimodalDLM) -> None:
    path = lines(folder / "x.jsonl", talk(("user", f"q {mark}"), ("assistant", "a")))
    grow(tiny, [mark])
    result = found(path, tiny)
    assert listed(result) == [("1", "unknown mark")]
    assert mark in result.problems[0].text


@pytest.mark.parametrize(
    ("roles", "wrong"),
    [
        ("user assistant user assistant", 0),
        ("system user assistant", 0),
        ("user user assistant", 0),
        ("user assistant tool assistant", 0),
        ("assistant", 1),
        ("user assistant assistant", 1),
        ("user system assistant", 2),
        ("system assistant", 1),
        ("user assistant user", 1),
    ],
)
def test_order_of_roles(roles: str, wrong: int, folder: Path, tiny: MultimodalDLM) -> None:
    path = lines(folder / "x.jsonl", talk(*((role, "a") for role in roles.split())))
    assert listed(found(path, tiny)) == [("1", "roles")] * wrong


def test_unknown_words_of_a_model_that_does_not_grow(folder: Path) -> None:
    model = mmdlm.load("tiny", device="meta")
    path = lines(folder / "x.jsonl", talk(("user", "what is zyx"), ("assistant", "a zyx circle")))
    result = found(path, model)
    assert listed(result) == [("1", "text"), ("1", "text")]
    assert all("lacks 'zyx'" in one.text for one in result.problems)


def test_prompt_media_and_canvas_must_fit_the_context(folder: Path) -> None:
    model = mmdlm.load("tiny", device="meta")
    path = lines(folder / "x.jsonl", about("image", "a.png", "a red circle"))
    real = mmdlm.load("tiny", device="cpu")
    image = len(real.encode("image", [real.processor.prepare("image", folder / "a.png")])[0])
    need = 3 + image + 5  # words of the question, image, canvas
    for context, kinds in ((need, []), (need - 1, [("1", "too long")])):
        model.spec = replace(model.spec, context=context)
        result = found(path, model, length=5, count=counter(model))
        assert listed(result) == kinds
    assert f"{need} tokens of prompt and answer" in result.problems[0].text


def test_silence_is_a_note(folder: Path, tiny: MultimodalDLM) -> None:
    result = found(lines(folder / "x.jsonl", about("audio", "silent.wav")), tiny)
    assert result.problems == []
    assert any("silent.wav: silent" in note for note in result.notes)


def test_media_of_a_kind_that_the_model_does_not_take(folder: Path) -> None:
    model = mmdlm.load("tiny", device="meta")
    del model.encoders["audio"], model.adapters["audio"]
    model._processor = None
    path = lines(folder / "x.jsonl", *[about("audio", "nan.wav", "a circle")] * 3)
    result = found(path, model)
    assert [one.kind for one in result.problems] == ["no encoder", *["unreadable audio"] * 3]
    assert "audio" in result.problems[0].text


def test_media_can_be_left_out_or_bounded(folder: Path, tiny: MultimodalDLM) -> None:
    rows = []
    for i in range(200):
        (folder / f"{i}.png").write_bytes(b"")
        rows.append(about("image", f"{i}.png"))
    path = lines(folder / "x.jsonl", *rows)
    assert found(path, tiny, media=False).problems == []
    result = found(path, tiny, seconds=0)
    assert (result.opened, result.problems) == (0, [])
    assert "0 of 200 media were opened" in result.notes[0]
    assert len(found(path, tiny).problems) == 200


# -- reading goes on after a row that is not valid


def test_the_first_row_that_is_not_valid_raises(folder: Path) -> None:
    good = about("image", "a.png")
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        Chat(lines(folder / "x.jsonl", good, "{", "[]"))


def bad_chat(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    good = about("image", "a.png")
    path = lines(folder / "a.jsonl", "{", good, "[]", talk(("user", "q")), {"messages": "q"})
    yield path, ["line 1", "line 3", "line 4", "line 5"]
    path = lines(folder / "b.jsonl", good, {"messages": [{"role": "user"}], "image": "a.png"})
    yield path, ["line 2"]
    path = lines(folder / "c.jsonl", good, "")
    path.write_bytes(path.read_bytes() + b'{"question": "\xff", "answer": "b"}\n')
    yield path, ["line 2"]


def bad_tables(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    path = folder / "t.csv"
    path.write_text("question,answer\nq,a\nq\nq,\nq,a,b\nq,b\n")
    yield path, ["line 3", "line 5"]
    path = folder / "metadata.jsonl"
    row = {"file_name": "a.png", "text": "a"}
    yield (
        lines(path, row, {"file_name": "a.png"}, row | {"file_name": "a.doc"}, "{"),
        [
            "line 2",
            "line 3",
            "line 4",
        ],
    )
    path = lines(folder / "l.json", json.dumps([{"conversations": [{"from": "gpt"}]}, 3]))
    yield path, ["entry 1", "entry 2"]


def bad_pairs(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2}]
    texts = [{"image_id": 1, "caption": "a"}, {"image_id": 9, "caption": "a"}, {"image_id": 1}]
    path = folder / "c.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    yield path, ["images entry 2", "annotations entry 2", "annotations entry 3"]
    asked = [{"question_id": i, "image_id": "a", "question": "q"} for i in range(3)]
    given = [{"question_id": 0, "answers": ["b"]}, {"question_id": 1, "answers": [3]}, {}]
    path = folder / "v_questions.json"
    path.write_text(json.dumps({"questions": [*asked, {"question_id": 4}]}))
    (folder / "v_annotations.json").write_text(json.dumps({"annotations": given}))
    yield (
        path,
        [
            "annotations entry 3",
            "questions entry 2",
            "questions entry 3",
            "questions entry 4",
        ],
    )


def bad_sounds(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    chapter = folder / "speech" / "1"
    chapter.mkdir(parents=True)
    (chapter / "1.trans.txt").write_text("1-0 a\n1-1\n1-2 b\n")
    yield folder / "speech", ["line 2"]
    path = folder / "clotho.csv"
    path.write_text("file_name,caption_1\nsilent.wav,a\nsilent.wav,\n")
    yield path, ["line 3"]
    path = folder / "caps.csv"
    path.write_text("youtube_id,start_time,caption\nsilent,0,a\nx,y,b\n")
    yield path, ["line 3"]
    path = folder / "dev.tsv"
    path.write_text("client_id\tpath\tsentence\nx\tsilent.wav\ta\nx\tsilent.wav\n")
    yield path, ["line 3"]


def bad_shards(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    path = folder / "w.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("1.png", "1.txt", "2.png", "2.png", "2.txt", "3.png", "4.png", "4.txt"):
            data = b"a" if name.endswith("txt") else (folder / "a.png").read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    yield path, ["sample 2", "sample 3"]


@pytest.mark.parametrize("make", [bad_chat, bad_tables, bad_pairs, bad_sounds, bad_shards])
def test_each_format_reads_on_after_rows_that_are_not_valid(make: Any, folder: Path) -> None:
    for path, places in make(folder):
        with collecting() as rejected:
            if places[:1] == ["entry 1"]:
                with pytest.raises(ValueError, match="no valid rows"):
                    open_data(path)
            else:
                data = open_data(path)
                assert len(data) >= 1
        assert [place.partition(", ")[2] for place, _ in rejected] == places, path.name
        with pytest.raises(ValueError, match=places[0]):
            open_data(path)


def test_a_text_file_that_is_not_text_is_one_row(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat")
    (folder / "cut.txt").write_bytes(b"\xff\xfe\xff")
    with collecting() as rejected:
        data = MediaFolder(folder)
    assert len(data) == 1
    assert [Path(place).name for place, _ in rejected] == ["cut.txt"]


def test_places_of_splits_and_of_other_data_sets(folder: Path) -> None:
    path = lines(folder / "x.jsonl", *[about("image", "a.png")] * 10)
    held = Split(Chat(path), "held_out")
    assert held.place(0) == f"{path}, line {held.indices[0] + 1}"
    assert Dataset().place(4) == "row 5"
