"""Checkpoints after kills, on full disks, and of runs that were stopped."""

import multiprocessing
import os
import resource
import shlex
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdlm import atomic
from mmdlm.commands.train import run
from mmdlm.loading.ckpt import DamagedError
from mmdlm.training import checkpoints
from mmdlm.training.checkpoints import NotSavedError, WholeFileIO
from mmdlm.training.stop import StopBetweenSteps

FORK = multiprocessing.get_context("fork")
CHECKPOINT = {"global_step": 2, "state_dict": {"a": torch.arange(50_000.0)}}


def fit(config, *options):
    run(["fit", "-c", str(config), *options])


def step(path):
    return torch.load(path, weights_only=True)["global_step"]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def in_child(call):
    """Exit code of a call in a forked process."""
    process = FORK.Process(target=call)
    process.start()
    process.join(60)
    return process.exitcode


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """A file that kills the process after some bytes."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            die()
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("point", [0, 500, 100_000, 200_500, "flush", "rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, point):
    path, io = tmp_path / "last.ckpt", WholeFileIO()
    io.save_checkpoint(CHECKPOINT | {"global_step": 1}, path)
    save = torch.save

    def killed():
        if point == "flush":
            atomic._flush = die
        elif point == "rename":
            os.replace = die
        else:
            torch.save = lambda value, file: save(value, Deadly(file, point))
        io.save_checkpoint(CHECKPOINT, path)

    assert in_child(killed) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process wrote
    assert io.load_checkpoint(path)["global_step"] == 1
    monkeypatch.setattr(atomic, "ABANDONED", 0)
    io.save_checkpoint(CHECKPOINT, tmp_path / "epoch=0-step=2.ckpt")
    assert {file.suffix for file in tmp_path.iterdir()} == {".ckpt"}


def test_a_full_disk_is_one_error_and_keeps_the_checkpoint_before(tmp_path):
    path, io = tmp_path / "last.ckpt", WholeFileIO()
    io.save_checkpoint(CHECKPOINT | {"global_step": 1}, path)
    said = FORK.SimpleQueue()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            io.save_checkpoint(CHECKPOINT, path)
        except NotSavedError as error:
            said.put(str(error))

    assert in_child(limited) == 0
    message = said.get()
    assert f"checkpoint of step 2 could not be written to {path}: File too large" in message
    assert f"resume with --ckpt_path {path}" in message
    assert "\n" not in message
    assert io.load_checkpoint(path)["global_step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_room_ends_with_that_error(config, tmp_path, monkeypatch):
    save, tries = torch.save, []

    def full(value, file):
        tries.append(value["global_step"])
        if value["global_step"] < 4:
            return save(value, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(NotSavedError, match="of step 4 .*No space left.*--ckpt_path .*last.ckpt"):
        fit(config)
    assert tries == [2, 2, 4]  # not once more on the way out
    assert step(tmp_path / "ckpt" / "last.ckpt") == 2


def test_other_errors_while_saving_are_shown_as_they_are(tmp_path):
    with pytest.raises(AttributeError, match="Can't"):
        WholeFileIO().save_checkpoint({"a": lambda: 0}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_no_temporary_folder_is_needed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    fit(config, "--trainer.max_steps", "2")
    assert step(tmp_path / "ckpt" / "last.ckpt") == 2


def test_a_damaged_checkpoint_names_the_newest_whole_one(config, tmp_path):
    fit(config)
    last, data = tmp_path / "ckpt" / "last.ckpt", (tmp_path / "ckpt" / "last.ckpt").read_bytes()
    (tmp_path / "ckpt" / "step=4.ckpt").write_bytes(data[:-1])
    os.utime(tmp_path / "ckpt" / "step=2.ckpt")
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1  # torch itself would read it
    for damaged in (data[:-500], b"", bytes(changed)):
        last.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"last\.ckpt .*cut short.* is .*step=2\.ckpt"):
            fit(config, "--ckpt_path", str(last))
        assert last.read_bytes() == damaged
    (tmp_path / "alone").mkdir()
    alone = last.rename(tmp_path / "alone" / "last.ckpt")
    with pytest.raises(DamagedError, match="no other beside it is whole"):
        fit(config, "--ckpt_path", str(alone))


def test_last_that_finds_nothing_says_where_it_looked(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no last\.ckpt in {tmp_path}/ckpt; so leave"):
        fit(config, "--ckpt_path", "last")
    fit(config, "--trainer.max_steps", "2")
    (tmp_path / "ckpt").rename(tmp_path / "run" / "version_0" / "checkpoints")
    text = config.read_text().replace(f"dirpath: {tmp_path}/ckpt, ", "").replace("version: 0, ", "")
    config.write_text(text)
    near = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match=f"run/version_1/checkpoints.*--ckpt_path {near}"):
        fit(config, "--ckpt_path", "last")


def test_last_is_the_newest_and_resumes_to_the_same_bits(config, tmp_path):
    options = ("--model.schedule.decay", "0", "--trainer.callbacks.every_n_train_steps", "4")
    fit(config, *options, "--trainer.callbacks.dirpath", str(tmp_path / "whole"))
    fit(config, *options, "--trainer.max_steps", "3")  # a step that is saved only as the last one
    assert step(tmp_path / "ckpt" / "last.ckpt") == 3
    fit(config, *options, "--ckpt_path", "last")
    paths = (tmp_path / "whole" / "last.ckpt", tmp_path / "ckpt" / "last.ckpt")
    assert [step(path) for path in paths] == [6, 6]
    whole, resumed = map(weights, paths)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "ckpt" / "last-v1.ckpt").exists()


HELD_OUT = """  val:
    scenes:
      class_path: mmdlm.data.scenes.Scenes
      init_args: {size: 32, objects: [1], seed: 1}
  val_rows: 64
"""


@pytest.mark.parametrize(
    ("number", "status", "point"),
    [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 4)],
    ids=["between steps", "interrupt, in a validation", "at the end of a validation"],
)
def test_a_stopped_run_says_how_to_go_on(
    config, tmp_path, monkeypatch, capfd, number, status, point
):
    config.write_text(config.read_text() + HELD_OUT)
    options = ("--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null")
    options += ("--trainer.num_sanity_val_steps", "0")
    fit(config, *options, "--trainer.callbacks.dirpath", str(tmp_path / "whole"))
    stop, calls = StopBetweenSteps._stop, []

    def signalled(self, trainer):
        calls.append(trainer.global_step)
        if len(calls) == point:
            os.kill(os.getpid(), number)
        stop(self, trainer)

    monkeypatch.setattr(StopBetweenSteps, "_stop", signalled)
    # Nothing asks for a checkpoint on the way out, and the step is kept all the same.
    config.write_text(config.read_text().replace("save_on_exception: true", "save_top_k: -1"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        fit(config, *options)
    assert ended.value.code == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capfd.readouterr().err.splitlines()
    assert f"mmdlm: stopped by {number.name}; step 2 of 6 is saved; resume with" in said
    command = shlex.split(said[-1])
    assert command[:3] == ["mmdlm", "fit", "-c"]
    assert step(command[command.index("--ckpt_path") + 1]) == 2
    run(command[1:])
    whole, resumed = (weights(tmp_path / name / "last.ckpt") for name in ("whole", "ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_in_the_last_step_ends_a_whole_run(config, tmp_path, monkeypatch):
    stop = StopBetweenSteps._stop

    def signalled(self, trainer):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        stop(self, trainer)

    monkeypatch.setattr(StopBetweenSteps, "_stop", signalled)
    fit(config)
    assert step(tmp_path / "ckpt" / "last.ckpt") == 6


def test_gradients_that_are_summed_are_not_cut(monkeypatch):
    stopper, trainer = StopBetweenSteps(), SimpleNamespace(accumulate_grad_batches=3)
    seen = []
    monkeypatch.setattr(StopBetweenSteps, "_stop", lambda self, _: seen.append(batch))
    for batch in range(6):
        stopper.on_train_batch_end(trainer, None, None, None, batch)
    assert seen == [2, 5]


def test_a_run_that_gives_its_own_way_to_write_keeps_it(config, tmp_path):
    text = config.read_text().replace(
        "  max_steps: 6",
        "  max_steps: 2\n  plugins: [{class_path: tests.training.test_checkpoints.Counting}]",
    )
    config.write_text(text)
    Counting.written.clear()
    fit(config)
    assert [Path(path).name for path in Counting.written] == ["step=2.ckpt", "last.ckpt"]


class Counting(WholeFileIO):
    """A plugin of a user."""

    written: list[str] = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.written.append(path)
        super().save_checkpoint(checkpoint, path, storage_options)
