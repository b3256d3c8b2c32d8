"""Text that people write with any editor, in files of checkpoints and of commands."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmdlm.checkpoint import load, save
from mmdlm.data.lerobot import LeRobot
from mmdlm.decoding import preset
from mmdlm.files import read_input, read_lines, read_text
from mmdlm.loading.own import read_tasks
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("read", [read_text, read_input])
def test_mark_and_line_ends_are_no_part_of_a_text(tmp_path: Path, read) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + "ä\r\nb\rc\n\u2028\ufeff".encode())
    assert read(file) == "ä\nb\nc\n\u2028\ufeff"
    file.write_bytes(b"")
    assert read(file) == ""


@pytest.mark.parametrize("data", ["ä".encode("latin-1"), "hi".encode("utf-16")])
@pytest.mark.parametrize("read", [read_text, read_input])
def test_other_encodings_are_named(tmp_path: Path, read, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.txt is not valid UTF-8 .*; save it as UTF-8"):
        read(tmp_path / "a.txt")


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(MARK + "one\u2028\x85\x0b\r\n \n\ntwo".encode())
    assert read_lines(tmp_path / "a") == ["one\u2028\x85\x0b", "two"]


def test_a_pipe_of_the_user_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(MARK + b"hi\n",))
    writer.start()
    assert read_lines(tmp_path / "pipe") == ["hi"]
    writer.join()


def marked(folder: Path) -> Path:
    """The folder with a byte order mark before each of its texts."""
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml", ".jinja", ".txt"):
            file.write_bytes(MARK + file.read_bytes())
    return folder


def test_every_file_of_our_layout_may_have_a_mark(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    model = multimodal()
    save(model, tmp_path)
    again = load(marked(tmp_path), device="cpu")
    assert again.spec == model.spec
    assert again.preset == model.preset
    assert again.robot.to_dict() == model.robot.to_dict()
    assert again.tokenizer.encode("what is this ?") == model.tokenizer.encode("what is this ?")


def test_every_file_of_a_published_folder_may_have_a_mark(
    tmp_path: Path, published: Callable[..., Path]
) -> None:
    folder = published("llada")
    Tokenizer.from_words(["a", "b"]).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plain = load(folder, device="cpu")
    again = load(marked(folder), device="cpu")
    assert again.spec == plain.spec
    assert again.published == plain.published
    assert again.tokenizer.template == plain.tokenizer.template
    assert torch.equal(again.prompt("a b"), plain.prompt("a b"))


def test_decoding_files_and_data_sets_may_have_a_mark(tmp_path: Path) -> None:
    steps = "- class_path: mmdlm.decoding.commits.top_k.TopK\n  init_args: {steps: 4}\n"
    (tmp_path / "mine.yaml").write_bytes(MARK + steps.encode())
    assert preset.strategies(str(tmp_path / "mine.yaml"))[0].steps == 4
    (tmp_path / "decoding.yaml").write_bytes(MARK + b"caption: {length: 8}\n")
    assert read_tasks(tmp_path / "decoding.yaml") == {"caption": {"length": 8}}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_bytes(MARK + b'{"codebase_version": "v1.6"}')
    with pytest.raises(ValueError, match=r"has version 'v1\.6', expected 'v3\.0'"):
        LeRobot(tmp_path)
