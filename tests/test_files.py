import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdlm
import mmdlm.files
from mmdlm.checkpoint import load, save
from mmdlm.model import MultimodalDLM

PLACE = Path("somewhere/a.json")


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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "holds more than 100,000 values"),
        ("&a [*a]", "holds more than 100,000 values"),
        ("[" * 5000, "is not valid YAML"),
        ("a: [", "is not valid YAML"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("x" * 300_000, "has more than 262,144 bytes"),
        ("!!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml .*{message}"):
        mmdlm.files.read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": "\\ud800"}', "holds .*half of a surrogate pair"),
        ("", "is empty"),
        ("{", "is not valid JSON"),
        ("[]", "holds a list, expected an object"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.* git lfs pull"),
    ],
)
def test_hostile_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        mmdlm.files.read_json(tmp_path / "a.json")


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    (tmp_path / "device").symlink_to("/dev/zero")
    kinds = {
        "folder": "a folder",
        "pipe": "a pipe",
        "loop": "not readable",
        "nothing": "a link to a file that does not exist",
        "device": "a device",
    }
    for name, kind in kinds.items():
        with pytest.raises(ValueError, match=rf"{name} is {kind}.*expected a regular file"):
            mmdlm.files.read_json(tmp_path / name)
    assert not mmdlm.files.present(tmp_path / "absent")


def test_values_of_a_file_are_blamed_on_it() -> None:
    for wrong in (lambda: {}["size"], lambda: None.size, lambda: 1 // 0, lambda: int("x")):
        with pytest.raises(ValueError, match=r"^somewhere/a\.json: "), mmdlm.files.blaming(PLACE):
            wrong()


def test_source_that_is_not_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="source is a int, expected the name"):
        load(5)
    with pytest.raises(FileNotFoundError, match="source is 'aaa"):
        load("a" * 5000)
