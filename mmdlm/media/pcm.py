"""Headers of WAV, AIFF, AU, CAF and W64 and NIST files, and their uncompressed samples.

The headers of these files are often wrong: a program that writes to a pipe does not know the
length, and others count bytes that are not there. So the file's real length decides where it can.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

# Recorders that cannot seek back state 0 or one of the largest numbers.
UNKNOWN = 2**31 - 2**16
KNOWN_CHUNKS = (b"data", b"fmt ", b"LIST", b"fact", b"COMM", b"SSND", b"bext", b"id3 ", b"JUNK")
MOST_CHUNKS = 10_000
SEARCHED = 2**20  # bytes in which a data chunk is searched for
WAV_PCM, WAV_FLOAT, WAV_ALAW, WAV_ULAW, WAV_EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
AIFC_CODECS = {
    **dict.fromkeys((b"NONE", b"twos", b"in24", b"in32"), ("int", ">")),
    **dict.fromkeys((b"sowt", b"23ni", b"42ni"), ("int", "<")),
    **dict.fromkeys((b"fl32", b"FL32", b"fl64", b"FL64"), ("float", ">")),
    b"raw ": ("uint", ">"),
    **dict.fromkeys((b"alaw", b"ALAW"), (WAV_ALAW, ">")),
    **dict.fromkeys((b"ulaw", b"ULAW"), (WAV_ULAW, ">")),
}
AU_CODECS = {
    **{code: ("int", width) for code, width in ((2, 1), (3, 2), (4, 3), (5, 4))},
    **{6: ("float", 4), 7: ("float", 8), 1: (WAV_ULAW, 1), 27: (WAV_ALAW, 1)},
}


class HeaderError(ValueError):
    """A header of this kind that cannot be used; another reader may know the file."""


@dataclass(frozen=True)
class Sound:
    """Where and how the samples of a file are stored.

    Args:
        codec: "int", "uint" (8 bits) or "float"; else the format tag of a WAV file.
        order: byte order, "<" or ">".
        width: bytes per sample and channel; of compressed samples, bytes per block.
        channels: number of channels.
        rate: Hz.
        start: first byte of the samples.
        stop: byte after the last sample.
        missing: bytes that the header states and the file lacks.
        header: of a compressed WAV file, its format chunk.
    """

    codec: str | int
    order: str
    width: int
    channels: int
    rate: int
    start: int
    stop: int = 0
    missing: int = 0
    header: bytes = b""

    @property
    def frame(self) -> int:
        """Bytes of one sample of all channels."""
        return self.width * self.channels

    @property
    def seconds(self) -> float:
        """Duration of what is there."""
        return (self.stop - self.start) / max(1, self.frame * self.rate)

    @property
    def damage(self) -> str:
        """What is missing, for messages; empty if nothing is."""
        if not self.missing:
            return ""
        there = self.stop - self.start
        text = f"{self.missing} of {there + self.missing} bytes of its samples are missing"
        if self.header:
            return text
        lost = self.missing / max(1, self.frame * self.rate)
        return f"{text} ({lost:.3f} of {self.seconds + lost:.3f} s)"


def read_header(file: BinaryIO) -> Sound | None:
    """Format and place of the samples, or None for other files.

    Raises:
        HeaderError: the file starts like one of these, but its format is unknown or damaged.
    """
    file.seek(0)
    head = file.read(40)
    parser = _parser(head)
    if parser is None:
        return None
    try:
        sound = parser(file, head)
    except (struct.error, OverflowError, LookupError, ValueError) as error:
        raise HeaderError(f"its header is cut off or damaged ({error})") from error
    widths = (2, 4, 8) if sound.codec == "float" else range(1, 9)
    is_plain = isinstance(sound.codec, str)
    if not 1 <= sound.channels < 1000 or (is_plain and sound.width not in widths):
        raise HeaderError(f"it states {sound.channels} channels of {sound.width} bytes")
    return sound


def _parser(head: bytes) -> Callable[[BinaryIO, bytes], Sound] | None:
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wav
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff
    if head[:4] in (b".snd", b"dns."):
        return _au
    if head[:4] == b"caff":
        return _caf
    if head[:8] == b"NIST_1A\n":
        return _nist
    return _w64 if head[:4] == b"riff" and head[24:28] == b"wave" else None


def decode(raw: bytes, sound: Sound) -> np.ndarray:
    """Samples [T C] float32 in [-1, 1] of uncompressed bytes; an incomplete last frame is dropped.

    Integers of any width up to 8 bytes are scaled by their range; fewer bits than bytes hold are
    stored in the upper bits.
    """
    width = sound.width
    raw = raw[: len(raw) // sound.frame * sound.frame]
    if sound.codec == "float":
        return np.frombuffer(raw, f"{sound.order}f{width}").astype("f4").reshape(-1, sound.channels)
    if sound.codec == "uint":
        samples = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
        return samples.reshape(-1, sound.channels)
    size = next(n for n in (1, 2, 4, 8) if n >= width)
    if size > width:
        padded = np.zeros((len(raw) // width, size), np.uint8)
        place = slice(size - width, None) if sound.order == "<" else slice(width)
        padded[:, place] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        raw = padded.tobytes()
    values = np.frombuffer(raw, f"{sound.order}i{size}").astype(np.float64)
    return (values * 2.0 ** (1 - 8 * size)).astype(np.float32).reshape(-1, sound.channels)


def as_wav(raw: bytes, sound: Sound) -> bytes:
    """A WAV file with a right header around compressed samples."""
    header = sound.header or struct.pack(
        "<HHIIHHH",
        sound.codec,
        sound.channels,
        sound.rate,
        sound.rate * sound.frame,
        sound.frame,
        8,
        0,
    )
    body = b"".join(
        (b"WAVEfmt ", struct.pack("<I", len(header)), header)
        + (b"data", struct.pack("<I", len(raw)), raw, b"\0" * (len(raw) % 2))
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _length(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _at(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _chunks(file: BinaryIO, place: int, form: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and stated size of the chunks of a file.

    Args:
        file: open file.
        place: where the first chunk begins.
        form: layout of name and size, see `struct`.
    """
    length, head = _length(file), struct.calcsize(form)
    for _ in range(MOST_CHUNKS):
        if place + head > length:
            return
        name, size = struct.unpack(form, _at(file, place, head))
        if not name[:4].isascii() or not any(name):
            return  # not a chunk
        yield name, place + head, size
        end = place + head + max(0, size)
        place = end
        if size % 2 and form[-1] in "IL":
            # Some programs leave out the padding byte after an odd size.
            padded, tight = _at(file, end + 1, 4), _at(file, end, 4)
            place += padded in KNOWN_CHUNKS or tight not in KNOWN_CHUNKS


def _end(file: BinaryIO, start: int, stated: int, outer: int, form: str) -> tuple[int, int]:
    """Byte after the samples, and how many stated bytes the file lacks.

    Args:
        file: open file.
        start: first byte of the samples.
        stated: size of the samples in the header; 0 or a very large number if it is unknown.
        outer: end of the file as stated in its first bytes.
        form: layout of the chunks, see `_chunks`.
    """
    length = _length(file)
    rest = length - start
    if stated == 0:
        follows = next(_chunks(file, start, form), None)
        return (start if follows and follows[0] in KNOWN_CHUNKS else length), 0
    if stated > rest:
        is_unknown = stated >= UNKNOWN or outer == length
        return length, 0 if is_unknown else stated - rest
    after = _at(file, start + stated, 5)
    is_chunk = any(after[i : i + 4].isalnum() or after[i : i + 3].isalnum() for i in (0, 1))
    if rest - stated > 8 and not is_chunk and (outer == length or rest > 2 * stated):
        return length, 0  # the size of the whole file is right, or none is
    return start + stated, 0


def _wav(file: BinaryIO, head: bytes) -> Sound:
    order = ">" if head[:4] == b"RIFX" else "<"
    form = f"{order}4sI"
    outer = struct.unpack_from(f"{order}I", head, 4)[0] + 8
    fmt, large = b"", 0
    for name, place, size in _chunks(file, 12, form):
        if name == b"fmt ":
            fmt = _at(file, place, min(size, 2**12))
        elif name == b"ds64":
            large = struct.unpack("<8xQ", _at(file, place, 16))[0]
        elif name == b"data":
            stated = large if large and size == 2**32 - 1 else size
            break
    else:
        # The size of a chunk before it is wrong.
        at = _at(file, 0, SEARCHED).find(b"data", 36)
        if at < 0:
            raise HeaderError("it has no data chunk")
        place, stated = at + 8, struct.unpack(f"{order}I", _at(file, at + 4, 4))[0]
    if len(fmt) < 16:
        raise HeaderError("it has no format chunk")
    codec, channels, rate, _, block, bits = struct.unpack_from(f"{order}HHIIHH", fmt)
    if codec == WAV_EXTENSIBLE and len(fmt) >= 26:
        codec = struct.unpack_from(f"{order}H", fmt, 24)[0]
    stop, missing = _end(file, place, stated, outer, form)
    if codec not in (WAV_PCM, WAV_FLOAT):
        return Sound(codec, order, max(1, block), channels, rate, place, stop, missing, fmt)
    width = (bits + 7) // 8
    held = block // max(1, channels)
    if width < held <= 8 and block == held * channels:
        width = held  # such as 24 bits in 4 bytes
    kind = "float" if codec == WAV_FLOAT else "uint" if width == 1 else "int"
    return Sound(kind, order, width, channels, rate, place, stop, missing)


def _aiff(file: BinaryIO, head: bytes) -> Sound:
    outer = struct.unpack_from(">I", head, 4)[0] + 8
    common, start, stated = b"", 0, 0
    for name, place, size in _chunks(file, 12, ">4sI"):
        if name == b"COMM":
            common = _at(file, place, min(size, 64))
        elif name == b"SSND" and not start:
            start = place + 8 + struct.unpack(">I", _at(file, place, 4))[0]
            stated = max(0, size - (start - place)) if size < UNKNOWN else size
    if len(common) < 18 or not start:
        raise HeaderError("it has no COMM or SSND chunk")
    channels, frames, bits, exponent, mantissa = struct.unpack_from(">HIHHQ", common)
    rate = round(mantissa * 2.0 ** (exponent - 16383 - 63))
    name = common[18:22] if head[8:12] == b"AIFC" else b"NONE"
    if name not in AIFC_CODECS:
        raise HeaderError(f"it is compressed as {name!r}")
    codec, order = AIFC_CODECS[name]
    width = (bits + 7) // 8 if isinstance(codec, str) else 1
    exact = frames * channels * width
    if stated == 0 or stated >= UNKNOWN or 0 < exact < stated:
        stated = exact or stated
    return Sound(
        codec, order, width, channels, rate, start, *_end(file, start, stated, outer, ">4sI")
    )


def _au(file: BinaryIO, head: bytes) -> Sound:
    order = ">" if head[:4] == b".snd" else "<"
    start, stated, code, rate, channels = struct.unpack_from(f"{order}5I", head, 4)
    if code not in AU_CODECS:
        raise HeaderError(f"it has the encoding {code}")
    codec, width = AU_CODECS[code]
    end = _end(file, start, stated, 0, f"{order}4sI")
    return Sound(codec, order, width, channels, rate, start, *end)


def _caf(file: BinaryIO, head: bytes) -> Sound:
    description, start = b"", 0
    for name, place, size in _chunks(file, 8, ">4sq"):
        if name == b"desc":
            description = _at(file, place, 32)
        elif name == b"data":
            start, stated = place + 4, max(0, size - 4)  # -1: unknown
            break
    if len(description) < 32 or not start:
        raise HeaderError("it has no desc or data chunk")
    rate, name, flags, _, _, channels, bits = struct.unpack(">d4s5I", description)
    codecs = {b"lpcm": "float" if flags & 1 else "int", b"alaw": WAV_ALAW, b"ulaw": WAV_ULAW}
    if name not in codecs:
        raise HeaderError(f"it is compressed as {name!r}")
    width, order = (bits + 7) // 8 or 1, "<" if flags & 2 else ">"
    end = _end(file, start, stated, 0, ">4sq")
    return Sound(codecs[name], order, width, channels, round(rate), start, *end)


def _w64(file: BinaryIO, head: bytes) -> Sound:
    fmt, place = b"", 40
    while len(chunk := _at(file, place, 24)) == 24:
        size = struct.unpack_from("<Q", chunk, 16)[0] - 24
        if chunk[:4] == b"fmt ":
            fmt = _at(file, place + 24, min(size, 64))
        elif chunk[:4] == b"data":
            break
        place += 24 + max(0, size) + -size % 8
    if len(fmt) < 16 or chunk[:4] != b"data":
        raise HeaderError("it has no format or data chunk")
    codec, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", fmt)
    if codec not in (WAV_PCM, WAV_FLOAT):
        raise HeaderError(f"it has the format {codec}")
    stop, missing = _end(file, place + 24, max(0, size), 0, "<16sQ")
    kind = "float" if codec == WAV_FLOAT else "uint" if bits <= 8 else "int"
    return Sound(kind, "<", (bits + 7) // 8, channels, rate, place + 24, stop, missing)


def _nist(file: BinaryIO, head: bytes) -> Sound:
    start = int(head[8:16])
    lines = _at(file, 16, start - 16).decode("latin-1").split("\n")
    fields = {
        name: value
        for name, _, value in (line.split(" ", 2) for line in lines if line.count(" ") > 1)
    }
    coding = fields.get("sample_coding", "pcm")
    if coding not in ("pcm", "ulaw", "alaw", "mu-law"):
        raise HeaderError(f"it is compressed as {coding}")
    codec = {"pcm": "int", "alaw": WAV_ALAW}.get(coding, WAV_ULAW)
    channels, width = int(fields.get("channel_count", 1)), int(fields.get("sample_n_bytes", 2))
    stated = int(fields["sample_count"]) * channels * width
    order = "<" if fields.get("sample_byte_format", "01").startswith("0") else ">"
    end = _end(file, start, stated, 0, "<4sI")
    return Sound(codec, order, width, channels, int(fields["sample_rate"]), start, *end)
