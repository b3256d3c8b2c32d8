"""Where a checkpoint is: a bundled model, a folder, or a repository of the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"
# Everything else of a hub repository (code, pickles, other runtimes' weights) stays there.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "decoding.yaml", "README.md"]


def find(source: str | Path) -> Path:
    """The folder of a source, downloaded when it is a hub id.

    Args:
        source: see `mmdlm.checkpoint.load`. A bundled name comes before a folder of that name;
            write "./tiny" for the folder.

    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    names = bundled()
    if isinstance(source, str) and source in names:
        return MODELS / source
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"{source} is a file; give the folder with config.json and *.safetensors"
        )
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return _download(source)
    beside = [f.name for f in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, [*names, *beside], 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise FileNotFoundError(
        f"no checkpoint at {str(source)!r}{hint} Give a bundled model "
        f"({', '.join(names) or 'none in this installation'}), a folder, or a hub id (owner/name)"
    )


def bundled() -> list[str]:
    """Names of the models inside the package, sorted."""
    return sorted(file.parent.name for file in MODELS.glob("*/config.json"))


def _download(source: str) -> Path:
    """The local copy of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{source!r} is not a folder here, and the hub did not give it: {error}. Bundled "
            f"models: {', '.join(bundled()) or 'none'}"
        ) from error
