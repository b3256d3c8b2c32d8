"""Frames of MP3, AAC, AMR and Ogg files: what is missing from a file that decoders read silently.

Decoders skip what they cannot read and report success. So the frames are walked first: each
states its size, and the next must begin where it ends.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

# kbit/s of MPEG 1 and 2 layers; source: ISO/IEC 11172-3 and 13818-3.
BITRATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[2, 3] = BITRATES[2, 2]
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz
AAC_RATES = (
    96000,
    88200,
    64000,
    48000,
    44100,
    32000,
    24000,
    22050,
    16000,
    12000,
    11025,
    8000,
    7350,
)
# Bytes of each frame type, its first byte included; source: RFC 4867.
AMR_SIZES = (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1)
AMR_WIDE_SIZES = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1)
TAGS = (b"TAG", b"APETAGEX", b"LYRICS", b"ID3", b"3DI")  # after the last frame
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


SEARCHED = 2**16  # bytes in which the next frame is searched for


@dataclass(frozen=True)
class Frame:
    """Size in bytes, duration in seconds, and what equals in all frames of a file."""

    size: int
    seconds: float
    format: object


Parser = Callable[[bytes, int], Frame | None]


@dataclass
class Walk:
    """What a walk over the frames of a file found.

    Args:
        damage: what is missing; empty for a whole file.
        data: the frames; of an Ogg file that was joined from several, each of them.
        seconds: duration of its whole frames.
        count: number of its whole frames.
        is_joined: whether `data` differs from what the file has between its first and last frame.
    """

    damage: str
    data: list[bytes]
    seconds: float
    count: int
    is_joined: bool = False


@dataclass
class _Found:
    places: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    lost: int = 0
    """Bytes between frames."""
    cut: int = 0
    """Bytes that the last frame lacks."""


def walk(data: bytes) -> Walk | None:
    """The frames of an MP3, AAC (ADTS), AMR or Ogg file; None for other files."""
    if data[:4] == b"OggS":
        return _walk_ogg(data)
    for magic, sizes in ((b"#!AMR\n", AMR_SIZES), (b"#!AMR-WB\n", AMR_WIDE_SIZES)):
        if data.startswith(magic):
            return _report(data, _walk(data, len(magic), _amr(sizes)), data[: len(magic)])
    first = _first(data, after_id3(data))
    if first is None:
        return None
    at, parse = first
    if parse is _aac:
        return _report(data, _walk(data, at, parse))
    stated = _stated(data, at)
    found = _report(data, _walk(data, at, parse), stated=stated)
    # Layer III only: the others have a constant bit rate.
    [frames] = found.data
    if found.is_joined and found.count and frames[1] & 6 == 2:
        first = _first_frame(frames) if stated is None else data[at : at + _mp3(data, at).size]
        found.data = [_with_count(first, found.count, len(frames)) + frames]
    return found


def _mp3(data: bytes, at: int) -> Frame | None:
    head = int.from_bytes(data[at : at + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    bits, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or rate == 3 or bits in (0, 15):
        return None
    kind, hertz = 1 if version == 3 else 2, RATES[version][rate]
    kilobits = BITRATES[kind, layer][bits - 1]
    samples = {1: 384, 2: 1152, 3: 1152 if kind == 1 else 576}[layer]
    slot = 4 if layer == 1 else 1
    size = (samples // 8 * kilobits * 1000 // hertz // slot + padding) * slot
    return Frame(size, samples / hertz, (version, layer, hertz))


def _aac(data: bytes, at: int) -> Frame | None:
    head = int.from_bytes(data[at : at + 7], "big") >> 28  # the first 28 bits
    size = int.from_bytes(data[at + 3 : at + 6], "big") >> 5 & 0x1FFF
    rate = head >> 6 & 15
    if head >> 16 != 0xFFF or head >> 13 & 3 or rate >= len(AAC_RATES) or size < 7:
        return None
    return Frame(size, 1024 / AAC_RATES[rate], (head >> 10 & 3, rate))


def _amr(sizes: tuple[int, ...]) -> Parser:
    def parse(data: bytes, at: int) -> Frame | None:
        size = sizes[data[at] >> 3 & 15] if at < len(data) and not data[at] & 0x83 else 0
        return Frame(size, 0.02, None) if size else None

    return parse


def after_id3(data: bytes, at: int = 0) -> int:
    """Place after the ID3 tags at `at`."""
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at


def _after_tags(data: bytes, at: int) -> int:
    """Place after the tags that stand between two joined files."""
    at += 128 * data.startswith(b"TAG", at)
    return after_id3(data, at)


def _first(data: bytes, start: int) -> tuple[int, Parser] | None:
    """Place and parser of the first MP3 or AAC frame, if other frames of its format follow it."""
    at = data.find(b"\xff", start)
    while 0 <= at < start + SEARCHED:
        for parse in (_mp3, _aac):
            frame = first = parse(data, at)
            end, count = at, 0
            while frame is not None and frame.format == first.format and count < 4:
                end, count = end + frame.size, count + 1
                frame = parse(data, end)
            # Bytes of another kind look like two frames in a row now and then.
            if count == 4 or (count and at == start and (count > 1 or _is_end(data, end))):
                return at, parse
        at = data.find(b"\xff", at + 1)
    return None


def _is_end(data: bytes, at: int) -> bool:
    """Whether no frame follows: tags, zeros, or the end of the file."""
    return data.startswith(TAGS, at) or not data[at : at + 2**16].strip(b"\0")


def _walk(data: bytes, at: int, parse: Parser) -> _Found:
    found, usual = _Found(), None
    while at < len(data):
        frame = parse(data, at)
        if frame is None or (usual is not None and frame.format != usual):
            after = _after_tags(data, at)
            frame = parse(data, after)
            if after > at and frame is not None and frame.format == usual:
                at = after  # files were joined
                continue
            if _is_end(data, at):
                break
            after = _resume(data, at, parse, usual)
            found.lost += after - at
            at = after
            continue
        usual = frame.format
        if at + frame.size > len(data):
            found.cut = at + frame.size - len(data)
            break
        found.places.append((at, at + frame.size))
        found.seconds += frame.seconds
        at += frame.size
    return found


def _resume(data: bytes, at: int, parse: Parser, usual: object) -> int:
    """Place of the next frame after bytes that belong to none; the end of the file if it is far."""
    for place in range(at + 1, min(len(data), at + SEARCHED)):
        frame = parse(data, place)
        if frame is None or frame.format != usual:
            continue
        after = parse(data, place + frame.size)
        if (after is not None and after.format == usual) or _is_end(data, place + frame.size):
            return place
    return len(data)


def _stated(data: bytes, at: int) -> int | None:
    """Number of frames after the first one that it states; None if it states none."""
    first = data[at : at + 64]
    for name in (b"Xing", b"Info"):
        place = first.find(name, 4, 48)
        if place > 0 and first[place + 7] & 1:
            return struct.unpack_from(">I", first, place + 8)[0]
    if first[36:40] == b"VBRI":
        return struct.unpack_from(">I", first, 50)[0]
    return None


def _report(data: bytes, found: _Found, head: bytes = b"", stated: int | None = None) -> Walk:
    parts = []
    if found.lost:
        parts.append(f"{found.lost} bytes between its frames are not readable")
    if found.cut:
        parts.append(f"its last frame lacks {found.cut} bytes")
    places = found.places if stated is None else found.places[1:]
    # Some encoders count the frame that states the number.
    if stated is not None and len(places) + 1 < stated:
        parts.append(f"{stated - len(places)} of {stated} frames are missing")
    sizes = [stop - start for start, stop in places] or [0]
    is_wrong = max(sizes) - min(sizes) > 4 if stated is None else len(places) > stated
    if parts or is_wrong:
        data = head + b"".join(data[start:stop] for start, stop in places)
    elif places:  # without what other programs put before and after it
        data = head + data[found.places[0][0] : places[-1][1]]
    return Walk(", ".join(parts), [data], found.seconds, len(places), bool(parts) or is_wrong)


def _first_frame(data: bytes) -> bytes:
    """A silent MP3 frame of the format of `data`, with room for the number of frames."""
    head = int.from_bytes(data[:4], "big")
    head = head & ~0xF000 | 0xC000 | 0x10000  # large enough, and without checksum
    is_first, is_mono = head >> 19 & 3 == 3, head >> 6 & 3 == 3
    side = (17 if is_mono else 32) if is_first else (9 if is_mono else 17)
    text = head.to_bytes(4, "big")
    return (text + bytes(side) + b"Xing" + bytes(3) + b"\1").ljust(_mp3(text, 0).size, b"\0")


def _with_count(first: bytes, count: int, size: int) -> bytes:
    """The first MP3 frame with this number of frames, of `size` bytes, after it.

    Decoders take the length of the file from it.
    """
    frame = bytearray(first)
    place = max(frame.find(name) for name in (b"Xing", b"Info", b"VBRI"))
    struct.pack_into(">I", frame, place + (14 if b"VBRI" in first else 8), count)
    if b"VBRI" not in first and frame[place + 7] & 2:
        struct.pack_into(">I", frame, place + 12, len(first) + size)
    if frame[place + 7] & 15 == 15 and len(frame) > place + 144:
        # The last samples are not the padding that the encoder added.
        frame[place + 142] &= 0xF0
        frame[place + 143] = 0
    return bytes(frame)


def _checksum(page: bytes) -> int:
    """Checksum of an Ogg page: the CRC of zlib with its bits in the opposite order."""
    plain = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{plain:032b}"[::-1], 2)


def _walk_ogg(data: bytes) -> Walk:
    links: list[list[bytes]] = [[]]
    """Pages of each of the files that were joined."""
    lost = damaged = gaps = count = at = 0
    last: dict[int, tuple[int, bool]] = {}
    """Sequence number and end flag of the last page of each stream."""
    while at < len(data):
        page = _page(data, at)
        if page is None:
            after = data.find(b"OggS", at + 1)
            if after < 0 and last and all(ended for _, ended in last.values()):
                break  # not audio
            after = len(data) if after < 0 else after
            lost, at = lost + after - at, after
            continue
        at += len(page)
        if _checksum(page[:22] + b"\0\0\0\0" + page[26:]) != int.from_bytes(page[22:26], "little"):
            damaged += 1
            continue
        flags, serial, number = page[5], *struct.unpack_from("<II", page, 14)
        if flags & 2 and last and all(ended for _, ended in last.values()):
            links.append([])
        elif serial in last:
            gaps += max(0, number - last[serial][0] - 1)
        last[serial] = number, bool(flags & 4)
        links[-1].append(page)
        count += 1
    parts = []
    if damaged:
        parts.append(f"{damaged} of {count + damaged} pages have wrong checksums")
    if gaps > damaged:
        parts.append(f"{gaps - damaged} of {count + gaps} pages are missing")
    if lost:
        parts.append(f"{lost} bytes belong to no whole page")
    if not all(ended for _, ended in last.values()):
        parts.append("its last page is missing")
    return Walk(", ".join(parts), [b"".join(pages) for pages in links], 0.0, count)


def _page(data: bytes, at: int) -> bytes | None:
    """One whole Ogg page, or None."""
    if data[at : at + 4] != b"OggS" or len(data) < at + 27:
        return None
    end = at + 27 + data[at + 26]
    end += sum(data[at + 27 : end])
    return data[at:end] if end <= len(data) else None
