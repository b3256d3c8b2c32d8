"""Every training config trains, on minimal data of the required format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmdlm
from mmdlm.commands.train import run
from mmdlm.data.lerobot_writer import Writer
from mmdlm.decoding import preset
from mmdlm.loading.own import read_tasks

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = yaml.safe_load((CONFIGS / "train" / "tiny.yaml").read_text())["data"]["train"]["episodes"][
    "init_args"
]["tasks"]
STAGES = {
    "tiny": ("train/tiny",),
    "tiny_towers": ("train/tiny", "train/tiny_towers"),
    "tiny_ar": ("train/tiny", "train/tiny_ar"),
}
RECIPES = {
    *("scratch", "driving", "retrieval"),  # below, and in tests/benchmarks/test_retrieval.py
    *("lavida_stage1", "lavida_stage2", "lavida_infill", "llada_v", "sdar_vl"),
    *("diffusionvl", "dream_vl", "lumina", "mmada"),
}
"""They have tests of their own; those of published systems are in tests/systems."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Working directory with a few clips and two short episodes per task."""
    from mmdlm.data import speech

    root = tmp_path_factory.mktemp("run")
    speech.make(root / "data" / "speech" / "train", 4, "train")
    speech.make(root / "data" / "speech" / "held_out", 2, "held_out")
    rng = np.random.default_rng(0)
    shapes = {"observation.image": (64, 64, 3), "observation.state": (4,), "action": (4,)}
    for task in TASKS:
        with Writer(root / "data" / "episodes" / task, shapes, 80) as writer:
            for _ in range(2):
                frames = {
                    name: rng.integers(0, 255, (3, *shape)).astype(np.uint8)
                    if len(shape) == 3
                    else rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
                    for name, shape in shapes.items()
                }
                writer.add_episode(task.replace("-", " "), frames)
    return root


def test_training_configs_are_listed():
    assert {path.stem for path in (CONFIGS / "train").glob("*.yaml")} == RECIPES | set(STAGES)


def test_a_model_from_scratch_writes_any_language(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    texts = ["Ein Würfel, rot.", "北京 2024!", "İki küp?", "a (b) C"]
    lines = []
    for i, text in enumerate(texts):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    options = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--batch-size", "2"]
    run(["fit", "-c", "train/scratch", "--data", "photos", *options])
    model = mmdlm.load(str(tmp_path / "runs" / "scratch" / "version_0" / "model"))
    assert (tmp_path / "runs/scratch/version_0/model/tokenizer.json").is_file()
    assert all(model.tokenizer.decode(model.tokenizer.encode(text)) == text for text in texts)
    assert isinstance(mmdlm.caption(model, tmp_path / "photos" / "0.png"), str)


def test_a_driving_model_plans_after_two_steps(tmp_path, monkeypatch):
    pytest.importorskip("highway_env", reason='pip install "mmdlm[sim]"')
    from mmdlm.commands.export import export
    from mmdlm.simulators import demonstrations
    from mmdlm.tasks.drive import CAMERAS, SCHEMA, plan

    monkeypatch.chdir(tmp_path)
    demonstrations.make(Path("data/driving"), 2, horizon=5)
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    options += ["--trainer.accelerator=cpu", "--data.batch_size={driving: 2}", "--data.val_rows=2"]
    run(["fit", "-c", "train/driving", *options])
    export("runs/driving/version_0/checkpoints/last.ckpt", Path("my-driver"))
    model = mmdlm.load("./my-driver")
    images = [np.full((64, 64, 3), 60 * i, np.uint8) for i in range(len(CAMERAS))]
    (found,) = plan(model, [(images, "Drive.")], strategies="one_step")
    assert list(json.loads(found.answer.text)) == list(SCHEMA["properties"])
    assert model.preset["infill"]["length"] == len(found.answer.tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_config_trains_two_steps(stage, data, monkeypatch):
    monkeypatch.chdir(data)
    names = [part for config in STAGES[stage] for part in ("-c", config)]
    sizes = {"scenes": 2, "digits": 1, "speech": 2, "episodes": 2}
    run(
        [
            "fit",
            *names,
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.val_check_interval=2",
            "--trainer.limit_val_batches=1",
            "--trainer.enable_progress_bar=false",
            "--data.val_rows=2",
            f"--data.batch_size={sizes}",
        ]
    )
    saved = data / "runs" / stage / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(w.isfinite().all() for w in checkpoint["state_dict"].values())


@pytest.mark.parametrize("file", sorted((CONFIGS / "tasks").glob("*.yaml")), ids=lambda f: f.stem)
def test_task_configs_are_valid_presets(file):
    table = read_tasks(file)
    preset.check(table, file)
    assert {"caption", "transcribe", "act"} <= set(table)
