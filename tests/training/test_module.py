"""Training: resuming, processes and batches must not change the result."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmdlm.commands.train import run

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
    process = subprocess.Popen(command(config, *options), env=ENV)
    deadline = time.monotonic() + 120
    while not (cut / "step=4.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    last = torch.load(cut / "last.ckpt", weights_only=True)
    assert 4 <= last["global_step"] < 40
    fit(config, *options, "--ckpt_path", str(cut / "last.ckpt"))
    whole, resumed = weights(tmp_path / "whole" / "step=40.ckpt"), weights(cut / "step=40.ckpt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_two_processes_train_as_one_with_the_doubled_batch(config, tmp_path):
    fit(config, "--data.batch_size.scenes", "8")
    one = losses(tmp_path)
    (tmp_path / "run").rename(tmp_path / "one")
    options = (
        "--trainer.strategy",
        "ddp",
        "--trainer.devices",
        "2",
        "--trainer.callbacks.dirpath",
        str(tmp_path / "ddp"),
    )
    subprocess.run(command(config, *options), env=ENV, check=True, timeout=240)
    two = losses(tmp_path)
    assert one.keys() == two.keys() == set(range(6))
    assert [two[s] for s in one] == pytest.approx(list(one.values()), abs=1e-5)


def test_a_checkpoint_is_trained_further(config, tmp_path):
    import mmdlm

    text = config.read_text()
    begin, end = text.index("  blueprint:"), text.index("  schedule:")
    text = text[:begin] + "  source: tiny\n" + text[end:]
    config.write_text(text.replace("size: 32, questions", "size: 64, questions"))
    fit(config, "--trainer.max_steps", "2")
    before = mmdlm.load("tiny").state_dict()
    after = weights(tmp_path / "ckpt" / "step=2.ckpt")
    assert {f"model.{name}" for name in before} == set(after)
    moved = [name for name, w in before.items() if not torch.equal(w, after[f"model.{name}"])]
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("encoders.image.") for name in moved)
    assert not any(name.startswith("encoders.audio.") for name in moved)  # no sound in these data
