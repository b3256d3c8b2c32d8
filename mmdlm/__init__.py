"""Multimodal masked-diffusion language models: pictures, speech and robot actions.

    import mmdlm
    model = mmdlm.load("tiny")
    print(mmdlm.caption(model, "picture.png"))

Every name below is read from its file on first use, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdlm.checkpoint import load
    from mmdlm.decoding.decode import Decoded, decode
    from mmdlm.decoding.session import Session
    from mmdlm.tasks.act import Policy, load_policy
    from mmdlm.tasks.answer import answer
    from mmdlm.tasks.caption import caption
    from mmdlm.tasks.chat import generate
    from mmdlm.tasks.describe import describe
    from mmdlm.tasks.draw import draw
    from mmdlm.tasks.embed import embed
    from mmdlm.tasks.infill import infill
    from mmdlm.tasks.likelihood import likelihood
    from mmdlm.tasks.stream import stream
    from mmdlm.tasks.transcribe import transcribe

__version__ = "0.1.0"

__all__ = [
    "Decoded",
    "Policy",
    "Session",
    "__version__",
    "answer",
    "caption",
    "decode",
    "describe",
    "draw",
    "embed",
    "generate",
    "infill",
    "likelihood",
    "load",
    "load_policy",
    "stream",
    "transcribe",
]

_FILES = {
    "load": "mmdlm.checkpoint",
    "decode": "mmdlm.decoding.decode",
    "Decoded": "mmdlm.decoding.decode",
    "Session": "mmdlm.decoding.session",
    "load_policy": "mmdlm.tasks.act",
    "Policy": "mmdlm.tasks.act",
    "answer": "mmdlm.tasks.answer",
    "caption": "mmdlm.tasks.caption",
    "describe": "mmdlm.tasks.describe",
    "draw": "mmdlm.tasks.draw",
    "embed": "mmdlm.tasks.embed",
    "generate": "mmdlm.tasks.chat",
    "infill": "mmdlm.tasks.infill",
    "likelihood": "mmdlm.tasks.likelihood",
    "stream": "mmdlm.tasks.stream",
    "transcribe": "mmdlm.tasks.transcribe",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(
            f"module 'mmdlm' has no attribute {name!r}; it has {', '.join(_FILES)} "
            "and modules, which are imported by their full name"
        )
    value = getattr(import_module(_FILES[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_neighbours() -> None:
    """Raises where Python would take another `encoders` or `adapters` for ours.

    AdapterHub's distribution is called `adapters` and installs a package of that name; it hides
    ours beside an editable install, and shares our folder in a normal one.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("encoders", "adapters"):
        spec = find_spec(name)
        if spec is None:
            raise ImportError(f"mmdlm is incomplete: no {home / name}; install it again")
        places = spec.submodule_search_locations
        found = Path(next(iter(places)) if places else str(spec.origin))
        if found.resolve() != (home / name).resolve():
            raise ImportError(
                f"mmdlm needs its own package {name!r} in {home / name}, but Python finds {found}. "
                f"If that is an installed distribution: use a fresh environment, or pip uninstall "
                f"{name}. If it is a folder or file of yours, beside your script or on PYTHONPATH: "
                "rename it."
            )
        for record in home.glob(f"{name}-*.dist-info/RECORD"):
            if f"\n{name}/__init__.py," in "\n" + record.read_text(encoding="utf-8"):
                raise ImportError(
                    f"mmdlm and the distribution {record.parent.stem} were installed into one "
                    f"folder, {home / name}, and have overwritten each other's files. Use a fresh "
                    f"environment, or pip uninstall {name} mmdlm and install mmdlm again."
                )


_check_neighbours()
