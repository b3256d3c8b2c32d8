"""Parts of PNG, JPEG and WebP files: checksums of pixel data, and files without their metadata."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)  # markers of JPEG segments
BLOCK = 2**20  # bytes
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def check_png(data: bytes) -> tuple[bytes, str, str]:
    """Verifies the checksums of a PNG file, which Pillow does not do for pixels.

    Args:
        data: the file.
    Returns:
        the file without the metadata chunks that are damaged, what is wrong with its pixels, and
        the names of the chunks that were removed; the last two are empty if all is well.
    """
    kept, pixels, removed, damage = [memoryview(PNG)], [], [], ""
    for at, kind, chunk, is_whole, is_valid in _png_chunks(data):
        if not is_valid and (kind not in PIXELS or kind == b"IEND"):
            removed.append(kind.decode("latin-1"))
            continue
        kept.append(chunk)
        if kind == b"IDAT":
            pixels.append(chunk[8:-4])
        if not damage and not is_valid:
            state = "is cut off" if not is_whole else "has a wrong checksum"
            damage = f"the chunk {kind.decode()} at byte {at} {state}"
    if kept[-1][4:8] != b"IEND":
        kept.append(memoryview(PNG_END))
        if not damage:
            removed = removed or ["IEND"]
    # A removed chunk may have been one of pixels whose name was damaged.
    if removed and not damage and not _is_whole_stream(pixels):
        damage = f"the pixels are incomplete, and {', '.join(removed)} is missing or not readable"
    return b"".join(kept) if removed else data, damage, ", ".join(removed)


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes, memoryview, bool, bool]]:
    """Place, name and bytes of each chunk, and whether it is whole and its checksum right."""
    view, at = memoryview(data), len(PNG)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        is_whole = end <= len(data)
        is_valid = is_whole and zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(
            data[end - 4 : end], "big"
        )
        yield at, kind, view[at:end], is_whole, is_valid
        if kind == b"IEND":
            return
        if kind not in PIXELS and not is_valid and not data[end + 4 : end + 8].isalpha():
            # The length is wrong too; pixels may follow.
            end = data.find(b"IDAT", at + 8) - 4
            if end < 0:
                return
        at = end


def _is_whole_stream(parts: list[memoryview]) -> bool:
    """Whether zlib data is complete; it ends with a checksum of its own."""
    decoder = zlib.decompressobj()
    try:
        for part in parts:
            decoder.decompress(part, BLOCK)
            while decoder.unconsumed_tail:  # in blocks, since a little may unpack to very much
                decoder.decompress(decoder.unconsumed_tail, BLOCK)
    except zlib.error:
        return False
    return decoder.eof


def without_metadata(data: bytes) -> bytes | None:
    """A PNG, JPEG or WebP file with only what its pixels need; None for other formats."""
    if data.startswith(PNG):
        return PNG + b"".join(
            bytes(chunk) for _, kind, chunk, *_ in _png_chunks(data) if kind in PIXELS
        )
    if data.startswith(JPEG):
        return _bare_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data)
    return None


def _bare_jpeg(data: bytes) -> bytes:
    """A JPEG file without application segments and comments.

    JFIF and Adobe segments are kept, since they tell how colours are stored.
    """
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":  # start of pixels
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + size
        is_marker = data[at] == 0xFF
        is_metadata = not is_marker or marker in METADATA
        if is_metadata and not (is_marker and data[end : end + 1] == b"\xff"):
            # A wrong length; the tables that pixels need come next.
            end = data.find(b"\xff\xdb", at + 4)
            end = len(data) if end < 0 else end
        if not is_metadata:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _bare_webp(data: bytes) -> bytes:
    """A WebP file without colour profile, EXIF and XMP."""
    kept, at = [b"WEBP"], 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        end = at + 8 + size + size % 2
        chunk = data[at:end]
        if kind == b"VP8X" and size:  # its flags name the other chunks
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]
        if kind not in (b"ICCP", b"EXIF", b"XMP "):
            kept.append(chunk)
        at = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
