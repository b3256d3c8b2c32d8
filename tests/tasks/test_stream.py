"""Canvases while they are being decoded."""

import threading
from collections.abc import Callable
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import mmdlm
from mmdlm.commands.live import OPEN, colour, drawn, live
from mmdlm.commands.main import main
from mmdlm.data import scenes
from mmdlm.decoding.events import Finished
from mmdlm.layout import Row, Turn
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Packed
from mmdlm.tasks.watch import Canvas


@pytest.fixture(scope="module")
def tiny() -> MultimodalDLM:
    return mmdlm.load("tiny", device="cpu")


@pytest.fixture
def images() -> list[np.ndarray]:
    return [scenes.draw(scenes.random_scene(np.random.default_rng(i), 2)) for i in (3, 4)]


def test_a_caption_fills_up_step_by_step(tiny: MultimodalDLM, images: list) -> None:
    stream = mmdlm.stream(tiny, "caption", images[0], details=True)
    canvases = list(stream)
    first, last = canvases[0], canvases[-1]
    mask = tiny.spec.mask_id
    assert set(first.tokens) == {mask}
    assert (first.step, first.committed, first.finished) == (0, (), False)
    for before, now in zip(canvases, canvases[1:], strict=False):
        assert now.step == before.step + 1
        assert now.committed
        for i, (old, new) in enumerate(zip(before.tokens, now.tokens, strict=True)):
            assert (old != new) == (i in now.committed)
            assert (now.confidence[i] > 0) == (new != mask)
            assert (now.pieces[i] is None) == (new == mask)
    assert last.finished
    answer = stream.result
    assert answer.text == mmdlm.caption(tiny, images[0])
    assert last.tokens[: len(answer.tokens)] == answer.tokens
    assert last.confidence[: len(answer.tokens)] == answer.confidence
    assert "".join(last.pieces).strip() == answer.text


def test_rows_of_a_batch_are_told_apart(tiny: MultimodalDLM, images: list) -> None:
    stream = mmdlm.stream(tiny, "caption", images, batch_size=2)
    last = {canvas.item: canvas for canvas in stream}
    assert stream.result == mmdlm.caption(tiny, images)
    assert ["".join(last[i].pieces).strip() for i in (0, 1)] == stream.result


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("answer", ["what colour is the circle ?"]),
        ("infill", ["a large [MASK] triangle above a small yellow [MASK]"]),
    ],
)
def test_other_tasks_stream_too(task: str, given: list, tiny: MultimodalDLM, images: list) -> None:
    options = {"prompt": "describe the picture"} if task == "infill" else {}
    stream = mmdlm.stream(tiny, task, *given, images[0], **options)
    assert [canvas.finished for canvas in stream][-1]
    assert stream.result == getattr(mmdlm, task)(tiny, *given, images[0], **options)


def test_a_stream_that_is_left_ends_its_thread(tiny: MultimodalDLM, images: list) -> None:
    before = threading.active_count()
    stream = mmdlm.stream(tiny, "caption", images)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    assert list(stream) == []
    assert stream.result is None


def test_errors_of_the_task_reach_whoever_iterates(tiny: MultimodalDLM) -> None:
    with pytest.raises(ValueError, match="task is 'paint', expected one of answer, caption"):
        mmdlm.stream(tiny, "paint")
    with pytest.raises(FileNotFoundError):
        next(mmdlm.stream(tiny, "caption", "nowhere.png"))


def test_a_function_of_ones_own_can_be_watched(tiny: MultimodalDLM, images: list) -> None:
    def twice(model: MultimodalDLM, image: np.ndarray) -> tuple[str, str]:
        return mmdlm.caption(model, image), mmdlm.answer(
            model, "what colour is the circle ?", image
        )

    stream = mmdlm.stream(tiny, twice, images[0])
    assert sum(canvas.finished for canvas in stream) == 2
    assert stream.result == twice(tiny, images[0])


def test_packed_examples_are_requests_of_a_session(tiny: MultimodalDLM, images: list) -> None:
    how = tiny.preset["caption"]
    session, events = mmdlm.Session(tiny, how["strategies"]), []
    for image in images:
        example = Example(
            (user(Media("image", image), how["prompt"]), assistant(Slot(length=how["length"])))
        )
        packed = tiny.processor.pack([example])
        session.add(packed)
        events += session.step()
    while session.keys:
        events += session.step()
    done = {event.key: event for event in events if isinstance(event, Finished)}
    texts = [tiny.tokenizer.decode(done[key].tokens.tolist()).strip() for key in (0, 1)]
    assert texts == mmdlm.caption(tiny, images)
    with pytest.raises(ValueError, match="a packed example brings its canvas"):
        session.add(packed, 4)
    with pytest.raises(ValueError, match="give length="):
        session.add(tiny.embed(packed.prompts))


@pytest.fixture
def terminal() -> Callable[[], Console]:
    return lambda: Console(file=StringIO(), force_terminal=True, width=100, color_system="256")


def test_live_draws_open_positions_and_colours(tiny: MultimodalDLM, images: list, terminal) -> None:
    console = terminal()
    with live(console=console):
        text = mmdlm.caption(tiny, images[0])
    written = console.file.getvalue()
    assert OPEN in written
    assert all(word in written for word in text.split())
    assert "\x1b[1;32m" in written  # bold green: committed just now, with high confidence
    silent = terminal()
    with live(False, silent):
        mmdlm.caption(tiny, images[0])
    assert silent.file.getvalue() == ""


def test_colours_follow_confidence() -> None:
    names = [colour(p) for p in (0.0, 0.2, 0.6, 0.9, 0.99, 1.0)]
    assert names == ["default", "red", "dark_orange", "yellow", "green", "green"]


def test_an_answer_without_a_tokenizer_is_counted() -> None:
    canvas = Canvas(0, 3, (5, 6), (0, 1), (0.5, 0.9), (), True)
    assert drawn(canvas).plain == "   3  2 tokens in this step"


def test_the_command_prints_the_same_with_live(tmp_path, images: list, capsys) -> None:
    from PIL import Image

    file = tmp_path / "scene.png"
    Image.fromarray(np.asarray(images[0])).save(file)
    assert main(["caption", str(file)]) == 0
    plain = capsys.readouterr().out
    assert main(["caption", str(file), "--live"]) == 0
    assert capsys.readouterr().out == plain


def test_a_packed_conversation_extends_a_request(tiny: MultimodalDLM, images: list) -> None:
    image, canvas = tiny.processor.prepare("image", images[0]), torch.full((8,), tiny.spec.mask_id)
    question, more = (tiny.processor.encode(q) for q in ("what colour ?", "is there a square ?"))

    def finished(session: mmdlm.Session) -> Finished:
        events = []
        while session.keys:
            events += session.step()
        return next(event for event in events if isinstance(event, Finished))

    def packed(*texts: Tensor) -> Packed:
        return Packed((Row((image,), (Turn(torch.cat(texts), canvas),)),), (0,), (0,))

    session = mmdlm.Session(tiny, "exact")
    key = session.add(packed(question), keep=True)
    answer = finished(session).tokens
    assert session.extend(key, packed(question, answer, more)) == key
    fresh = mmdlm.Session(tiny, "exact")
    fresh.add(packed(question, answer, more))
    assert finished(session).tokens.equal(finished(fresh).tokens)
