import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmdlm
from mmdlm.commands import doctor
from mmdlm.commands.doctor import Check

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def without_gl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the rendering trials, each of which is a process."""
    monkeypatch.setattr(doctor, "GL_BACKENDS", ())


@pytest.fixture
def without_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the trial imports of torch and its neighbours, which take seconds each."""
    monkeypatch.setattr(doctor, "IMPORTS", dict.fromkeys(doctor.IMPORTS, ""))


@pytest.fixture
def beside_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_gl: None
) -> Callable[..., Check]:
    """A function that installs a fake library beside torch 2.12.1 and gives its line."""
    imports = dict(doctor.IMPORTS)

    def install(name: str, version: str, needs: str, code: str = "") -> Check:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(f"{head}Requires-Dist: {needs}\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        for part in ("functional", "transforms", "decoders"):
            (tmp_path / name / f"{part}.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        tried = {each: code if each == name else "" for each, code in imports.items()}
        monkeypatch.setattr(doctor, "IMPORTS", tried)
        path = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{path}")
        return by_name(doctor.report())[{"av": "other audio"}.get(name, name)]

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: "2.12.1" if n == "torch" else real(n))
    return install


def names(requirements: list[str]) -> set[str]:
    return {Requirement(each).name for each in requirements}


def test_tables_agree_with_pyproject() -> None:
    assert names(PROJECT["dependencies"]) == {*doctor.OLDEST, *doctor.CORE}
    lowest = {f"{name}>={version}" for name, version in doctor.OLDEST.items()}
    assert lowest <= set(PROJECT["dependencies"])
    extras = {name: names(parts) for name, parts in PROJECT["optional-dependencies"].items()}
    assert extras == {name: set(parts) for name, (_, parts) in doctor.EXTRAS.items()}
    (a, b), (c, d) = doctor.PYTHON
    assert PROJECT["requires-python"] == f">={a}.{b},<{c}.{d + 1}"


def test_report_here_has_no_broken_part(without_gl: None) -> None:
    checks = by_name(doctor.report())
    assert not [check for check in checks.values() if check.state == "broken"]
    assert {f"extra {name}" for name in doctor.EXTRAS} <= set(checks)
    assert checks["extra dev"].state == "ok"
    assert "threads" in checks["device"].seen or "CUDA" in checks["device"].seen


def test_missing_parts_are_named_with_the_way_out(
    without_gl: None, without_imports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor._version
    other = {"jiwer": None, "einops": None, "av": None, "torch": "2.13.0"}
    monkeypatch.setattr(doctor, "_version", lambda n: other[n] if n in other else real(n))
    checks = by_name(doctor.report())
    assert checks["extra eval"] == Check(
        "extra eval", "off", "metrics of mmdlm eval; jiwer missing", 'pip install "mmdlm[eval]"'
    )
    assert checks["libraries"] == Check(
        "libraries", "broken", "einops missing", "pip install mmdlm"
    )
    assert checks["other audio"].state == "off"
    assert 'pip install "mmdlm[data]"' in checks["other audio"].fix


def test_library_made_for_another_torch_is_broken(beside_torch: Callable[..., Check]) -> None:
    check = beside_torch("torchvision", "0.26.0", "torch==2.11.0")
    assert check.state == "broken"
    assert "made for torch ==2.11.0, here is 2.12.1" in check.seen
    assert check.fix == 'pip install "torchvision==0.27.*"'


def test_library_that_does_not_load_is_broken(beside_torch: Callable[..., Check]) -> None:
    code = "raise OSError('Could not load this library: libtorchaudio.so')"
    check = beside_torch("torchaudio", "2.11.0", "torch>=2.11", code)
    assert check.state == "broken"
    assert "Could not load this library: libtorchaudio.so; needed for audio" in check.seen
    assert check.fix == 'pip install "torchaudio>=2.11.1"'


def test_too_old_library_is_broken(beside_torch: Callable[..., Check]) -> None:
    check = beside_torch("torchaudio", "2.9.1", "torch")
    assert (check.state, "older than 2.11" in check.seen) == ("broken", True)


def test_newer_library_that_loads_is_fine(beside_torch: Callable[..., Check]) -> None:
    check = beside_torch("torchvision", "0.40.0", "torch>=2.12")
    assert check == Check("torchvision", "ok", "0.40.0")


def test_av_that_does_not_load_is_off(beside_torch: Callable[..., Check]) -> None:
    check = beside_torch("av", "18.0.0", "torch", "raise RuntimeError('no libavcodec')")
    assert check.state == "off"
    assert "PyAV 18.0.0 does not load: RuntimeError: no libavcodec" in check.seen


@pytest.mark.parametrize(
    ("name", "torch", "fitting"),
    [
        ("torch", "2.9.1", "torch>=2.11"),
        ("torchvision", None, "torchvision>=0.26"),
        ("torchvision", "2.11.0+cu130", "torchvision==0.26.*"),
        ("torchvision", "2.14.1", "torchvision==0.29.*"),
        ("torchaudio", "2.11.0+cpu", "torchaudio==2.11.0"),
        ("torchaudio", "2.14.1", "torchaudio>=2.11.1"),
    ],
)
def test_fitting_release(name: str, torch: str | None, fitting: str) -> None:
    assert doctor._fitting(name, torch) == fitting


def test_missing_model_is_broken(
    without_gl: None, without_imports: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mmdlm, "__file__", str(tmp_path / "mmdlm" / "__init__.py"))
    check = by_name(doctor.report())["bundled model"]
    assert check.state == "broken"
    assert "model.safetensors" in check.seen


def test_second_owner_of_a_package_is_broken(
    without_gl: None, without_imports: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "adapter_hub-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapter-hub\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("adapters\n")
    monkeypatch.syspath_prepend(tmp_path)
    checks = by_name(doctor.report())
    assert checks["package adapters"].state == "broken"
    assert "pip uninstall adapter-hub" in checks["package adapters"].fix
    assert checks["package encoders"].state == "ok"


def test_print_report_fails_only_for_broken_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    off = Check("extra sim", "off", "no [metaworld]", 'pip install "mmdlm[sim]"')
    assert doctor.print_report([off]) == 0
    out = capsys.readouterr().out
    assert 'pip install "mmdlm[sim]"' in out
    assert "no [metaworld]" in out
    assert doctor.print_report([off, Check("torch", "broken", "gone")]) == 1


@pytest.mark.sim
def test_rendering_is_reported_as_it_was_tried(
    without_imports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = doctor.GL_BACKENDS[-1]
    monkeypatch.setattr(doctor, "GL_BACKENDS", (backend,))
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setattr(doctor, "GL_TRIAL", "raise SystemExit(1)")
    check = by_name(doctor.report())["rendering"]
    assert (check.state, check.seen) == ("off", f"none of {backend} renders")
    assert "apt-get install" in check.fix
    assert "libosmesa6" in doctor.system_packages()
    monkeypatch.setattr(doctor, "GL_TRIAL", "")
    assert by_name(doctor.report())["rendering"].state == "ok"
    assert "libosmesa6" not in doctor.system_packages()
    monkeypatch.setenv("MUJOCO_GL", "glx")
    check = by_name(doctor.report())["rendering"]
    assert (check.state, check.fix) == ("off", f"export MUJOCO_GL={backend}")


def test_hanging_trial_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert doctor._finish({"egl": process}, seconds=0.1) == []
    assert process.returncode is not None


def test_module_prints_missing_system_packages() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mmdlm.commands.doctor", "--system"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == bool(run.stdout.strip()), run.stderr
