"""Two processes, split weights, precisions and averaged weights."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemWriter

from mmdlm.commands.export import export
from mmdlm.commands.train import run
from mmdlm.loading.ckpt import DamagedError, is_whole, newest_whole, read, trained
from mmdlm.loading.sharded import INDEX
from mmdlm.training.strategies import load_whole
from tests.training.conftest import fit_in_two
from tests.training.test_module import from_tiny, losses

SHARDED = """
trainer:
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, process_group_backend: gloo}
"""


def fit(config, *options):
    run(["fit", "-c", str(config), *options])


@pytest.fixture
def sharded(config, tmp_path):
    """Options with which a run is split over two processes."""
    file = tmp_path / "sharded.yaml"
    file.write_text(SHARDED)
    return ("-c", str(file))


def test_split_weights_train_as_whole_ones_and_are_exported(config, tmp_path, sharded, capsys):
    fit(config, "--data.batch_size.scenes", "8")
    one, whole = losses(tmp_path), trained(tmp_path / "ckpt" / "last.ckpt")
    (tmp_path / "run").rename(tmp_path / "one")
    folder = tmp_path / "split"
    assert fit_in_two(config, *sharded, "--trainer.callbacks.dirpath", str(folder)) == [0, 0]
    two = losses(tmp_path)
    assert one.keys() == two.keys() == set(range(6))
    assert [two[s] for s in one] == pytest.approx(list(one.values()), abs=1e-5)
    model = trained(folder / "last.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-4), name
    assert export(str(folder / "last.ckpt"), tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # A checkpoint that is cut short is refused, and the newest whole one is named.
    shard = next((folder / "last.ckpt").glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert not is_whole(folder / "last.ckpt")
    assert newest_whole(folder.glob("*.ckpt")) == folder / "step=6.ckpt"
    with pytest.raises(ValueError, match="cut short"):
        read(folder / "last.ckpt")


# An encoder that no step trains, as the data have no sound.
UNTRAINED = (
    "{class_path: encoders.whisper.WhisperEncoder, init_args: {dim: 16, layers: 1, heads: 2}}"
)


class Killed(Callback):
    """Kills a process of a split run.

    Args:
        rank: the process; None for both.
        when: "training", in step 4; or "writing a shard" or "after shards" are written, while
            the checkpoint of that step is saved.
    """

    def __init__(self, rank: int | None, when: str) -> None:
        self.rank, self.when = rank, when

    def setup(self, trainer, pl_module, stage):
        save, write = ModelParallelStrategy.save_checkpoint, FileSystemWriter.write_data

        def save_all(*given):
            save(*given)
            self.kill(trainer, "after shards", trainer.global_step == 4)

        def write_own(*given):
            self.kill(trainer, "writing a shard", trainer.global_step == 4)
            return write(*given)

        ModelParallelStrategy.save_checkpoint = save_all
        FileSystemWriter.write_data = write_own

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kill(trainer, "training", trainer.global_step == 3)

    def kill(self, trainer, when, now):
        if now and when == self.when and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rank", "when", "codes"),
    [
        (1, "writing a shard", [1, -9]),
        pytest.param(None, "training", [-9, -9], marks=pytest.mark.slow),
        pytest.param(1, "training", [1, -9], marks=pytest.mark.slow),
        pytest.param(0, "after shards", [-9, 1], marks=pytest.mark.slow),
    ],
)
def test_a_killed_split_run_resumes_to_the_same_bits(config, tmp_path, sharded, rank, when, codes):
    config.write_text(
        config.read_text()
        .replace("    encoders:\n", f"    encoders:\n      audio: {UNTRAINED}\n")
        .replace("    adapters:\n", "    adapters:\n      audio: {class_path: adapters.mlp.MLP}\n")
    )
    whole, cut = (("--trainer.callbacks.dirpath", str(tmp_path / n)) for n in ("whole", "cut"))
    assert fit_in_two(config, *sharded, *whole) == [0, 0]
    killed, given = tmp_path / "killed.yaml", json.dumps({"rank": rank, "when": when})
    callback = f"  callbacks:\n    - {{class_path: {__name__}.Killed, init_args: {given}}}\n"
    killed.write_text(config.read_text().replace("  callbacks:\n", callback))
    assert fit_in_two(killed, *sharded, *cut) == codes
    # What was being written has another name, and what has this name is whole.
    found = sorted((tmp_path / "cut").glob("*.ckpt"))
    assert [file.name for file in found] == ["last.ckpt", "step=2.ckpt"]
    assert all(map(is_whole, found))
    # A process that is not killed removes what it was writing.
    assert len(list((tmp_path / "cut").iterdir())) == 2 + (rank == 0)
    assert read(tmp_path / "cut" / "last.ckpt")["global_step"] == 2
    assert fit_in_two(config, *sharded, *cut, "--ckpt_path", "last") == [0, 0]
    a, b = (read(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_split_run_does_not_resume_from_half_a_checkpoint(tmp_path):
    from types import SimpleNamespace

    half = tmp_path / "last.ckpt"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"0")
    strategy = SimpleNamespace(broadcast=lambda path: path)
    with pytest.raises(DamagedError, match=r"last\.ckpt .*cut short or damaged; no other"):
        load_whole(strategy, half)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_whole(strategy, tmp_path / "absent.ckpt")


def test_an_index_that_names_other_code_is_not_run(tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / INDEX).write_bytes(pickle.dumps(Hostile()))
    (folder / "meta.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a checkpoint of mmdlm fit"):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_two_processes_train_on_data_that_lack_a_modality(config, tmp_path):
    from_tiny(config)
    assert fit_in_two(config, "--trainer.strategy", "ddp") == [0, 0]
    assert losses(tmp_path).keys() == set(range(6))


def test_processes_do_not_wait_for_unused_encoders():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DDPStrategy

    from mmdlm.training.strategies import prepare

    model = torch.nn.Module()
    model.encoders = torch.nn.ModuleDict({"audio": torch.nn.Linear(1, 1)})
    model.adapters = torch.nn.ModuleDict()
    found = []
    for strategy in (DDPStrategy(), DDPStrategy(find_unused_parameters=False)):
        prepare(SimpleNamespace(strategy=strategy, callbacks=[]), model)
        found.append(strategy._ddp_kwargs["find_unused_parameters"])
    model.encoders.requires_grad_(False)
    frozen = DDPStrategy()
    prepare(SimpleNamespace(strategy=frozen, callbacks=[]), model)
    assert found == [True, False]  # what a user asks for stays
    assert "find_unused_parameters" not in frozen._ddp_kwargs


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32), ("64-true", torch.float64)],
)
def test_batches_fit_every_precision(config, tmp_path, precision, dtype):
    fit(config, "--trainer.precision", precision, "--trainer.max_steps", "2")
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in saved.values()} == {dtype}
    assert losses(tmp_path)[1] > 0


def test_averaged_weights_are_exported_and_resumed(config, tmp_path, capsys):
    text = config.read_text().replace(
        "  callbacks:\n",
        "  callbacks:\n    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging\n"
        "      init_args: {decay: 0.5}\n",
    )
    config.write_text(text.replace(f"dirpath: {tmp_path}/ckpt, ", ""))
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    fit(config, "--trainer.max_steps", "5")
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    averaged, last = whole["state_dict"], whole["current_model_state"]
    assert any(not torch.equal(averaged[name], last[name]) for name in averaged)
    assert export(str(folder / "last.ckpt"), tmp_path / "out") == 0
    assert "with the averaged weights of the run" in capsys.readouterr().out
    name = "backbone.norm.weight"
    assert torch.equal(trained(folder / "last.ckpt").state_dict()[name], averaged[f"model.{name}"])
    start = folder / "step=2.ckpt"
    fit(config, "--trainer.max_steps", "5", "--ckpt_path", str(start))
    again = torch.load(folder / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(whole[part][n], again[part][n]) for n in averaged), part
