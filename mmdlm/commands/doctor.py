"""Checks of this installation: library versions, device, extras, rendering, bundled model.

`python -m mmdlm.commands.doctor --system` prints only the missing Debian packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mmdlm
from encoders.torchaudio_loader import fitting_torchaudio

PYTHON = ((3, 11), (3, 13))  # oldest and newest
# Oldest supported release of torch and of the two libraries that are compiled against it.
OLDEST = {"torch": "2.11", "torchvision": "0.26", "torchaudio": "2.11"}
# The imports that load their compiled parts.
IMPORTS = {
    "torch": "import torch",
    "torchvision": "import torchvision",
    "torchaudio": "import torchaudio.functional, torchaudio.transforms",
}
# What is unavailable without them.
USED_FOR = {
    "torch": "everything",
    "torchvision": "image encoders by a timm name",
    "torchaudio": "audio",
}
CORE = (
    *("transformers", "timm", "lightning", "jsonargparse", "einops", "numpy", "pillow"),
    *("jinja2", "packaging", "safetensors", "soundfile", "pyyaml", "rich", "tqdm"),
)
# Extra: what it adds, and its distributions as pyproject.toml names them.
EXTRAS = {
    "sim": (
        "robot simulators and videos of episodes",
        ("gymnasium", "metaworld", "gym-pusht", "pymunk", "highway-env", "imageio-ffmpeg"),
    ),
    "data": (
        "LeRobot episodes, handwritten digits, HEIC, and sound from M4A, WebM and videos",
        ("pyarrow", "datasets", "scikit-learn", "av", "pillow-heif"),
    ),
    "speech": ("synthetic speech to train on", ("espeakng-loader",)),
    "eval": ("metrics of mmdlm eval", ("jiwer", "sacrebleu", "pycocoevalcap")),
    "demo": ("the demo's plots and videos", ("matplotlib", "imageio-ffmpeg")),
    "train": ("TensorBoard logs, LoRA", ("tensorboard", "peft")),
    "quant": ("weights in 8 or 4 bits", ("torchao",)),
    "dev": (
        "tests, style checks and builds",
        ("pytest", "pytest-xdist", "ruff", "hypothesis", "nbclient", "ipykernel", "build")
        + ("hatchling", "scikit-image"),
    ),
}
MODEL_FILES = ("config.json", "model.safetensors")
GL_BACKENDS = ("egl", "osmesa") if sys.platform == "linux" else ("glfw",)
# Renders one white ball: an image that is not black shows that rendering works.
GL_TRIAL = """
import mujoco
ball = "<geom size='.5'/><camera pos='0 -2 0' xyaxes='1 0 0 0 0 1'/><light pos='0 -2 2'/>"
model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{ball}</worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(data, 0)
    assert renderer.render().max() > 0
"""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: the part that was checked.
        state: "ok"; "off", an optional part is missing; "broken", a required part does not work.
        seen: what was found.
        fix: the next move, if there is one.
    """

    name: str
    state: Literal["ok", "off", "broken"]
    seen: str
    fix: str = ""


def report() -> list[Check]:
    """Every check, the required parts first."""
    trials = _start_gl_trials()  # they run while the libraries are checked
    return [
        _python(),
        *_compiled(),
        _core(),
        _device(),
        *(_neighbour(name) for name in ("encoders", "adapters")),
        _model(Path(mmdlm.__file__).parent / "models" / "tiny"),
        *(_extra(name) for name in EXTRAS),
        _rendering(_finish(trials)),
        _codecs(),
        _espeak(),
    ]


def print_report(checks: Sequence[Check] | None = None) -> int:
    """Exit status after printing the report as a table: 1 if a required part is broken.

    Args:
        checks: what to print; by default a new report.
    """
    table = Table(title=f"mmdlm {mmdlm.__version__}", title_justify="left")
    for column in ("part", "state", "found", "next move"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "off": "yellow", "broken": "bold red"}
    checks = report() if checks is None else checks
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}[/]"
        table.add_row(check.name, state, escape(check.seen), escape(check.fix))
    Console().print(table)
    return int(any(check.state == "broken" for check in checks))


def system_packages() -> list[str]:
    """Debian packages that the installed extras need and this machine lacks."""
    missing = []
    if find_spec("mujoco") and not _finish(_start_gl_trials()):
        missing.append("libosmesa6")
    if find_spec("cv2") and _python_fails("import cv2"):  # PushT draws with it
        missing += ["libgl1", "libglib2.0-0"]
    return missing


def _python() -> Check:
    oldest, newest = (".".join(map(str, v)) for v in PYTHON)
    seen = f"{sys.version.split()[0]} at {sys.executable}"
    if PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        return Check("python", "ok", seen)
    return Check("python", "broken", seen, f"use Python {oldest} to {newest}")


def _compiled() -> list[Check]:
    """Whether torch, and the torchvision and torchaudio beside it, have fitting versions and load.

    Versions alone do not tell: the metadata of torchaudio 2.11.1 admits torch 2.11, on which its
    compiled part does not load. So each is imported in a process.
    """
    trials = {name: _start_python(IMPORTS[name]) for name in OLDEST}
    torch, checks = _version("torch"), []
    for name, trial in trials.items():
        version, error = _version(name), _last_line(trial)
        fix = f'pip install "{_fitting(name, torch)}"'
        if version is None:
            checks.append(Check(name, "broken", f"missing; needed for {USED_FOR[name]}", fix))
            continue
        wrong = _misfit(name, version, torch) or error
        if wrong:
            seen = f"{version} does not work: {wrong}; needed for {USED_FOR[name]}"
            checks.append(Check(name, "broken", seen, fix))
        else:
            checks.append(Check(name, "ok", version))
    return checks


def _misfit(name: str, version: str, torch: str | None) -> str:
    """Why this version of torch, torchvision or torchaudio cannot be used here, else ""."""
    if Version(version) < Version(OLDEST[name]):
        return f"older than {OLDEST[name]}"
    for line in () if torch is None else metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.name == "torch" and not needed.specifier.contains(torch, prereleases=True):
            return f"made for torch {needed.specifier}, here is {torch}"
    return ""


def _fitting(name: str, torch: str | None) -> str:
    """The requirement of a release of this library that fits the installed torch."""
    if name == "torch" or torch is None or Version(torch) < Version(OLDEST["torch"]):
        return f"{name}>={OLDEST[name]}"
    if name == "torchaudio":
        return fitting_torchaudio(torch)
    # torchvision 0.26 is made for torch 2.11, 0.27 for 2.12, and so on.
    return f"{name}==0.{Version(torch).minor + 15}.*"


def _core() -> Check:
    missing = [name for name in CORE if _version(name) is None]
    if missing:
        return Check("libraries", "broken", f"{', '.join(missing)} missing", "pip install mmdlm")
    return Check("libraries", "ok", ", ".join(f"{name} {_version(name)}" for name in CORE[:3]))


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", "broken", f"torch does not load: {error}", "see the line torch")
    if not torch.cuda.is_available():
        return Check("device", "off", f"CPU, {torch.get_num_threads()} threads; no CUDA device")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("device", "ok", f"{', '.join(cards)} (CUDA {torch.version.cuda})")


def _neighbour(name: str) -> Check:
    """Whether no other distribution installs a top-level package of this name."""
    owners = set(metadata.packages_distributions().get(name, ())) - {"mmdlm"}
    seen = str(Path(mmdlm.__file__).parent.parent / name)
    if not owners:
        return Check(f"package {name}", "ok", seen)
    fix = f"pip uninstall {' '.join(sorted(owners))}, or use a fresh environment"
    return Check(f"package {name}", "broken", f"{seen}, also from {', '.join(sorted(owners))}", fix)


def _model(folder: Path) -> Check:
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        seen = f"{', '.join(missing)} missing in {folder}"
        return Check("bundled model", "broken", seen, "install mmdlm again")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Check("bundled model", "ok", f'mmdlm.load("tiny"), {size / 1e6:.1f} MB')


def _extra(name: str) -> Check:
    adds, distributions = EXTRAS[name]
    missing = [d for d in distributions if _version(d) is None]
    if not missing:
        return Check(f"extra {name}", "ok", adds)
    seen = f"{adds}; {', '.join(missing)} missing"
    return Check(f"extra {name}", "off", seen, f'pip install "mmdlm[{name}]"')


def _rendering(working: list[str]) -> Check:
    from mmdlm.simulators.simulator import GL_PACKAGES, choose_gl

    if not find_spec("mujoco"):
        return Check("rendering", "off", "MuJoCo is missing", 'pip install "mmdlm[sim]"')
    if not working:
        return Check("rendering", "off", f"none of {', '.join(GL_BACKENDS)} renders", GL_PACKAGES)
    seen = f"MuJoCo renders with {' and '.join(working)}"
    if choose_gl() not in working:
        seen += f", but {choose_gl()} would be used"
        return Check("rendering", "off", seen, f"export MUJOCO_GL={working[0]}")
    return Check("rendering", "ok", seen)


def _codecs() -> Check:
    """Whether audio formats can be read that soundfile does not know."""
    name, version = "other audio", _version("av")
    seen = f"PyAV {version or 'missing'}"
    if version and (error := _last_line(_start_python("import av"))):
        seen += f" does not load: {error}"
    elif version:
        return Check(name, "ok", seen)
    seen += "; WAV, FLAC, OGG and MP3 work without"
    return Check(name, "off", seen, 'for other formats: pip install "mmdlm[data]"')


def _espeak() -> Check:
    program, wheel = shutil.which("espeak-ng"), _version("espeakng-loader")
    if wheel or program:
        return Check("espeak-ng", "ok", f"espeakng-loader {wheel}" if wheel else str(program))
    return Check("espeak-ng", "off", "missing", 'pip install "mmdlm[speech]"')


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _start_gl_trials() -> dict[str, subprocess.Popen]:
    """One process per backend: a process can use only one."""
    if not find_spec("mujoco"):
        return {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return {
        name: subprocess.Popen(
            [sys.executable, "-c", GL_TRIAL],
            env={**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name},
            **quiet,
        )
        for name in GL_BACKENDS
    }


def _finish(trials: dict[str, subprocess.Popen], seconds: float = 20) -> list[str]:
    """Names of the trials that succeeded; one that hangs is stopped."""
    working = []
    for name, process in trials.items():
        try:
            if process.wait(timeout=seconds) == 0:
                working.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return working


def _start_python(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _last_line(process: subprocess.Popen) -> str:
    """What a Python process that failed said last, and "" of one that succeeded."""
    _, errors = process.communicate()
    if process.returncode == 0:
        return ""
    return (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]


def _python_fails(code: str) -> bool:
    return bool(_last_line(_start_python(code)))


if __name__ == "__main__":
    if "--system" in sys.argv[1:]:
        needed = system_packages()
        print(" ".join(needed))
        sys.exit(bool(needed))
    sys.exit(print_report())
