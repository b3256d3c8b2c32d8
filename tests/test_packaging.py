import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mmdlm
from mmdlm.commands import doctor

ROOT = Path(__file__).parent.parent
INFO = f"mmdlm-{mmdlm.__version__}.dist-info"
pytest.importorskip("build", reason='needs the builder: pip install "mmdlm[dev]"')


def python(*arguments: str, **options: object) -> str:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def files(folder: str) -> set[str]:
    """Files of the repository that belong in the wheel, relative to the root."""
    paths = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return {p.relative_to(ROOT).as_posix() for p in paths if p.name != ".DS_Store"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile")
    python(*pip, "--target", str(target), str(wheel))
    return target


def test_wheel_contains_only_the_packages_and_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(INFO)}
    code = files("mmdlm") | files("encoders") | files("adapters")
    configs = {f"mmdlm/{name}" for name in files("configs")}
    assert any(name.endswith(".yaml") for name in configs)
    assert "mmdlm/models/tiny/model.safetensors" in code
    assert held == code | configs


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = Parser().parsestr(archive.read(f"{INFO}/METADATA").decode())
        commands = archive.read(f"{INFO}/entry_points.txt").decode()
        assert f"{INFO}/licenses/LICENSE" in archive.namelist()
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == set(doctor.EXTRAS)
    assert about.get_payload().startswith("#")  # the README
    assert "mmdlm = mmdlm.commands.main:main" in commands
    assert wheel.stat().st_size < 40e6


def test_installed_copy_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = "import mmdlm, encoders.features, adapters.adapter, mmdlm.commands.main\n"
    code += "for module in mmdlm, encoders, adapters: print(module.__file__)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    out = python("-c", code, cwd=tmp_path, env=env).split()
    assert out == [str(installed / p / "__init__.py") for p in ("mmdlm", "encoders", "adapters")]
    assert (installed / "bin" / "mmdlm").is_file()


def test_installed_copy_has_the_configs(installed: Path) -> None:
    folder = installed / "mmdlm"
    there = {p.relative_to(folder).as_posix() for p in (folder / "configs").rglob("*.yaml")}
    assert there == {name for name in files("configs") if name.endswith(".yaml")}
