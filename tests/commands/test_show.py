"""`mmdlm data show`: rows as the model gets them, in the terminal and on a sheet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmdlm
from mmdlm.commands.main import main
from mmdlm.commands.own_data import opened
from mmdlm.commands.show import Shown, conversations, line, sheet, spark
from mmdlm.messages import Example, Slot, assistant, user
from mmdlm.processor import Processor
from mmdlm.text import Tokenizer

RED = (200, 10, 30)


@pytest.fixture(scope="module")
def tiny() -> mmdlm.MultimodalDLM:
    return mmdlm.load("tiny", device="meta")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 40), RED).save("a.png")
    t = np.arange(8000) / 16000
    soundfile.write("b.wav", np.sin(2 * np.pi * 440 * t).astype(np.float32) / 2, 16000)
    rows = [
        {"image": "a.png", "question": "what is red", "answer": "a circle"},
        {"audio": "b.wav", "question": "what is it", "answer": "a large zebra ."},
        {"question": "is it red", "answer": "yes"},
    ]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_prompt_target_and_end_are_told_apart(folder: Path, tiny: mmdlm.MultimodalDLM) -> None:
    data = opened(Path("x.jsonl"), tiny, {})
    (one,) = conversations(data, 0, tiny.processor)
    assert one.title == "x.jsonl, line 1"
    assert one.pieces == [
        ("[image a.png 3x64x64]", "media"),
        ("what", "prompt"),
        ("is", "prompt"),
        ("red", "prompt"),
        ("a", "target"),
        ("circle", "target"),
        ("<eos> ×3", "end"),
    ]
    ((_, image),) = one.media
    assert image.size == (64, 64)
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 1
    (two,) = conversations(data, 1, tiny.processor)
    assert ("zebra", "target") in two.pieces  # a word that the model learns
    assert two.media[0][1].height == 80  # mel bands


def test_a_chat_template_and_pieces_of_words_are_shown(tiny: mmdlm.MultimodalDLM) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, "hi"])}
    backend = Backend(models.BPE(vocab, [("h", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<mask>"]
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = Tokenizer(backend)
    ids = {name: tokenizer.id(mark) for name, mark in zip(("s", "e", "m"), marks, strict=True)}
    spec = replace(
        tiny.spec,
        transformer=replace(tiny.spec.transformer, vocab=len(tokenizer)),
        mask_id=ids["m"],
        eos_id=ids["e"],
        pad_id=ids["e"],
        template="chatml",
        attention="full",
    )
    example = Example((user("hi\né"), assistant(Slot("text", 4, "hi"))))
    data = SimpleNamespace(sample=lambda i, rng: example, place=lambda i: "row 1")
    (one,) = conversations(data, 0, Processor(spec, tokenizer))
    assert [text for text, style in one.pieces if style == "special"] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    texts = [text for text, _ in one.pieces]
    assert texts[texts.index("⏎") + 1] == "hi"
    assert one.pieces[-2:] == [("hi", "target"), ("<|im_end|> ×3", "end")]


def test_the_terminal_marks_boundaries_and_targets() -> None:
    one = Shown("x", [("what", "prompt"), ("<eos>", "special"), ("cat", "target")])
    text = line(one)
    assert text.plain == "what│<eos>│cat"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert (styles["what"], styles["cat"]) == ("dim", "bold green")


def test_actions_are_numbers_and_curves() -> None:
    one = Shown("x", [("go", "prompt")], [], np.array([[0.0, 5.0], [0.5, 5.0], [1.0, 5.0]]))
    assert line(one).plain.splitlines()[1:] == [
        "action 0  ▁▅█  0, 0.5, 1",
        "action 1  ▁▁▁  5, 5, 5",
    ]
    assert spark(np.array([1.0, 0.0])) == "█▁"
    drawn = np.asarray(sheet([one]))
    assert (drawn == (200, 60, 60)).all(-1).any()
    assert (drawn == (50, 110, 220)).all(-1).any()


def test_command_writes_a_sheet(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "show", "x.jsonl", "--rows", "2", "--out", "out/sheet.png"]) == 0
    said = capsys.readouterr().out
    assert "what│is│red│a│circle│<eos> ×3" in said
    assert "line 3" not in said
    drawn = np.asarray(Image.open("out/sheet.png"))
    assert (np.abs(drawn.astype(int) - RED).max(-1) <= 1).sum() >= 150 * 150


def test_robot_rows_show_the_chunk(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pyarrow", reason='pip install "mmdlm[data]"')
    from mmdlm.data.lerobot_writer import Writer

    shapes = {"observation.image": (64, 64, 3), "observation.state": (2,), "action": (2,)}
    with Writer("robot", shapes, fps=10) as writer:
        frames = {name: np.zeros((9, *shape), np.float32) for name, shape in shapes.items()}
        frames["observation.image"] = np.full((9, 64, 64, 3), RED, np.uint8)
        frames["action"][:, 1] = np.arange(9)
        writer.add_episode("go to it", frames)
    assert main(["data", "show", "robot", "--rows", "1", "--out", "r.png"]) == 0
    said = capsys.readouterr().out
    assert "[image 3x64x64]│[state 0, 0]│go│to│it" in said
    assert "action 1  ▁▂▃▄▅▆▇█  0, 1, 2, 3, 4, 5, 6, 7" in said
    assert (np.abs(np.asarray(Image.open("r.png")).astype(int) - RED).max(-1) <= 1).any()


@pytest.mark.parametrize(
    ("given", "message"), [(["--out", "x.jpg"], "ending in .png"), (["--rows", "0"], "at least 1")]
)
def test_wrong_options(
    given: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["data", "show", "x.jsonl", *given]) == 2
    assert message in capsys.readouterr().err
