"""Training: resuming, processes and batches must not change the result."""

import csv
import inspect
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.commands.train import run
from mmdlm.objectives.grounded import Grounded
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.next_token import NextToken
from mmdlm.training.data import Data
from mmdlm.training.module import Module
from mmdlm.training.new_model import NewModel
from mmdlm.training.optimizer import AdamW, Schedule
from mmdlm.training.tune import Rate
from tests.training.conftest import ended, fit_in_two, start_two

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def losses(folder):
    """Training loss by step, of every part of a run."""
    found = {}
    for row in csv.DictReader((folder / "run" / "version_0" / "metrics.csv").open()):
        if row.get("train/scenes/loss"):
            found[int(row["step"])] = float(row["train/scenes/loss"])
    return found


def fit(config, *options):
    run(["fit", "-c", str(config), *options])


def command(config, *options):
    return [sys.executable, "-m", "mmdlm.commands.train", "fit", "-c", str(config), *options]


def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path):
    fit(config)
    whole = weights(tmp_path / "ckpt" / "step=6.ckpt")
    fit(
        config,
        "--ckpt_path",
        str(tmp_path / "ckpt" / "step=2.ckpt"),
        "--trainer.callbacks.dirpath",
        str(tmp_path / "again"),
    )
    resumed = weights(tmp_path / "again" / "step=6.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    start = weights(tmp_path / "ckpt" / "step=2.ckpt")
    assert any(not torch.equal(whole[k], start[k]) for k in whole)


def test_sigterm_saves_and_resumes_to_the_same_bits(config, tmp_path):
    fit(config, "--trainer.max_steps", "40", "--trainer.callbacks.dirpath", str(tmp_path / "whole"))
    cut = tmp_path / "cut"
    options = ("--trainer.max_steps", "40", "--trainer.callbacks.dirpath", str(cut))
    process = subprocess.Popen(
        command(config, *options), env=ENV, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (cut / "step=4.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert said.splitlines()[-1].endswith(f"--ckpt_path {os.path.relpath(cut / 'last.ckpt')}")
    last = torch.load(cut / "last.ckpt", weights_only=True)
    assert 4 <= last["global_step"] < 40
    fit(config, *options, "--ckpt_path", str(cut / "last.ckpt"))
    whole, resumed = weights(tmp_path / "whole" / "step=40.ckpt"), weights(cut / "step=40.ckpt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("to_all", [False, True], ids=["first process", "all processes"])
def test_two_processes_stop_at_the_same_step(config, tmp_path, capfd, to_all):
    options = ("--trainer.strategy", "ddp", "--trainer.max_steps", "4000")
    processes = start_two(config, *options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ckpt" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in processes if to_all else processes[:1]:
        os.kill(each.pid, signal.SIGTERM)
    assert ended(processes) == [143, 0]
    step = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["global_step"]
    assert f"step {step} of 4000 is saved" in capfd.readouterr().err


def test_two_processes_train_as_one_with_the_doubled_batch(config, tmp_path):
    fit(config, "--data.batch_size.scenes", "8")
    one = losses(tmp_path)
    (tmp_path / "run").rename(tmp_path / "one")
    options = ("--trainer.strategy", "ddp", "--trainer.callbacks.dirpath", str(tmp_path / "ddp"))
    assert fit_in_two(config, *options) == [0, 0]
    two = losses(tmp_path)
    assert one.keys() == two.keys() == set(range(6))
    assert [two[s] for s in one] == pytest.approx(list(one.values()), abs=1e-5)


def test_a_checkpoint_is_trained_further(config, tmp_path):
    import mmdlm

    from_tiny(config)
    fit(config, "--trainer.max_steps", "2")
    before = mmdlm.load("tiny").state_dict()
    after = weights(tmp_path / "ckpt" / "step=2.ckpt")
    assert {f"model.{name}" for name in before} == set(after)
    moved = [name for name, w in before.items() if not torch.equal(w, after[f"model.{name}"])]
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("encoders.image.") for name in moved)
    assert not any(name.startswith("encoders.audio.") for name in moved)  # no sound in these data


def rows(folder):
    """Rows of a run's metrics.csv."""
    return list(csv.DictReader((folder / "run" / "version_0" / "metrics.csv").open()))


def from_tiny(config, settings=""):
    """The config with the bundled model in place of a new one, and further settings of `model`."""
    text = config.read_text()
    begin, end = text.index("  blueprint:"), text.index("  schedule:")
    text = text[:begin] + "  source: tiny\n" + settings + text[end:]
    config.write_text(text.replace("size: 32, questions", "size: 64, questions"))


def test_tune_freezes_and_slows_parts_of_a_checkpoint(config, tmp_path):
    import mmdlm

    from_tiny(
        config,
        """  optimizer: {lr: 1e-3, weight_decay: 0.0}
  tune:
    "encoders.*": frozen
    "backbone.*": {lr: 1e-6}
""",
    )
    fit(config, "--trainer.max_steps", "2", "--model.schedule.warmup", "0")
    before = mmdlm.load("tiny", pack=False).state_dict()
    saved = torch.load(tmp_path / "ckpt" / "step=2.ckpt", weights_only=True)
    after = {name.removeprefix("model."): w for name, w in saved["state_dict"].items()}
    moved = {name: (after[name] - w).abs().max().item() for name, w in before.items()}
    assert all(moved[name] == 0 for name in moved if name.startswith("encoders."))
    # Two steps of Adam move a weight by at most about twice its learning rate.
    backbone = [moved[name] for name in moved if name.startswith("backbone.")]
    assert 0 < max(backbone) < 3e-6
    assert max(moved[name] for name in moved if name.startswith("adapters.image.")) > 5e-4
    names = [group["name"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert names == ["default", "default (no decay)", "backbone.*", "backbone.* (no decay)"]


def test_checkpointing_and_chunks_leave_the_losses_alone(config, tmp_path):
    fit(config)
    plain = losses(tmp_path)
    (tmp_path / "run").rename(tmp_path / "plain")
    fit(
        config,
        "--model.checkpointing",
        "true",
        "--model.objective.init_args.chunk",
        "3",
        "--trainer.callbacks.dirpath",
        str(tmp_path / "again"),
    )
    again = losses(tmp_path)
    assert plain.keys() == again.keys() == set(range(6))
    assert [again[step] for step in plain] == pytest.approx(list(plain.values()), rel=1e-5)


def test_checkpointing_reaches_the_backbone():
    assert small(checkpointing=True).model.backbone.checkpointing
    assert not small().model.backbone.checkpointing


def test_workers_do_not_change_a_run(config, tmp_path):
    fit(config)
    fit(config, "--data.workers", "2", "--trainer.callbacks.dirpath", str(tmp_path / "workers"))
    one, two = (weights(tmp_path / name / "step=6.ckpt") for name in ("ckpt", "workers"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradients_are_clipped_with_a_fused_optimizer_in_bfloat16(config, tmp_path):
    fit(config, "--trainer.precision", "bf16-mixed", "--model.optimizer.fused", "true")
    saved = torch.load(tmp_path / "ckpt" / "step=6.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["fused"] is True
    assert all(w.isfinite().all() for w in saved["state_dict"].values())


def test_validate_and_test_measure_a_checkpoint(config, tmp_path):
    fit(config)
    held_out = """  {name}:
    scenes:
      class_path: mmdlm.data.scenes.Scenes
      init_args: {size: 32, objects: [1], seed: 1}
"""
    parts = [held_out.replace("{name}", name) for name in ("val", "test")]
    config.write_text(config.read_text() + "".join(parts) + "  val_rows: 4\n")
    found = {}
    for command, prefix in (("validate", "val"), ("test", "test")):
        options = ["-c", str(config), "--ckpt_path", str(tmp_path / "ckpt" / "step=6.ckpt")]
        run([command, *options])
        found[prefix] = float(rows(tmp_path)[-1][f"{prefix}/scenes/ce"])
    assert found["val"] == found["test"] > 0
    config.write_text(config.read_text().replace(parts[1], ""))
    run(["test", *options])
    assert float(rows(tmp_path)[-1]["test/scenes/ce"]) == found["val"]
    config.write_text(config.read_text().replace(parts[0], ""))
    for command, needed in (("validate", r"give data\.val"), ("test", r"data\.test or data\.val")):
        with pytest.raises(ValueError, match=f"{command}: there are no .*{needed}"):
            run([command, *options])


def small(**settings):
    """A module with a model of one layer."""
    backbone = TransformerConfig(width=8, layers=1, heads=1, inner=8)
    return Module(Masked(), **{"blueprint": NewModel(backbone), "words": ["a"]} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blueprint": None}, "neither of source and blueprint are given"),
        ({"source": "tiny"}, "both of source and blueprint are given"),
        (
            {"blueprint": None, "source": "tiny", "init": "a.ckpt"},
            r"init='a\.ckpt' has no effect beside source='tiny'",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_a_missing_init_is_named():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint absent\.ckpt"):
        small(init="absent.ckpt")


def test_actions_need_a_policy(tmp_path):
    from mmdlm.checkpoint import save

    save(small().model, tmp_path / "text")
    statistics = {"action": {}, "state": {}}
    with pytest.raises(ValueError, match="the data hold actions, but .* has no action vocabulary"):
        small(blueprint=None, source=str(tmp_path / "text"), data_statistics=statistics)


def test_learning_rate_warms_up_and_falls():
    module = small(schedule=Schedule(warmup=10, decay=0.5, final=0.1))
    module._trainer = SimpleNamespace(max_steps=100, max_epochs=-1)
    rates = [module.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))


def test_every_argument_of_the_command_line_is_documented():
    from docstring_parser import parse

    for kind in (Module, Data, NewModel, AdamW, Schedule, Rate, Masked, NextToken, Grounded):
        described = {each.arg_name for each in parse(kind.__doc__).params if each.description}
        assert described == set(list(inspect.signature(kind).parameters)), kind


def test_a_checkpoint_of_another_vocabulary_is_refused():
    saved = {}
    small(words=["a"]).on_save_checkpoint(saved)
    small(words=["a"]).on_load_checkpoint(saved)
    with pytest.raises(ValueError, match="the checkpoint was trained with another vocabulary"):
        small(words=["b"]).on_load_checkpoint(saved)
