"""Commands of the speed laboratory, with workers in this process."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from tests.speed import (
    answer_shapes,
    decode_speed,
    encode_speed,
    floors,
    roofline,
    shapes,
    systems,
    train_shapes,
    train_speed,
)
from tests.speed.__main__ import main, parser
from tests.speed.shapes import SHAPES, Shape
from tests.speed.systems import Answer, runner
from tests.speed.worker import Server

TINY = SHAPES["tiny"]


class Inline(Server):
    """A worker in this process, which is faster to start."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def request(self, **fields):
        return self.answer(fields)


@pytest.fixture
def inline(monkeypatch):
    for module in (decode_speed, encode_speed, floors, train_speed):
        monkeypatch.setattr(module, "Worker", lambda name, threads: Inline())


def test_decode_of_actions_reports_latencies(inline, monkeypatch, tmp_path, capsys):
    small = Shape("act8-1", TINY.transformer, (8,), 8, 8, 1, limited=True)
    monkeypatch.setitem(SHAPES, "act8-1", small)
    out = tmp_path / "a.jsonl"
    assert main(["decode", "--shape", "act8", "--mode", "none", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "p95 ms" in printed
    last = json.loads(out.read_text().splitlines()[-1])
    assert last["gate"] is True
    assert last["actions_per_s"] == pytest.approx(8 * last["queries_per_s"])
    assert last["actions_per_s"] == pytest.approx(8 / last["seconds"])


def test_roofline_reports_floor_and_share(inline, monkeypatch, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    quick = partial(roofline.rates, seconds=0.1)
    monkeypatch.setattr(roofline, "rates", quick)
    args = ["--shape", "tiny", "--mode", "dual", "--rounds", "1", "--json", str(out)]
    assert main(["roofline", *args]) == 0
    last = json.loads(out.read_text().splitlines()[-1])
    assert 0 < last["reached"] < 1.5
    assert last["floor_ms"] == pytest.approx(1e3 * last["reached"] * last["seconds"])
    assert last["copy"] > 1e8
    assert "GFLOP/s" in capsys.readouterr().out
    assert main(["roofline", "--shape", "llada8b-499", "--rates", "h200"]) == 0
    assert "163." in capsys.readouterr().out


def test_encode_counts_tokens(inline, tmp_path, capsys):
    out = tmp_path / "e.jsonl"
    assert main(["encode", "--shape", "vit-64x1", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["warmup"] for row in rows] == [True, False, False, False]
    assert {row["new_tokens"] for row in rows} == {64}
    assert "vit-64x1" in capsys.readouterr().out


def test_gate_fails_for_other_tokens_or_more_forwards(inline, monkeypatch, capsys):
    def wrong(system, *args):
        run = runner(system, *args)
        return run if system == "plain" else lambda: Answer([[7] * 32], 8)

    monkeypatch.setattr(systems, "runner", wrong)
    assert main(["decode", "--shape", "tiny", "--mode", "none", "--rounds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "gate:" in printed
    assert "do not count" in printed


def test_train_compares_losses_and_names_where_time_goes(inline, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert main(["train", "--shape", "train-tiny", "--rounds", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "optimizer" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    losses = {s: [r["loss"] for r in rows if r["system"] == s] for s in ("plain", "mmdlm")}
    assert losses["mmdlm"] == pytest.approx(losses["plain"], rel=1e-5)
    assert len(set(losses["mmdlm"])) == 3  # each round is a further step
    last = rows[-1]
    assert last["gate"] is True
    assert sum(last["parts"].values()) == pytest.approx(last["cpu_seconds"], rel=0.3)


def test_published_loss_is_the_exact_one():
    shape = train_shapes.TRAININGS["train-tiny"]
    plain = train_shapes.trainer("plain", shapes.synthetic(shape.transformer), shape, 0)
    for _ in range(2):
        wanted = plain.exact()
        assert plain.step()[0] == pytest.approx(wanted, rel=1e-5)


def test_train_gate_fails_for_another_loss(inline, monkeypatch, capsys):
    class Half(train_shapes.PlainTrainer):
        def exact(self, *given):
            return super().exact(*given) / 2

    monkeypatch.setattr(train_shapes, "PlainTrainer", Half)
    assert main(["train", "--shape", "train-tiny", "--rounds", "1"]) == 1
    assert "losses differ" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for name in ("decode", "lavida", "encode", "train", "roofline", "compare"):
        assert f"    {name} " in printed


def test_commands_of_the_readme_are_valid():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m tests\.speed (\w+ [^`#\n]+)", readme)
    assert len(commands) >= 3
    for command in commands:
        given = parser().parse_args(shlex.split(command))
        if command.startswith(("train", "lavida")):
            found = train_shapes if command.startswith("train") else answer_shapes
            assert found.find(given.shape)
            continue
        assert shapes.find(given.shape)
        assert systems.check_modes(given.mode)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["decode", "--shape", "tinny"], "did you mean tiny? known: tiny, cap256, cap768"),
        (["encode", "--shape", "whisper"], "known: vit-64x1, siglip-384x5, whisper-s-30s"),
        (["decode", "--mode", "triple"], "no mode 'triple'; known: none, prefix, dual, prefix-lm"),
        (["train", "--shape", "all51"], "did you mean all512? known: train-tiny"),
        (["train", "--compile"], "--compile has no effect on a training step"),
        (["decode", "--rounds", "0"], "rounds is 0, expected at least 1"),
        (["decode", "--dtype", "int8"], "dtype is 'int8', expected one of 'auto', 'float32'"),
        (["roofline", "--shape", "thr256", "--rates", "h200"], "no fixed number of steps"),
    ],
)
def test_invalid_options_are_rejected_before_the_run(args, message, capsys):
    assert main(args) == 2
    assert message in capsys.readouterr().err
