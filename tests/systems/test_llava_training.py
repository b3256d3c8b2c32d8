"""Systems in LLaVA's layout are trained from LLaVA's JSON: the recipes, and a LoRA fine-tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmdlm
from mmdlm import checkpoint
from mmdlm.blueprint import build
from mmdlm.commands.main import main
from mmdlm.loading.keymap import locate, shapes
from mmdlm.systems.lavida import LaViDa
from mmdlm.systems.llada_v import LLaDAV
from mmdlm.systems.sdar_vl import SDARVL
from mmdlm.systems.system import System
from tests.systems import test_lavida, test_llada_v, test_sdar_vl
from tests.systems.llava_golden import with_tokenizer

SMALL = {"vision_config": {**test_lavida.SIZES, "patch_size": 9, "num_hidden_layers": 2}}
"""Views of 6x6 tokens."""
COLOURS = {"R": (230, 20, 20), "B": (20, 20, 230), "G": (20, 200, 20)}


def folder_of(
    system: type[System], config: dict[str, Any], folder: Path, control: dict[str, int]
) -> Path:
    """A published folder of this configuration, with random weights and a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    blueprint = system.read(config, set())
    made = build(blueprint)
    places = locate(shapes(made), system.keys(blueprint), made.spec.transformer)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(place.shape, generator=generator) * 0.1 + float("norm" in name)
        for name, place in places.items()
    }
    save_file(weights, folder / "model.safetensors")
    return with_tokenizer(folder, control)


def lavida(folder: Path) -> Path:
    settings = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "n_layers": 2}
    config = {**test_lavida.flat(), **SMALL, **settings}
    return folder_of(LaViDa, config, folder, test_lavida.CONTROL)


def llada_v(folder: Path) -> Path:
    return folder_of(LLaDAV, {**test_llada_v.GOLDEN.flat(), **SMALL}, folder, test_llada_v.CONTROL)


def sdar_vl(folder: Path) -> Path:
    config = test_sdar_vl.config_of(test_sdar_vl.reference(-1))
    return folder_of(SDARVL, config, folder, test_sdar_vl.CONTROL)


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


@pytest.mark.filterwarnings("ignore")
def test_a_lora_fine_tune_answers_better_and_is_published(data: Path, tmp_path: Path) -> None:
    source = lavida(tmp_path / "source")
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
