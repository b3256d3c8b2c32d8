"""Imports torchaudio where audio is processed, so that nothing else fails if it does not load."""

from __future__ import annotations

from types import ModuleType


def import_torchaudio() -> ModuleType:
    """The package torchaudio with its modules `functional` and `transforms`.

    Raises:
        ImportError: it is missing, or its compiled part does not load with the installed torch.
            The message has the command that installs a release that does.
    """
    import torch

    try:
        import torchaudio.functional
        import torchaudio.transforms
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImportError(
            f"audio needs torchaudio, which does not load with torch {torch.__version__} "
            f'({reason}); run: pip install "{fitting_torchaudio(torch.__version__)}"'
        ) from error
    return torchaudio


def fitting_torchaudio(torch_version: str) -> str:
    """The requirement of a torchaudio release that loads with this version of torch (>= 2.11).

    torchaudio 2.11.1 is compiled for torch releases after 2.11, although its metadata admits 2.11.
    """
    is_oldest = torch_version.startswith("2.11.")
    return "torchaudio==2.11.0" if is_oldest else "torchaudio>=2.11.1"
