"""A run small enough to train in seconds, in one process or in two."""

import multiprocessing
import os
import socket

import pytest

from mmdlm.commands.train import run

FORK = multiprocessing.get_context("fork")


def start_two(config, *options):
    """The two processes of a run; forked, as importing everything would take longer than to train.

    Args:
        config: file of the run.
        *options: further words of `mmdlm fit`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def fit(rank):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        run(["fit", "-c", str(config), "--trainer.devices", "2", *options])

    processes = [FORK.Process(target=fit, args=(rank,)) for rank in range(2)]
    for each in processes:
        each.start()
    return processes


def ended(processes):
    """Exit codes of processes, which end by themselves within some minutes."""
    for each in processes:
        each.join(240)
        each.kill()  # without effect on one that has ended
        each.join()
    return [each.exitcode for each in processes]


def fit_in_two(config, *options):
    """Exit codes of the two processes of a run."""
    return ended(start_two(config, *options))


@pytest.fixture
def config(tmp_path):
    """A file that `mmdlm fit -c` takes: drawn scenes, two layers, a checkpoint each 2 steps."""
    text = f"""
seed_everything: 0
trainer:
  max_steps: 6
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  default_root_dir: {tmp_path}
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {tmp_path}, name: run, version: 0, flush_logs_every_n_steps: 1}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {tmp_path}/ckpt, every_n_train_steps: 2, save_last: true,
                   save_on_exception: true, save_top_k: -1, filename: "{{step}}"}}
model:
  objective: {{class_path: mmdlm.objectives.masked.Masked}}
  blueprint:
    backbone: {{width: 32, layers: 2, heads: 2, inner: 64}}
    encoders:
      image:
        class_path: encoders.vit.ViT
        init_args: {{size: 32, patch: 8, dim: 32, depth: 1, heads: 2}}
    adapters:
      image: {{class_path: adapters.mlp.MLP}}
  schedule: {{warmup: 2}}
data:
  train:
    scenes:
      class_path: mmdlm.data.scenes.Scenes
      init_args: {{size: 32, questions: 2, objects: [1]}}
  batch_size: {{scenes: 4}}
"""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file
