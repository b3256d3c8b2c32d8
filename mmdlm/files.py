"""Files of a checkpoint: where they are, and readers for files that may be damaged or hostile.

Every reader here accepts regular files only (a pipe would block), limits what it builds, and raises
one error that names the file and the next move.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

MODELS = Path(__file__).parent / "models"
# Everything else of a hub repository (code, pickles, other runtimes' weights) stays there.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "decoding.yaml", "README.md"]
LARGEST, LARGEST_YAML = 2**27, 2**18  # bytes; the largest published tokenizer.json has 35 MB
NODES = 100_000
"""Most values in a YAML file, counting those behind an alias once per use."""
LONGEST = 2000  # characters of an error
POINTER = b"version https://git-lfs.github.com/spec/"
KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# What Python raises when a value read from a file has an unexpected type or size.
UNFIT = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def find(source: str | Path) -> Path:
    """The folder of a source, downloaded when it is a hub id.

    Args:
        source: see `mmdlm.checkpoint.load`. A bundled name comes before a folder of that name;
            write "./tiny" for the folder.

    Raises:
        FileNotFoundError: there is nothing of that name.
        TypeError: it is not a name.
    """
    if not isinstance(source, str | PurePath):
        raise TypeError(
            f"source is a {type(source).__name__}, expected the name of a bundled model, a folder "
            "or a hub id"
        )
    if not str(source) or len(str(source)) > LONGEST:
        raise FileNotFoundError(f"source is {str(source)[:80]!r}, expected a name or folder")
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


def present(file: Path) -> bool:
    """Whether a regular file exists; False if nothing has that name.

    Raises:
        ValueError: the name belongs to a folder, pipe, socket or device, or to a link without a
            target; or the file may not be read.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not file.is_symlink():
            return False
        kind = "a link to a file that does not exist"
    except (OSError, ValueError) as error:  # loops of links, permissions, names too long
        kind = f"not readable ({getattr(error, 'strerror', None) or error})"
    else:
        if stat.S_ISREG(mode):
            return True
        kind = next((name for test, name in KINDS if test(mode)), "not a file")
    raise ValueError(f"{file} is {kind}, expected a regular file; remove it or download it again")


def read_bytes(file: Path, most: int = LARGEST) -> bytes:
    """Contents of a regular file.

    Args:
        file: which.
        most: maximum number of bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, is larger, is a Git LFS pointer, or may not be read.
    """
    if not present(file):
        near = sorted(f.name for f in file.parent.iterdir()) if file.parent.is_dir() else []
        raise FileNotFoundError(
            f"{file.parent} holds no {file.name}, only {preview(near) or 'nothing'}; "
            "give the folder of a checkpoint"
        )
    try:
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); check its rights") from error
    if len(data) > most:
        raise ValueError(f"{file} has more than {most:,} bytes, expected a smaller file")
    check_pointer(data, file)
    return data


def check_pointer(start: bytes, file: Path) -> None:
    """Raises if a file is the placeholder that Git LFS leaves of it.

    Args:
        start: its first bytes.
        file: for the error.

    Raises:
        ValueError: it is.
    """
    if start.startswith(POINTER):
        raise ValueError(
            f"{file} is a Git LFS pointer, not the file itself; fetch the file with git lfs pull"
        )


def read_text(file: Path, most: int = LARGEST) -> str:
    """Contents of a UTF-8 file without byte order mark, its lines ended by a line feed.

    See `read_bytes` for the errors.
    """
    return decoded(read_bytes(file, most), file)


def decoded(data: bytes, source: Path | str) -> str:
    """Text of UTF-8 bytes as `read_text` gives it.

    Args:
        data: contents of a file.
        source: that file, for errors.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8 ({error}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_input(file: Path) -> str:
    """Contents of a file that a user names, as `read_text` gives them; it may be a pipe, and large.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    return decoded(file.read_bytes(), file)


def read_lines(file: Path) -> list[str]:
    """The lines of a file that a user names but for empty ones, see `read_input`.

    Only a line feed ends a line; JSON texts may contain the other characters that `splitlines`
    takes for one.
    """
    return [line for line in read_input(file).split("\n") if line.strip()]


def parse_json(text: str, source: Path | str) -> Any:
    """The value of a JSON text.

    Args:
        text: what a file holds.
        source: that file, for errors.

    Raises:
        ValueError: it is empty, not valid, or nested too deeply.
    """
    if not text.strip():
        raise ValueError(f"{source} is empty, expected JSON; download or export it again")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source} is not valid JSON ({error}); download or export it again"
        ) from error
    if re.search(r"\\u[dD][89a-fA-F]", text):  # else there are no escaped surrogates
        check_text(value, source)
    return value


def check_text(value: Any, source: Path | str) -> None:
    """Raises unless the texts in nested data can be encoded.

    Args:
        value: plain data.
        source: the file, for errors.

    Raises:
        ValueError: one holds half of a surrogate pair.
    """
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            left += each
        elif isinstance(each, str) and re.search("[\ud800-\udfff]", each):
            raise ValueError(f"{source} holds {each[:80]!r}, with half of a surrogate pair")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, see also `read_bytes` and `parse_json`.
    """
    value = parse_json(read_text(file), file)
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected an object")
    return value


def read_yaml(file: Path) -> Any:
    """The value of a YAML file in plain types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid YAML, or its aliases stand for more than `NODES` values.
    """
    import yaml

    text = read_text(file, LARGEST_YAML)
    try:
        value = yaml.safe_load(text)
        weigh(value, NODES)
    except (yaml.YAMLError, ValueError, *UNFIT) as error:
        place = " ".join(str(error).split())
        raise ValueError(f"{file} is not valid YAML ({place}); correct it") from error
    return value


def weigh(value: Any, most: int, unit: int = 0) -> int:
    """Number of values inside nested lists and tables; shared ones count once per use.

    Written out, a value of few objects can be exponentially large: a list of two references to a
    list of two references, and so on.

    Args:
        value: plain data, which may contain itself.
        most: where to stop counting.
        unit: how many characters of a text count as one value; 0 for any number.

    Raises:
        ValueError: there are more than `most`.
    """
    left, count = [value], 0
    while left:
        each = left.pop()
        count += 1
        if isinstance(each, str | bytes):
            count += len(each) // unit if unit else 0
        elif isinstance(each, Mapping):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
        if count + len(left) > most:
            raise ValueError(f"holds more than {most:,} values, expected fewer")
    return count


def _cut(error: Exception) -> str:
    """The text of an error, shortened where it repeats a large value."""
    text = str(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


@contextmanager
def blaming(source: Path | str) -> Iterator[None]:
    """Turns what goes wrong with the contents of a file into a ValueError that names it.

    Args:
        source: the file. Errors that name its folder stay as they are.

    Raises:
        ValueError: anything but FileNotFoundError and ImportError was raised inside.
    """
    try:
        yield
    except ValueError as error:
        folder = source.parent if isinstance(source, Path) else source
        if str(folder) in str(error):
            raise
        raise ValueError(f"{source}: {_cut(error)}") from error
    except KeyError as error:
        missing = error.args[0] if error.args else ""
        said = missing if " " in str(missing) else f"lacks {missing!r}"
        raise ValueError(f"{source}: {said}") from error
    except UNFIT as error:
        what = _cut(error) or type(error).__name__
        raise ValueError(
            f"{source}: a value is of an unexpected kind or size ({what}); compare it with the "
            "published one"
        ) from error


def preview(names: Any) -> str:
    """The first few of many names."""
    names = list(map(str, names))
    more = f", ... {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
