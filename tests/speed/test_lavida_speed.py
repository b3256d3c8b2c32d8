"""Whole answers about an image: equal to those of the published inference, written plainly."""

import json

import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.decoding.commits.time_shift import shifted
from mmdlm.systems.lavida import STRATEGIES
from tests.speed import answer_systems
from tests.speed.__main__ import main
from tests.speed.answer_shapes import SHAPES, write
from tests.speed.answer_systems import runner
from tests.speed.plain_lavida import PlainLaViDa, shift_counts
from tests.speed.systems import Answer
from tests.speed.test_main import Inline

TWO = SHAPES["lavida-tiny-x2"]


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr("tests.speed.decode_speed.Worker", lambda name, threads: Inline())


def test_answers_about_an_image_are_those_of_the_published_inference(inline, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    given = ["--shape", "lavida-tiny,lavida-tiny-x2", "--mode", "none,prefix-lm", "--rounds", "1"]
    assert main(["lavida", *given, "--seed", "3", "--warmup", "0", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours, plain = ([r for r in rows if r["system"] == s] for s in ("mmdlm", "plain"))
    assert [r["gate"] for r in ours] == [True] * 4
    assert [r["new_tokens"] for r in ours] == [16, 16, 32, 32]
    assert [r["forwards"] for r in ours] == [8, 8, 16, 16]
    assert [r["forwards"] for r in plain] == [8, 9, 16, 18]
    assert len({r["tokens_sha"] for r in ours}) == 4  # modes and questions make a difference
    assert "lavida-tiny-x2" in capsys.readouterr().out


def test_kept_features_give_the_same_answer(inline, monkeypatch, tmp_path):
    encoded = []
    method = mmdlm.model.MultimodalDLM.encode
    monkeypatch.setattr(
        mmdlm.model.MultimodalDLM, "encode", lambda *a: encoded.append(a) or method(*a)
    )
    out = tmp_path / "a.jsonl"
    given = ["--shape", "lavida-tiny-again", "--rounds", "2", "--json", str(out)]
    assert main(["lavida", *given]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["gate"] for r in rows if r["system"] == "mmdlm"] == [True] * 3
    assert len(encoded) == 1


def test_gate_fails_for_other_tokens(inline, monkeypatch, capsys):
    def wrong(system, *args):
        run = runner(system, *args)
        return run if system == "plain" else lambda: Answer([[7] * 16], 8)

    monkeypatch.setattr(answer_systems, "runner", wrong)
    assert main(["lavida", "--shape", "lavida-tiny", "--rounds", "1", "--warmup", "0"]) == 1
    assert "do not count" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(120, 90), (56, 200), (71, 40), (90, 90)])
def test_plain_image_embeddings_equal_those_of_the_model(size, tmp_path):
    folder = write(TWO, tmp_path, 1)
    with Image.open(folder / "image.png") as image:
        image.resize(size).save(folder / "other.png")
    model = mmdlm.load(folder, device="cpu")
    plain = PlainLaViDa(model, folder, TWO.config)
    item = model.processor.prepare("image", folder / "other.png")
    with torch.inference_mode():
        (ours,) = model.encode("image", [item])
        torch.testing.assert_close(ours, plain.image(folder / "other.png"), rtol=1e-4, atol=1e-4)
    assert len(item.tensor) >= 3


def test_schedule_is_that_of_the_checkpoint():
    # LaViDa's counts for 32 tokens in 16 steps at a shift of 0.33.
    assert shift_counts(32, 16) == [6, 4, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert shift_counts(16, 8) == shifted(16, 8, 0.33, "shift")
    assert STRATEGIES[1]["init_args"]["shift"] == 0.33


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "lavida-tin"], "did you mean lavida-tiny? known: lavida-tiny, lavida-tiny-x2"),
        (["--mode", "dual"], "LaViDa has no mode 'dual'; known: none, prefix-lm"),
        (["--compile"], "--compile is not supported here"),
    ],
)
def test_invalid_options_are_rejected_before_the_run(args, message, capsys):
    assert main(["lavida", *args]) == 2
    assert message in capsys.readouterr().err
