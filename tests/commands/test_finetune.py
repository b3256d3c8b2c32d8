"""`mmdlm fit --source MODEL --data FILE`: short options, the report, and the model it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.checkpoint import save
from mmdlm.commands import finetune
from mmdlm.commands.finetune import Held, expand, table
from mmdlm.commands.main import main
from mmdlm.data.episodes import ACTION, IMAGE, STATE
from mmdlm.data.lerobot_writer import Writer


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("a", "b", "c", "d")):
        Image.new("RGB", (40, 40), (60 * i, 10, 200 - 60 * i)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"A cat named {name.upper()}!")
    return folder


def data(words: list[str], name: str) -> dict:
    """Value of a JSON option of an expanded command."""
    return json.loads(next(w for w in words if w.startswith(f"--{name}=")).partition("=")[2])


def test_data_are_split_and_the_rest_is_kept(photos: Path) -> None:
    words = ["fit", "-c", "finetune/full", "--source", "tiny", "--data", str(photos)]
    found = expand([*words, "--epochs", "2", "--batch-size", "3", "--prompt", "Name it."])
    assert found[:3] == ["fit", "-c", "finetune/full"]
    assert {"--model.source=tiny", "--trainer.max_epochs=2", "--data.batch_size=3"} <= set(found)
    train, val = data(found, "data.train")["photos"], data(found, "data.val")["photos"]
    assert (train["init_args"]["part"], val["init_args"]["part"]) == ("train", "held_out")
    assert train["init_args"]["dataset"] == val["init_args"]["dataset"]
    inner = train["init_args"]["dataset"]
    assert inner["class_path"] == "mmdlm.data.media_folder.MediaFolder"
    assert inner["init_args"] == {"path": str(photos), "prompt": "Name it."}


def test_held_out_data_of_their_own_are_not_split(photos: Path) -> None:
    found = expand(["fit", "--data", str(photos), "--val", str(photos)])
    assert data(found, "data.train")["photos"]["class_path"].endswith("MediaFolder")
    assert data(found, "data.val")["photos"]["class_path"].endswith("MediaFolder")


def test_robot_data_keep_the_last_episodes(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    found = expand(["fit", "--data", str(tmp_path)])
    (train,), (val,) = (data(found, name).values() for name in ("data.train", "data.val"))
    assert train["init_args"] == {"root": str(tmp_path), "part": "train"}
    assert val["init_args"] == {"root": str(tmp_path), "part": "val"}


def test_options_without_data_are_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match="--prompt has no effect without --data"):
        expand(["fit", "--prompt", "Name it."])


def test_lightnings_own_data_option_stays(tmp_path: Path) -> None:
    settings = tmp_path / "data.yaml"
    settings.write_text("train: {}\nbatch_size: 1\n")
    assert expand(["fit", "--data", str(settings)]) == ["fit", "--data", str(settings)]


def test_report_counts_right_answers_before_and_after() -> None:
    held = Held([], ["q1", "q2"], ["a , b", "c"], ["x", "c"])
    grid = table(held, ["a, b", "c"], 1)
    assert [list(column.cells) for column in grid.columns] == [
        ["q1", "exact"],
        ["a , b", ""],
        ["x", "50.0%"],
        ["a, b", "100.0%"],
    ]


@pytest.mark.parametrize("config", ["full", "projector"])
def test_a_run_leaves_a_model_that_answers_in_the_new_words(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], config: str
) -> None:
    words = ["fit", "-c", f"finetune/{config}", "--source", "tiny", "--data", str(photos)]
    assert main([*words, "--steps", "2", "--batch-size", "2", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().err
    assert "before training" in said
    assert "photos: 3 rows, 2 per step, each 1.33 times" in said
    folder = tmp_path / "finetune" / "version_0" / "model"
    assert f"mmdlm caption IMAGE --model {folder}" in said
    model = mmdlm.load(folder)
    assert model.tokenizer.decode(model.tokenizer.encode("A cat named B!")) == "A cat named B!"
    assert isinstance(mmdlm.caption(model, photos / "a.png"), str)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_text_model_is_trained_without_adapters(way: str, tmp_path: Path, speller) -> None:
    save(speller(), tmp_path / "text")
    lines = [json.dumps({"prompt": f"{n} + 1 =", "response": str(n + 1)}) for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    given = ["--source", str(tmp_path / "text"), "--data", str(tmp_path / "sums.jsonl")]
    options = ["--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "runs")]
    assert main(["fit", "-c", f"finetune/{way}", *given, *options]) == 0
    folder = tmp_path / "runs" / "finetune" / "version_0" / "model"
    used = {"adapter": folder} if way == "lora" else {}
    model = mmdlm.load(tmp_path / "text" if way == "lora" else folder, **used)
    assert isinstance(mmdlm.generate(model, "1 + 1 =", length=4), str)


@pytest.mark.parametrize("config", ["policy", "policy_lora"])
def test_a_policy_learns_from_recorded_episodes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], config: str
) -> None:
    shapes = {IMAGE: (32, 32, 3), STATE: (4,), ACTION: (4,)}
    with Writer(tmp_path / "robot", shapes, fps=10) as writer:
        for i in range(3):
            numbers = np.random.default_rng(i).uniform(-1, 1, (12, 4)).astype(np.float32)
            images = np.full((12, 32, 32, 3), 40 * i, np.uint8)
            writer.add_episode("Open the box.", {IMAGE: images, STATE: numbers, ACTION: numbers})
    data = str(tmp_path / "robot")
    words = ["fit", "-c", f"finetune/{config}", "--source", "tiny", "--data", data]
    assert main([*words, "--steps", "2", "--batch-size", "2", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "finetune" / "version_0" / "model"
    use = {"model": folder} if config == "policy" else {"model": "tiny", "adapter": folder}
    said = capfd.readouterr().err
    assert "12 held-out frames: the next 8 actions differ from the recorded ones by" in said
    options = " ".join(f"--{name} {value}" for name, value in use.items())
    assert f"mmdlm act --sim SIMULATOR {options}\n" in said
    policy = mmdlm.load_policy(use.pop("model"), **use)
    seen = {"image": images[0], "state": numbers[0], "prompt": "Open the box."}
    actions = policy.infer(seen)["actions"]
    assert actions.shape[1] == 4
    assert np.abs(actions).max() <= 1.0


def test_the_error_of_a_policy_is_a_share_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = np.zeros((3, 2, 2), np.float32)
    targets[0, 0, 0] = 4
    targets[..., 1] = 7  # never changes, so it does not count

    class Still:
        def __init__(self, model: object) -> None:
            assert not model.training

        def infer_batch(self, observations: list[dict]) -> list[dict]:
            return [{"actions": np.ones((2, 2), np.float32)} for _ in observations]

    monkeypatch.setattr(finetune, "Policy", Still)
    model = torch.nn.Linear(1, 1)
    # Five differences of 1 and one of 3, over the range 4.
    assert finetune.chunk_error(model, [{}] * 3, targets, batch=2) == pytest.approx(8 / 6 / 4)
    assert model.training
    assert finetune.chunk_error(model, [{}] * 3, targets * 0) == 0.0


def test_help_names_the_short_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "--source MODEL" in capsys.readouterr().out
