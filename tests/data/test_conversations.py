"""Data sets of users' own files: what every row becomes, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmdlm
from mmdlm.data.chat import Chat
from mmdlm.data.conversations import located
from mmdlm.data.formats import of, open_data
from mmdlm.data.llava import LLaVA
from mmdlm.data.media_folder import MediaFolder
from mmdlm.messages import Text

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tiny():
    return mmdlm.load("tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, name in enumerate(("a", "b")):
        Image.new("RGB", (40, 30), (i * 90, 10, 10)).save(tmp_path / f"{name}.png")
    return tmp_path


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def shown(data, index: int = 0) -> list[list[tuple[str, object]]]:
    """Role and parts of each conversation of a row."""
    return [
        [
            (
                m.role,
                [
                    p.text if isinstance(p, Text) else getattr(p, "item", p.__dict__.get("value"))
                    for p in m.parts
                ],
            )
            for m in branch
        ]
        for branch in data.sample(index, RNG).branches
    ]


def test_messages_with_an_image_beside_the_file(photos: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    data = open_data(lines(photos / "x.jsonl", {"messages": turns}), length=8)
    assert shown(data) == [[("user", [photos / "a.png", "What is it?"]), ("assistant", ["A cat."])]]


def test_every_assistant_message_is_an_answer(tmp_path: Path) -> None:
    turns = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two")]
    messages = [{"role": role, "content": text} for role, text in turns]
    data = Chat(lines(tmp_path / "x.jsonl", {"messages": messages}), length=4)
    assert shown(data) == [
        [("user", ["1?"]), ("assistant", ["one"])],
        [("user", ["1?"]), ("assistant", ["one"]), ("user", ["2?"]), ("assistant", ["two"])],
    ]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "why?", "answer": "so"}, "why?", "so"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n1 2", "3"),
    ],
)
def test_pairs_of_columns(tmp_path: Path, row: dict, question: str, answer: str) -> None:
    data = Chat(lines(tmp_path / "x.jsonl", row), length=4)
    assert shown(data) == [[("user", [question]), ("assistant", [answer])]]


def test_empty_media_parts_are_filled_from_the_columns(photos: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "images": ["a.png", "b.png"]}
    data = Chat(lines(photos / "x.jsonl", row), length=4)
    assert shown(data)[0][0] == ("user", [photos / "a.png", "or", photos / "b.png"])
    with pytest.raises(ValueError, match="line 1 has more marks <image> than image files"):
        Chat(lines(photos / "x.jsonl", row | {"images": ["a.png"]}))
    turns[0]["content"] = [{"type": "text", "text": "which?"}]
    data = Chat(lines(photos / "x.jsonl", row), length=4)
    assert shown(data)[0][0] == ("user", [photos / "a.png", photos / "b.png", "which?"])


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('question,answer\n"a, b?",yes\n', encoding="utf-8-sig")
    assert shown(Chat(path, length=4)) == [[("user", ["a, b?"]), ("assistant", ["yes"])]]


def test_llava_marks_are_where_images_go(photos: Path) -> None:
    value = "<image>\nand\n<image>\nwhich?"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "second"}]
    path = photos / "x.json"
    path.write_text(json.dumps([{"image": ["a.png", "b.png"], "conversations": turns}]))
    assert of(path) is LLaVA
    assert shown(LLaVA(path, length=4)) == [
        [
            ("user", [photos / "a.png", "and", photos / "b.png", "which?"]),
            ("assistant", ["second"]),
        ]
    ]


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("all", [0, 1, 2, 3]), ("first:2", [0, 1]), ("end:25%", [3]), ("first:30%", [0, 1])],
)
def test_mixture_takes_its_share(tmp_path: Path, strategy: str, kept: list[int]) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}
        for i in range(4)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    path = tmp_path / "mix.yaml"
    path.write_text(f'datasets: [{{json_path: a.json, sampling_strategy: "{strategy}"}}]')
    data = open_data(path, length=4)
    answers = [shown(data, i)[0][-1][1][0] for i in range(len(data))]
    assert answers == [f"a{i}" for i in kept]


def test_imagefolder_and_text_files_give_the_same_rows(photos: Path, tiny) -> None:
    texts = {"a": "a red cat", "b": "a blue dog"}
    table = photos / "table"
    table.mkdir()
    for name, text in texts.items():
        (photos / f"{name}.txt").write_text(text + "\n")
        (table / f"{name}.png").write_bytes((photos / f"{name}.png").read_bytes())
    lines(
        table / "metadata.jsonl",
        *({"file_name": f"{name}.png", "text": text} for name, text in texts.items()),
    )
    beside = MediaFolder(photos, length=4, prompt="describe")
    listed = open_data(table, length=4, prompt="describe")
    assert shown(beside) == [
        [("user", [photos / "a.png", "describe"]), ("assistant", ["a red cat"])]
    ]
    assert [shown(listed, i)[0][1] for i in (0, 1)] == [shown(beside, i)[0][1] for i in (0, 1)]


def test_length_and_instruction_follow_from_model_and_answers(photos: Path, tiny) -> None:
    (photos / "a.txt").write_text("a red circle")
    (photos / "b.txt").write_text("a large blue square left of a red circle")
    data = MediaFolder(photos).connect(
        tiny.processor, {"caption": {"prompt": "describe the picture"}}
    )
    assert data.length == 1 + 9
    assert MediaFolder(photos).connect(tiny.processor, tiny.preset).length == 20  # its default
    assert shown(data)[0][0] == ("user", [photos / "a.png", "describe the picture"])
    packed = tiny.processor.pack([data.sample(i, RNG) for i in (0, 1)])
    assert [len(row.turns[0].answer) for row in packed.rows] == [10, 10]


def test_without_a_template_a_question_stands_alone_with_its_media(photos: Path, tiny) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what"}]
    turns = [("user", content), ("assistant", "a circle"), ("user", "what is red")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages.append({"role": "assistant", "content": "the circle"})
    data = Chat(lines(photos / "x.jsonl", {"messages": messages})).connect(tiny.processor)
    assert shown(data)[1] == [
        ("user", [photos / "a.png", "what is red"]),
        ("assistant", ["the circle"]),
    ]


def test_audio_folder(tmp_path: Path, tiny) -> None:
    soundfile.write(tmp_path / "c.wav", np.zeros(1600, np.float32), 16000)
    (tmp_path / "c.txt").write_text("hello")
    data = open_data(tmp_path, length=2).connect(
        tiny.processor, {"transcribe": {"prompt": "write it down"}}
    )
    assert shown(data) == [
        [("user", [tmp_path / "c.wav", "write it down"]), ("assistant", ["hello"])]
    ]


def test_items_are_located(tmp_path: Path) -> None:
    data = base64.b64encode(b"bytes").decode()
    assert located("x/a.png", tmp_path) == tmp_path / "x" / "a.png"
    assert located("file:///data/my%20cat.png", tmp_path) == Path("/data/my cat.png")
    assert located(f"data:image/png;base64,{data}", tmp_path) == b"bytes"
    with pytest.raises(ValueError, match="download"):
        located("https://example.com/a.png", tmp_path)
    with pytest.raises(ValueError, match="damaged base64"):
        located("data:image/png;base64,?", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [}', "line 1 is not valid JSON"),
        ("[1]", "line 1 is a list, expected an object"),
        ('\n{"a": 1}', "no known format"),
        ('{"messages": [{"role": "user", "content": 3}]}', "x.jsonl, line 1: message 0 has role"),
        ('{"messages": []}', "x.jsonl, line 1: the conversation is empty"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "line 1 has no message of the assi"),
        ('{"question": "<image> <image>?", "answer": "x", "image": "a.png"}', "more marks <image>"),
    ],
)
def test_what_is_not_valid_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        (open_data if "known" in message else Chat)(path)


def test_texts_of_a_row_hold_all_that_it_teaches(tmp_path: Path, photos: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada"},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "1843"},
    ]
    data = Chat(lines(tmp_path / "talk.jsonl", {"messages": talk}))
    assert sorted(data.texts(0)) == ["1843", "Ada", "Be brief.", "When?", "Who?"]
    row = {"file_name": "a.png", "text": "a dark card"}
    folder = MediaFolder(lines(photos / "metadata.jsonl", row).parent)
    assert folder.texts(0) == ["Describe the image.", "a dark card"]
