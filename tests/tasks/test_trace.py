from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.decoding.decode import Decoded, History
from mmdlm.tasks.generate import Answer
from mmdlm.tasks.trace import HIGH, LOW, draw_trace, token_texts
from mmdlm.text import Tokenizer


def spoken(*words):
    """An answer of (word, step, confidence)."""
    size = len(words)
    texts, steps, sure = zip(*words, strict=True) if words else ((), (), ())
    return Answer(" ".join(texts), (5,) * size, 2, 0.1, sure, steps, tuple(words))


def has(path, colour):
    return (np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).any()


def test_one_line_per_step_with_confidence_as_colour(tmp_path):
    sure = draw_trace(spoken(("a", 0, 1.0), ("star", 0, 1.0)), tmp_path / "sure.png")
    unsure = draw_trace(spoken(("a", 0, 0.0), ("star", 2, 1.0)), tmp_path / "deep" / "unsure.png")
    assert has(sure, HIGH)
    assert has(unsure, LOW)
    height = Image.open(unsure).height - Image.open(sure).height
    assert height == 2 * 36  # two more steps


def test_image_and_title_enlarge_the_page(tmp_path):
    answer, image = spoken(("star", 0, 1.0)), Image.new("RGB", (64, 64), (1, 2, 250))
    bare = draw_trace(answer, tmp_path / "bare.png")
    full = draw_trace(answer, tmp_path / "full.png", image=image, title="describe the picture")
    assert has(full, (1, 2, 250))
    assert not has(bare, (1, 2, 250))
    assert Image.open(full).width > Image.open(bare).width


def test_gif_shows_the_steps_one_after_the_other(tmp_path):
    answer = spoken(("a", 0, 0.9), ("red", 1, 0.4), ("star", 2, 0.8))
    file = draw_trace(answer, tmp_path / "trace.gif")
    assert Image.open(file).n_frames == 4  # all masks, then three steps


def test_decode_is_drawn_up_to_its_end_token(tmp_path):
    history = History(torch.tensor([[0, 1, 0, -1]]), torch.tensor([[0.9, 0.5, 1.0, 0.0]]))
    decoded = Decoded(torch.zeros(1, 6, dtype=torch.long), 2, history)
    long = draw_trace(decoded, tmp_path / "a.png", ["a", "star", "circle", "circle"])
    short = draw_trace(decoded, tmp_path / "b.png", ["a", "star", "<eos>", "<eos>"])
    assert Image.open(short).size[1] == Image.open(long).size[1]
    assert short.read_bytes() != long.read_bytes()
    with pytest.raises(ValueError, match="tokens has 1 items"):
        draw_trace(decoded, tmp_path / "c.png", ["a"])


def test_empty_answer_is_drawn(tmp_path):
    assert draw_trace(spoken(), tmp_path / "empty.png").exists()


def test_other_suffixes_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.gif"):
        draw_trace(spoken(("a", 0, 1.0)), tmp_path / "trace.svg")


def test_texts_of_token_ids():
    spec = SimpleNamespace(eos_id=1, stop_ids=())
    model = SimpleNamespace(tokenizer=Tokenizer.from_words(["a", "star"]), spec=spec)
    assert token_texts(model, torch.tensor([3, 4, 1])) == ["a", "star", "<eos>"]
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer.json"):
        token_texts(model, torch.tensor([3]))
