from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdlm
import mmdlm.files
from mmdlm.checkpoint import load, save
from mmdlm.model import MultimodalDLM


def test_unknown_source_names_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "small"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    monkeypatch.setattr(mmdlm.files, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'tinny'; did you mean tiny\?.*\(small, tiny\)"):
        load("tinny")
    (tmp_path / "my_model").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean my_model"):
        load("./my_modle")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        load(Path(tmp_path / "models" / "tiny" / "config.json"))


def test_bundled_name_comes_before_a_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., MultimodalDLM],
) -> None:
    model = build()
    save(model, tmp_path / "models" / "tiny")
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(mmdlm.files, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path / "here")
    assert mmdlm.files.bundled() == ["tiny"]
    found, wanted = load("tiny").state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load("./tiny")


def test_hub_id_is_downloaded_without_code(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(golden / "backbones" / "dream")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("Dream-org/Dream-v0-Base-7B").spec.family == "dream"
    [(repo, patterns)] = asked
    assert repo == "Dream-org/Dream-v0-Base-7B"
    assert {"*.safetensors", "*.json"} <= set(patterns)
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in patterns)


def test_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is not a folder.*no route"):
        load("nobody/nothing")
