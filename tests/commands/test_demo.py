import sys
from functools import partial

import pytest
from PIL import Image

from mmdlm.commands import demo as module
from mmdlm.commands.demo import demo
from mmdlm.data import speech
from mmdlm.simulators.rollout import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


@pytest.fixture
def model(build, monkeypatch):
    built = build(audio=True)
    built.preset = {"act": {"tasks": ["toy"]}}
    monkeypatch.setattr(module, "load", lambda name, device: built)
    monkeypatch.setattr(module, "evaluate", partial(evaluate, horizon=8))
    return built


def test_demo_writes_what_it_names(model, tmp_path, capsys):
    for package in ("sklearn", "espeakng_loader", "imageio_ffmpeg"):
        pytest.importorskip(package, reason="pip install mmdlm[data,speech,demo]")
    assert demo(tmp_path / "out", "untrained") == 0
    said = capsys.readouterr().out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("picture.png", "caption.png", "caption.gif", "digit.png", "speech.wav", "speech.txt"),
        *("toy-seed345.mp4", "journeys.png"),
    }
    assert Image.open(tmp_path / "out" / "journeys.png").height > 400  # the video's frames too
    assert Image.open(tmp_path / "out" / "picture.png").size == (64, 64)
    for word in ("caption", "handwritten digit", "speech", "robot", "toy", "seconds", "in all"):
        assert word in said
    assert said.count("true: ") == 5  # caption, two questions, digit, speech


def test_demo_goes_on_without_extras(model, tmp_path, capsys, monkeypatch):
    for package in ("sklearn", "sklearn.datasets", "espeakng_loader", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, package, None)
    speech.espeak.cache_clear()
    assert demo(tmp_path, "untrained") == 0
    said = " ".join(capsys.readouterr().out.split())
    for extra in ("data", "speech", "sim"):
        assert f'pip install "mmdlm[{extra}]"' in said
    assert (tmp_path / "caption.png").exists()


def test_demo_says_what_drawing_needs(model, tmp_path, capsys, monkeypatch):
    model.preset = {"act": {"tasks": ["drawer-close-v3"]}}
    monkeypatch.setattr(module, "choose_gl", lambda: None)
    for package in ("sklearn", "sklearn.datasets", "espeakng_loader"):
        monkeypatch.setitem(sys.modules, package, None)
    speech.espeak.cache_clear()
    assert demo(tmp_path, "untrained") == 0
    assert "apt-get install" in capsys.readouterr().out


def test_demo_of_a_model_that_is_not_a_policy(model, tmp_path, capsys, monkeypatch):
    model.robot = None
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    speech.espeak.cache_clear()
    assert demo(tmp_path, "untrained") == 0
    assert "not a policy" in capsys.readouterr().out
