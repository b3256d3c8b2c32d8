"""Where the parts of a system are found that may be checkpoints of their own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdlm.loading.merged import find
from mmdlm.systems.system import Beside, Part

EAR, LLM = Part("ear.", "encoder.", "ear_config"), Part("llm.model.", "model.", "llm_config")


def save(file: Path, *names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, file)


def found(folder: Path, **config: dict) -> list[Beside]:
    return sorted(find(folder, config, (EAR, LLM)), key=lambda beside: beside.path)


def test_one_file_or_shards_need_nothing(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "ear.x", "llm.model.x", "joint.x")
    assert found(tmp_path) == []
    save(tmp_path / "b" / "model-00001-of-00002.safetensors", "ear.x")
    save(tmp_path / "b" / "model-00002-of-00002.safetensors", "llm.model.x")
    assert found(tmp_path / "b") == []


def test_sub_folders_are_recognised_by_their_tensors(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "joint.x")
    save(tmp_path / "any name" / "model.safetensors", "encoder.x", "decoder.x")
    save(tmp_path / "big" / "model-00001-of-00002.safetensors", "model.x")
    save(tmp_path / "big" / "model-00002-of-00002.safetensors", "model.y")
    save(tmp_path / "checkpoint-100" / "model.safetensors", "joint.x")
    (tmp_path / "empty").mkdir()
    ear, llm = Beside("any name", "ear.", "encoder."), Beside("big", "llm.model.", "model.")
    assert found(tmp_path) == [ear, llm]
    assert (ear.name("encoder.x"), ear.name("decoder.x")) == ("ear.x", "any name/decoder.x")
    assert find(tmp_path, {}, ()) == ()


def test_files_without_index_are_all_read(tmp_path: Path) -> None:
    save(tmp_path / "joint.safetensors", "joint.x", "llm.model.x")
    save(tmp_path / "model.safetensors", "encoder.x")
    assert found(tmp_path) == [
        Beside("joint.safetensors", ""),
        Beside("model.safetensors", "ear.", "encoder."),
    ]


def test_files_beside_an_index_are_read(tmp_path: Path) -> None:
    shards = {
        "joint.x": "model-00001-of-00002.safetensors",
        "llm.model.x": "model-00002-of-00002.safetensors",
    }
    for name, file in shards.items():
        save(tmp_path / file, name)
    index = {"weight_map": shards}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save(tmp_path / "ear.safetensors", "encoder.x")
    assert found(tmp_path) == [Beside("ear.safetensors", "ear.", "encoder.")]


def test_the_config_is_followed_for_parts_that_are_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "joint"
    save(folder / "model.safetensors", "joint.x", "llm.model.x")
    save(tmp_path / "a" / "model.safetensors", "encoder.x")
    save(tmp_path / "b" / "model.safetensors", "model.x")
    named = {part: {"_name_or_path": f"../{name}"} for part, name in (("ear", "a"), ("llm", "b"))}
    config = {f"{part}_config": value for part, value in named.items()}
    assert found(folder, **config) == [Beside("../a", "ear.", "encoder.")]
    absolute = {"_name_or_path": str(tmp_path / "a")}
    assert found(folder, ear_config=absolute) == [Beside("../a", "ear.", "encoder.")]
    for other in ("../b", "../nowhere", "owner/name", "", None):
        assert found(folder, ear_config={"_name_or_path": other}) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "joint.x")
    save(tmp_path / "ear" / "model.safetensors", "encoder.x")
    file = tmp_path / "ear" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"ear/model.safetensors"):
        found(tmp_path)
