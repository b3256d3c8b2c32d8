"""Open lower bounds in pyproject.toml, exact tested versions in one constraints file."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TESTED = ROOT / "configs" / "tested-versions.txt"
UPPER = {"<", "<=", "==", "~=", "==="}
# gym-pusht calls functions that pymunk 7 removed.
CAPPED = {"pymunk", "highway-env"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(r) for r in project["dependencies"] + [r for e in extras for r in e]]


def locked() -> dict[str, Version]:
    lines = [line for line in TESTED.read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.+]*)", line) for line in lines]
    assert all(matches), lines
    return {canonical(m[1]): Version(m[2]) for m in matches}


def make(folder: Path, *goals: str) -> str:
    """The commands that make would run in an empty copy of the project."""
    (folder / "configs").mkdir()
    for name in ("Makefile", "pyproject.toml", "configs/tested-versions.txt"):
        shutil.copy(ROOT / name, folder / name)
    run = subprocess.run(
        ["make", "--dry-run", *goals], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_requirements_have_no_upper_bounds() -> None:
    capped = {r.name for r in requirements() if any(s.operator in UPPER for s in r.specifier)}
    assert capped == CAPPED


def test_every_requirement_has_a_tested_version_within_its_bounds() -> None:
    versions = locked()
    for requirement in requirements():
        version = versions[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, tested {version}"


def test_tested_versions_leave_cuda_libraries_to_torch() -> None:
    assert not [n for n in locked() if n.startswith(("nvidia-", "cuda-")) or n == "triton"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_setup_installs_the_tested_versions(tmp_path: Path) -> None:
    commands = make(tmp_path, "test")
    assert "-m pip install" in commands
    assert "--constraint configs/tested-versions.txt -e '.[" in commands
    assert ".venv-newest" not in commands


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_newest_versions_have_a_separate_environment(tmp_path: Path) -> None:
    commands = make(tmp_path, "test-newest")
    assert ".venv-newest/bin/python -m pip install" in commands
    assert "--upgrade --upgrade-strategy eager -e '.[" in commands
    assert ".venv-newest/bin/python -m pytest" in commands
    assert "tested-versions" not in commands
    assert ".venv/" not in commands
