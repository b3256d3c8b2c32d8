"""Tables with columns the user names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mmdlm
from mmdlm.data.formats import of, open_data
from mmdlm.data.table import Table
from mmdlm.messages import Media, Text

RNG = np.random.default_rng(0)


def shown(data, index: int = 0) -> list[tuple[str, object]]:
    """Role and content of every part of a row's conversation."""
    return [
        (m.role, p.text if isinstance(p, Text) else p.item if isinstance(p, Media) else p.value)
        for m in data.sample(index, RNG).conversations[-1]
        for p in m.parts
    ]


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".json"])
def test_named_columns_of_every_kind_of_table(tmp_path: Path, extension: str) -> None:
    row = {"photo": "a/cat.png", "sound": "purr.wav", "ask": "what, is it?", "say": "a cat"}
    row["role"] = "be brief"
    path = tmp_path / f"x{extension}"
    if extension in (".csv", ".tsv"):
        separator = "," if extension == ".csv" else "\t"
        lines = (separator.join(f'"{v}"' for v in values) for values in (row, row.values()))
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(row if extension == ".jsonl" else [row]))
    columns = {"image": "photo", "audio": "sound", "question": "ask", "answer": "say"}
    data = open_data(path, **columns, system="role", folder=tmp_path / "media", length=4)
    assert shown(data) == [
        ("system", "be brief"),
        ("user", tmp_path / "media" / "a" / "cat.png"),
        ("user", tmp_path / "media" / "purr.wav"),
        ("user", "what, is it?"),
        ("assistant", "a cat"),
    ]


def test_known_columns_need_no_names(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("file_name,caption\na.png,a cat\nb.png,a dog\n")
    assert of(path) is Table
    data = open_data(path, length=4, prompt="describe")
    assert shown(data, 1) == [
        ("user", tmp_path / "b.png"),
        ("user", "describe"),
        ("assistant", "a dog"),
    ]


def test_named_columns_win_over_the_format_that_known_columns_suggest(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("question,answer,short\nwhy?,because of it,so\n")
    data = open_data(path, question="question", answer="short", length=4)
    assert shown(data) == [("user", "why?"), ("assistant", "so")]


def test_several_images_go_to_their_marks_and_numbers_are_answers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"img": ["a.png", "b.png"], "q": "<image> or <image>?", "label": 2}
    path.write_text(json.dumps(row))
    data = Table(path, image="img", question="q", answer="label", length=4)
    assert shown(data) == [
        ("user", tmp_path / "a.png"),
        ("user", " or "),
        ("user", tmp_path / "b.png"),
        ("user", "?"),
        ("assistant", "2"),
    ]


def test_rows_of_one_table_may_have_other_media(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"question": "1 + 1?", "label": 2},
        {"question": "who?", "label": "me", "image": "a.png"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = open_data(path, answer="label", length=4)
    assert [len(shown(data, i)) for i in (0, 1)] == [2, 3]
    path = tmp_path / "y.csv"
    path.write_text("path,text\na.png,a cat\nb.wav,hello\n")
    data = open_data(path, length=4).connect(mmdlm.load("tiny").processor)
    assert [shown(data, i) for i in (0, 1)] == [
        [("user", tmp_path / "a.png"), ("user", "Describe the image."), ("assistant", "a cat")],
        [("user", tmp_path / "b.wav"), ("user", "Transcribe the audio."), ("assistant", "hello")],
    ]


def test_of_several_answers_one_is_drawn_and_all_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"image": "a.png", "captions": ["a cat", "the cat", "one tabby"]}))
    data = open_data(path, length=4)
    drawn = {data.sample(0, np.random.default_rng(i)).turns[0].answer for i in range(30)}
    assert drawn == {"a cat", "the cat", "one tabby"} == set(data.rows[0]["answers"])
    same = [data.sample(0, np.random.default_rng(7)).turns[0].answer for _ in range(3)]
    assert len(set(same)) == 1
    assert "tabby" in data.vocabulary()


def test_values_may_be_longer_than_the_default_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f'image,caption\n"data:image/png;base64,{"A" * 200_000}",a cat\n')
    assert shown(open_data(path, length=4))[0][1] == bytes(150_000)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("image,caption\na.png,x\nb.png,\n", {}, "x.csv, line 3: caption is empty"),
        ("image,caption\na.png,x\nb.png\n", {}, "line 3 has another number of columns"),
        ("image,caption\n,x\n", {}, "line 2 has neither a question nor media"),
        ("a,b\n1,2\n", {}, "no known format"),
        ("a,b\n1,2\n", {"answer": "c", "question": "a"}, "x.csv lacks c: its columns are a, b"),
        ("a,b\n1,2\n", {"answer": "b"}, "does not name what to learn"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, options: dict, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_data(path, **options)


def test_options_of_another_format_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("question,answer\nq,a\n")
    with pytest.raises(TypeError, match=r"read by Chat, without colour; it has length, prompt"):
        open_data(path, colour="red")
