"""`mmdlm fit` and `mmdlm predict` as a user calls them."""

import csv
import json
import logging
import sys

import pytest
import torch

from mmdlm.commands.main import main
from mmdlm.commands.train import explained
from tests.training.conftest import config  # noqa: F401
from tests.training.test_module import from_tiny

HELD_OUT = """  val:
    held:
      class_path: mmdlm.data.scenes.Scenes
      init_args: {size: 32, objects: [1], seed: 1, count: 8}
  val_rows: 4
"""
OWN = """from mmdlm.data.dataset import Dataset, Turn, example

class Texts(Dataset):
    def __init__(self, prompt: str = "Say it."):
        self.prompt = prompt
    def __len__(self):
        return 8
    def sample(self, index, rng):
        return example((Turn(self.prompt, "A red Cat.", 6),))
    def vocabulary(self):
        return ["Say", "it", ".", "A", "red", "Cat"]
"""


def fit(file, *options):
    return main(["fit", "-c", str(file), *options])


def rows(folder):
    return list(csv.DictReader((folder / "run" / "version_0" / "metrics.csv").open()))


def of_own_class(config, tmp_path, monkeypatch, name):  # noqa: F811
    """The config with a data set of a class in a file beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{name}.py").write_text(OWN)
    text = config.read_text()
    begin = text.index("    scenes:\n")
    data = f"    scenes: {{class_path: {name}.Texts}}\n  batch_size: {{scenes: 4}}\n"
    config.write_text(text[:begin] + data)


def test_a_class_beside_the_config_is_found(config, tmp_path, monkeypatch, capfd):  # noqa: F811
    of_own_class(config, tmp_path, monkeypatch, "my_own_texts")
    monkeypatch.chdir("/")
    assert fit(config, "--trainer.max_steps", "2") == 0
    assert (tmp_path / "ckpt" / "last.ckpt").is_file()
    said = capfd.readouterr().err
    assert "warning" not in said
    assert "litlogger" not in said


def test_an_absent_class_is_named_with_the_places(config, tmp_path, monkeypatch, capfd):  # noqa: F811
    of_own_class(config, tmp_path, monkeypatch, "my_other_texts")
    config.write_text(config.read_text().replace("my_other_texts", "my_absent_texts"))
    monkeypatch.chdir(tmp_path)
    assert fit(config) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"in {tmp_path} and beside the config; put my_absent_texts.py there" in said


def test_a_class_of_an_earlier_edition_names_the_new_function():
    with pytest.raises(ImportError, match=r"Sample is now the function example\(turns"):
        from mmdlm.data.dataset import Sample  # noqa: F401


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr", "model.optimizer.lr"),
        ("warmup", "model.schedule.warmup"),
        ("attention", "model.blueprint.attention"),
        ("bins", "model.blueprint.bins"),
    ],
)
def test_options_of_earlier_editions_name_the_new_ones(config, capfd, old, new):  # noqa: F811
    assert fit(config, f"--model.{old}", "1") == 2
    on_command_line = capfd.readouterr().err
    config.write_text(config.read_text().replace("model:\n", f"model:\n  {old}: 1\n"))
    assert fit(config) == 2
    in_yaml = capfd.readouterr().err
    for said in (on_command_line, in_yaml):
        assert f"there is no option model.{old}; it is {new}" in said
        assert ("no effect beside source" in said) == ("blueprint" in new)
    assert explained("option 'model.nothing'") == "option 'model.nothing'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init", "nowhere.ckpt"], "init='nowhere.ckpt' has no effect beside source"),
        (["--model.blueprint.chunk", "16"], "model.blueprint"),
        (["--model.statistics", "data"], "statistics='data' has no effect as the data hold no"),
        (["--model.weights", '{"other": 2}'], "there is no data set 'other', only ['scenes']"),
    ],
)
def test_options_without_effect_are_refused(config, capfd, options, message):  # noqa: F811
    from_tiny(config)
    assert fit(config, *options) == 2
    said = capfd.readouterr().err
    assert message in said
    assert "no effect" in said or "there is no" in said


def test_epochs_each_end_with_a_validation_and_the_rate_falls(config, tmp_path):  # noqa: F811
    text = config.read_text().replace("objects: [1]}", "objects: [1], count: 14}")
    text = text.replace(
        "  callbacks:\n",
        "  callbacks:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
        "    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: val/held/ce, patience: 9}\n",
    )
    config.write_text(text + HELD_OUT)
    options = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"]
    options += ["--model.schedule.kind", "linear", "--trainer.accumulate_grad_batches", "2"]
    text = config.read_text().replace("every_n_train_steps: 2", "every_n_train_steps: 1")
    config.write_text(text)
    assert fit(config, *options) == 0
    found = rows(tmp_path)
    assert sum(bool(row.get("val/held/ce")) for row in found) == 3
    rates = [float(row["lr-AdamW/default"]) for row in found if row.get("lr-AdamW/default")]
    rates = rates[::2]  # of two batches that make a step
    assert len(rates) == 3 * 2  # 14 rows are four batches of 4
    assert all(a > b for a, b in zip(rates[1:], rates[2:], strict=False))
    # From the end of an epoch, and from within one, it goes on to the same bits.
    whole = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert whole["global_step"] == 6
    steps = [tmp_path / "ckpt" / f"step={step}.ckpt" for step in (3, 4)]
    for start in steps:
        folder = tmp_path / start.stem
        further = ("--trainer.callbacks.dirpath", str(folder), "--ckpt_path", str(start))
        assert fit(config, *options, *further) == 0
        again = torch.load(folder / "last.ckpt", weights_only=True)
        assert again["global_step"] == 6
        pairs = zip(whole["state_dict"].values(), again["state_dict"].values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), start


def test_the_seed_of_the_run_reaches_data_and_weights(config, tmp_path):  # noqa: F811
    found = []
    for seed in ("0", "1", "1"):
        assert fit(config, "--trainer.max_steps", "1", "--seed_everything", seed) == 0
        found.append(float(rows(tmp_path)[0]["train/scenes/loss"]))
    assert found[0] != found[1] == found[2]
    assert fit(config, "--trainer.max_steps", "1", "--data.seed", "7") == 0
    assert float(rows(tmp_path)[0]["train/scenes/loss"]) != found[0]


def test_a_run_bounded_by_time_ends_with_a_low_rate(config, tmp_path):  # noqa: F811
    options = ["--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:02"]
    assert fit(config, *options, "--model.schedule.warmup", "0") == 0
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 2
    assert saved["lr_schedulers"][0]["_last_lr"][0] < 0.2 * 6e-4


def test_torch_optimizers_and_schedulers_by_class_path(config, tmp_path):  # noqa: F811
    options = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.25"]
    options += ["--model.schedule", "torch.optim.lr_scheduler.StepLR"]
    assert fit(config, *options, "--model.schedule.step_size", "1", "--trainer.max_steps", "2") == 0
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.25
    assert "momentum" in group
    assert group["lr"] == pytest.approx(0.25 * 0.1**2)


def test_predict_writes_questions_targets_and_answers(config, tmp_path, capfd, caplog):  # noqa: F811
    from_tiny(config)
    config.write_text(config.read_text() + HELD_OUT.replace("size: 32", "size: 64"))
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")
    assert main(["predict", "-c", str(config)]) == 0
    path = tmp_path / "run" / "version_0" / "predictions.jsonl"
    assert f"{path}: " in capfd.readouterr().err
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) >= 4
    assert all(set(line) == {"data", "question", "target", "answer"} for line in lines)
    right = sum(line["target"] == line["answer"] for line in lines)
    assert right >= len(lines) / 2  # the bundled model knows such drawings
