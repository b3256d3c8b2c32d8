"""Systems in LLaVA's layout are trained from LLaVA's JSON: the recipes, and a LoRA fine-tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmdlm
from mmdlm import checkpoint
from mmdlm.commands.main import main
from tests.systems.llava_layouts import lavida, llada_v, sdar_vl

ONE_VIEW = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
COLOURS = {"R": (230, 20, 20), "B": (20, 20, 230), "G": (20, 200, 20)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's JSON: the colour of an image, in one or two turns."""
    root = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(12):
        name, colour = list(COLOURS.items())[i % 3]
        shade = tuple(min(255, c + 2 * i) for c in colour)
        Image.new("RGB", (40 + i, 60 - i), shade).save(root / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich?"},
            {"from": "gpt", "value": name},
        ]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (root / "colours.json").write_text(json.dumps(rows))
    return root / "colours.json"


RECIPES = {
    "lavida_stage1": (lavida, {"adapters"}),
    "lavida_stage2": (lavida, {"adapters", "backbone", "encoders"}),
    "llada_v": (llada_v, {"adapters", "backbone", "encoders"}),
    "sdar_vl": (sdar_vl, {"adapters", "backbone", "encoders"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps(name: str, data: Path, tmp_path: Path) -> None:
    make, trained = RECIPES[name]
    source = make(tmp_path / "source")
    words = ["fit", "-c", f"train/{name}", "--source", str(source), "--data", str(data)]
    words += ["--val", str(data), "--steps", "2", "--batch-size", "2", "--out", str(tmp_path)]
    fast = ["accelerator=cpu", "precision=32", "limit_val_batches=0", "accumulate_grad_batches=1"]
    assert main([*words, *(f"--trainer.{word}" for word in fast), "--check", "none"]) == 0
    saved = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
    before = mmdlm.load(source, device="cpu").state_dict()
    state = torch.load(saved, weights_only=True)["state_dict"]
    after = {name.removeprefix("model."): weight for name, weight in state.items()}
    changed = {n.partition(".")[0] for n, w in after.items() if not torch.equal(w, before[n])}
    assert changed == trained
    assert all(weight.isfinite().all() for weight in after.values())


def test_a_recipe_trains_on_scenes_that_the_toolkit_makes(tmp_path: Path) -> None:
    made = ["data", "make", "scenes", str(tmp_path / "scenes"), "--count", "3", "--asked", "1"]
    assert main([*made, "--size", "32", "--format", "llava"]) == 0
    source = lavida(tmp_path / "source", **ONE_VIEW)
    data = tmp_path / "scenes" / "conversations.json"
    words = ["fit", "-c", "train/lavida_stage2", "--source", str(source), "--data", str(data)]
    fast = ["accelerator=cpu", "precision=32", "accumulate_grad_batches=1"]
    words += ["--steps", "2", "--batch-size", "2", "--out", str(tmp_path), "--check", "none"]
    assert main([*words, *(f"--trainer.{word}" for word in fast)]) == 0
    saved = tmp_path / "lavida_stage2" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 2


def test_the_infilling_recipe_trains_two_steps(data: Path, tmp_path: Path) -> None:
    source = lavida(tmp_path / "source", **ONE_VIEW)
    tokens = {"end": "<|eot_id|>", "filler": "<|start_header_id|>"}  # not used by the answers
    inner = {"class_path": "mmdlm.data.llava.LLaVA", "init_args": {"path": str(data)}}
    mix = {"class_path": "mmdlm.data.gaps.Gaps", "init_args": {"dataset": inner, **tokens}}
    words = ["fit", "-c", "train/lavida_infill", "--source", str(source), "--steps", "2"]
    words += ["--batch-size", "2", "--out", str(tmp_path), f"--data.train={json.dumps({'m': mix})}"]
    fast = ["accelerator=cpu", "precision=32", "accumulate_grad_batches=1"]
    given = "--model.objective.init_args.objective.init_args.ids=[103]"
    run = [*words, given, *(f"--trainer.{word}" for word in fast), "--check", "none"]
    assert main(run) == 0
    saved = tmp_path / "lavida_infill" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_lora_fine_tune_answers_better_and_is_published(data: Path, tmp_path: Path) -> None:
    source = lavida(tmp_path / "source", **ONE_VIEW)
    words = ["fit", "-c", "finetune/lora", "--source", str(source), "--data", str(data)]
    words += ["--val", str(data), "--batch-size", "12", "--out", str(tmp_path), "--length", "4"]
    fast = ["--trainer.accelerator=cpu", "--check", "none", "--data.val_rows=3"]
    lora = {"lora": {"rank": 16, "alpha": 32}, "lr": 1e-2}
    tune = {"*": "frozen", "backbone.blocks.*": lora, "adapters.*": lora}
    fast += [f"--model.tune={json.dumps(tune)}", "--trainer.limit_val_batches=0"]
    assert main([*words, *fast, "--steps", "40"]) == 0
    saved = tmp_path / "finetune" / "version_0" / "checkpoints" / "last.ckpt"
    assert main([*words, *fast, "--steps", "80", f"--ckpt_path={saved}"]) == 0

    rows = json.loads(data.read_text())
    images = [data.parent / row["image"] for row in rows]
    right = [row["conversations"][1]["value"] for row in rows]
    base = mmdlm.load(source, device="cpu")
    tuned = tmp_path / "finetune" / "version_1" / "model"
    model = mmdlm.load(source, adapter=tuned, device="cpu")
    found = [mmdlm.answer(each, "Which?", images, length=4) for each in (base, model)]
    scores = [sum(map(str.__eq__, answers, right)) for answers in found]
    assert scores[0] == 0
    assert scores[1] >= 10

    merged = tmp_path / "merged"
    adapter = ["--adapter", str(tuned), "--layout", "published"]
    assert main(["export", str(source), "--out", str(merged), *adapter]) == 0
    names = load_file(merged / "model.safetensors").keys()
    assert names == load_file(source / "model.safetensors").keys()
    again = mmdlm.load(merged, device="cpu")
    assert again.system == "lavida"
    assert mmdlm.answer(again, "Which?", images, length=4) == found[1]
    checkpoint.save(again, tmp_path / "own")
    assert mmdlm.answer(mmdlm.load(tmp_path / "own"), "Which?", images, length=4) == found[1]
