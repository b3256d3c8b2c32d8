"""Media files: which names are images or audio, and how one is opened."""

from __future__ import annotations

import difflib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Literal

# What Pillow decodes without another program, and HEIC.
_IMAGES = (
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .flc .fli .ftc .ftu .gbr .gif "
    ".heic .heics .heif .heifs .hif .icb .icns .ico .iim .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg "
    ".jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb "
    ".rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm"
)
# What soundfile or PyAV decode, and video files, of which the sound is read.
_SOUNDS = (
    ".3ga .3gp .aac .ac3 .aif .aifc .aiff .alac .amr .ape .au .awb .bwf .caf .eac3 .flac .m4a .m4b "
    ".m4v .mka .mkv .mov .mp1 .mp2 .mp3 .mp4 .mpga .nist .oga .ogg .ogv .ogx .opus .rf64 .snd .spx "
    ".sph .tta .voc .w64 .wav .wave .weba .webm .wma .wv"
)
IMAGE_EXTENSIONS, AUDIO_EXTENSIONS = frozenset(_IMAGES.split()), frozenset(_SOUNDS.split())
SOURCES = (str, Path, bytes, bytearray, memoryview)
NOT_REGULAR = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
OnDamage = Literal["error", "warn"]


def media_kind(path: str | Path) -> Literal["image", "audio"] | None:
    """The modality of a file name by its extension, or None."""
    extension = Path(path).suffix.lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "audio" if extension in AUDIO_EXTENSIONS else None


def check_exists(path: Path) -> None:
    """Raises FileNotFoundError for a missing path; names files that are spelled alike."""
    if path.exists():
        return
    if str(path).startswith(("http:", "https:")):
        raise FileNotFoundError(f"{path} is a URL, expected a local file; download it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such file: {path}; its folder does not exist either")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    raise FileNotFoundError(
        f"no such file: {path}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def open_media(
    source: str | Path | bytes | bytearray | memoryview, reader: str, on_damage: OnDamage
) -> tuple[BinaryIO, str]:
    """An open binary file and its name for errors.

    Args:
        source: path or file bytes.
        reader: name of the calling function, for errors.
        on_damage: checked to be "error" or "warn".
    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, pipe, socket or device, or no bytes.
    """
    if on_damage not in ("error", "warn"):
        raise ValueError(f"{reader}: on_damage={on_damage!r}, expected 'error' or 'warn'")
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise ValueError(f"{reader}: the bytes are empty")
        return io.BytesIO(source), f"the {len(source)} bytes"
    path = Path(source)
    check_exists(path)
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{reader}: {path} is a folder; list its files with find_media")
    # Opening a pipe waits for its writer, and a device may never end.
    if not stat.S_ISREG(status.st_mode):
        kind = NOT_REGULAR.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise ValueError(f"{reader}: {path} is {kind}, expected a regular file; copy it to one")
    if status.st_size == 0:
        raise ValueError(f"{reader}: {path} is empty (0 bytes)")
    return path.open("rb"), str(path)


def report_damage(
    damage: str,
    on_damage: OnDamage,
    reader: str,
    name: str,
    cause: Exception | None = None,
) -> None:
    """Raises ValueError for a damaged file, or warns if its readable part is wanted.

    Args:
        damage: what is wrong; nothing happens if it is empty.
        on_damage: "error" or "warn".
        reader: name of the calling function, for errors.
        name: name of the file.
        cause: what a decoder raised.
    """
    if not damage:
        return
    if on_damage == "warn":
        warnings.warn(f"{name} is damaged: {damage}; the rest is used", stacklevel=4)
        return
    raise ValueError(
        f"{reader}: {name} is damaged or truncated: {damage}; copy it again, or use what is left "
        "with on_damage='warn' (--on-damage warn)"
    ) from cause


def require_av(what: str) -> Any:
    """The module av (PyAV).

    Args:
        what: what needs it, the start of the message.
    Raises:
        ValueError: it is missing; names the extra. Not an ImportError, since in a folder only the
            files of this format fail.
    """
    try:
        import av
    except (ImportError, OSError) as error:  # OSError: a C library is missing
        raise ValueError(f'{what} needs the extra: pip install "mmdlm[data]"') from error
    return av
