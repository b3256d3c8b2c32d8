import sys
from functools import partial

import pytest
import torch
from PIL import Image

from adapters.action_bins import ActionBins
from adapters.mlp import MLP
from adapters.normalize import Normalizer
from adapters.robot import Robot
from encoders.state import StateEncoder
from encoders.vit import ViT
from encoders.whisper import WhisperEncoder
from mmdlm import demo as module
from mmdlm.backbones.family import Spec
from mmdlm.backbones.transformer import TransformerConfig
from mmdlm.data import digits, speech
from mmdlm.data.scenes import Scenes
from mmdlm.demo import demo
from mmdlm.model import MultimodalDLM
from mmdlm.simulators.rollout import evaluate
from mmdlm.text import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*filled the canvas")


def build(seed=0, **spec):
    """An untrained policy for the toy that also has words for pictures."""
    words = sorted(
        {
            *Scenes().vocabulary(),
            *digits.WORDS,
            *digits.QUESTION.split(),
            *speech.words(),
            *["go", "to", "the", "red", "green", "blue", "disc"],
        }
    )
    tokenizer = Tokenizer.from_words(words, actions=16)
    config = TransformerConfig(
        vocab=len(tokenizer), width=32, layers=1, heads=2, inner=64, qk_norm="head"
    )
    ends = {"mask_id": 2, "eos_id": 1, "pad_id": 0, "attention": "cascade"}
    unit = {name: [value] * 2 for name, value in (("q01", -1.0), ("q99", 1.0))}
    robot = Robot(
        ActionBins(16, last_id=len(tokenizer) - 1, reverse=False),
        Normalizer(unit),
        Normalizer(unit),
        chunk=3,
    )
    torch.manual_seed(seed)
    encoders = {
        "image": ViT(size=32, patch=8, dim=32, depth=1, heads=2),
        "state": StateEncoder(2, dim=32),
    }
    encoders["audio"] = WhisperEncoder(dim=32, layers=1, heads=2, seconds=None, positions=200)
    adapters = {name: MLP(32, 32, layers=1) for name in encoders}
    model = MultimodalDLM(
        Spec("mmdlm", config, **ends | spec), encoders, adapters, tokenizer, robot
    )
    model.backbone.reset(torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def model(monkeypatch):
    built = build()
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


def test_demo_of_a_model_that_is_no_policy(model, tmp_path, capsys, monkeypatch):
    model.robot = None
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    speech.espeak.cache_clear()
    assert demo(tmp_path, "untrained") == 0
    assert "no policy" in capsys.readouterr().out
