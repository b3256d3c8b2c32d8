"""Sound files of many containers and codecs, made in memory for the tests of this folder."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import soundfile

RATE = 16_000
SEED = np.random.default_rng(0)
TIME = np.arange(RATE) / RATE
# Speech-like: two tones whose loudness changes, so that a shift or a gap is noticed.
MONO = (0.4 * np.sin(2 * np.pi * 440 * TIME) + 0.1 * np.sin(2 * np.pi * 1330 * TIME)) * (
    0.4 + 0.6 * np.sin(2 * np.pi * 3 * TIME) ** 2
)
STEREO = np.stack([MONO, 0.5 * MONO], axis=1)


def written(samples: np.ndarray, rate: int = RATE, **form: Any) -> bytes:
    """A file written by soundfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


class Pipe(io.RawIOBase):
    """A file in which the writer cannot go back to fill in the length."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Appends."""
        self.data += bytes(data)
        return len(data)

    def getvalue(self) -> bytes:
        """Everything written."""
        return self.data


def encoded(
    container: str,
    codec: str,
    rate: int = RATE,
    channels: int = 1,
    *,
    pipe: bool = False,
    **options: Any,
) -> bytes:
    """A file written by PyAV."""
    file = Pipe() if pipe else io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, **options)
        stream.layout = layout
        source = np.interp(np.arange(rate) / rate, TIME, MONO).astype(np.float32)
        planes = np.repeat(source[None], channels, axis=0)
        for at in range(0, rate, 1024):
            part = np.ascontiguousarray(planes[:, at : at + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, at
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return file.getvalue()


def integers(samples: np.ndarray, width: int, order: str = "<") -> bytes:
    """Signed integers of `width` bytes, scaled by their range; 8 bits are unsigned."""
    if width == 1:
        return np.clip(np.rint(samples * 128) + 128, 0, 255).astype(np.uint8).tobytes()
    scaled = np.rint(samples.astype(np.longdouble) * 2 ** (8 * width - 1)).astype(np.int64)
    data = scaled.astype(f"{order}i8").view(np.uint8).reshape(-1, 8)
    return (data[:, :width] if order == "<" else data[:, 8 - width :]).tobytes()


def chunk(name: bytes, data: bytes, order: str = "<", pad: bool = True) -> bytes:
    """One chunk of a RIFF file."""
    filler = b"\0" * (len(data) % 2) if pad else b""
    return name + struct.pack(f"{order}I", len(data)) + data + filler


def wav(
    samples: np.ndarray = MONO,
    width: int = 2,
    *,
    bits: int | None = None,
    codec: int = 1,
    order: str = "<",
    riff: int | None = None,
    size: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    extensible: bool = False,
    raw: bytes | None = None,
    block: int | None = None,
) -> bytes:
    """A WAV file; `riff` and `size` replace the right lengths of the file and its samples."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if raw is None:
        if codec == 3:
            raw = samples.astype(f"{order}f{width}").tobytes()
        else:
            raw = integers(samples.reshape(-1), width, order)
    block = width * channels if block is None else block
    form = struct.pack(
        f"{order}HHIIHH",
        0xFFFE if extensible else codec,
        channels,
        RATE,
        RATE * block,
        block,
        8 * width if bits is None else bits,
    )
    if extensible:
        rest = struct.pack(f"{order}HHIHH", 22, bits or 8 * width, 0, codec, 0)
        form += rest + b"\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    data = b"data" + struct.pack(f"{order}I", len(raw) if size is None else size) + raw
    data += b"\0" * (len(raw) % 2)
    body = b"WAVE" + chunk(b"fmt ", form, order) + before + data + after
    outer = len(body) if riff is None else riff
    return (b"RIFF" if order == "<" else b"RIFX") + struct.pack(f"{order}I", outer) + body


def wrong_headers() -> Iterator[tuple[str, bytes]]:
    """WAV, AIFF, AU and CAF files whose samples are all there and whose header is wrong."""
    right, data = len(wav()) - 8, 2 * RATE
    for riff in (0, 36, right - 8, right + 8, right + 10**6, 2**31 - 1, 2**32 - 1, None):
        for size in (0, 2**31 - 1, 2**31, 2**32 - 1, 0x7FFFF000, None):
            yield f"riff={riff} data={size}", wav(riff=riff, size=size)
    for size in (36, 2000, data + 8, data + 44):
        yield f"data={size}", wav(size=size)
    note = b"LIST" + struct.pack("<I", 5) + b"INFOx"
    yield "odd LIST without padding", wav(before=note)
    yield "odd LIST with padding", wav(before=note + b"\0")
    yield "odd chunk after the samples", wav(after=note)
    yield "LIST of a wrong length", wav(before=b"LIST" + struct.pack("<I", 2000) + b"INFOx")
    yield "LIST longer than the file", wav(before=b"LIST" + struct.pack("<I", 2**30) + b"INFOx")
    yield "zero block size", wav(block=0)
    aiff = bytearray(written(MONO, format="AIFF", subtype="PCM_16"))
    place = aiff.find(b"SSND") + 4
    for name, at, value in (("FORM", 4, 0), ("FORM", 4, 2**32 - 1), ("SSND", place, 0)):
        changed = bytearray(aiff)
        changed[at : at + 4] = struct.pack(">I", value)
        yield f"AIFF {name}={value}", bytes(changed)
    au = bytearray(written(MONO, format="AU", subtype="PCM_16"))
    for value in (0, 2**32 - 1):
        au[8:12] = struct.pack(">I", value)
        yield f"AU size={value}", bytes(au)
    caf = bytearray(written(MONO, format="CAF", subtype="PCM_16"))
    place = caf.find(b"data") + 4
    caf[place : place + 8] = struct.pack(">q", -1)
    yield "CAF size=-1", bytes(caf)


def exact() -> Iterator[tuple[str, bytes, float]]:
    """Files of right headers without loss, with the largest difference from `MONO`."""
    for width in range(1, 9):
        yield f"wav {8 * width} bit", wav(width=width), 2.0 ** (1 - min(8 * width, 24))
        tall = wav(STEREO, width, extensible=True)
        yield f"wav {8 * width} bit stereo extensible", tall, 2.0 ** (1 - min(8 * width, 24))
    for bits, width in ((12, 2), (20, 3), (24, 4), (36, 5)):
        yield f"wav {bits} in {8 * width} bit", wav(width=width, bits=bits, extensible=True), 1e-4
    for width in (4, 8):
        yield f"wav float{8 * width}", wav(width=width, codec=3), 1e-7
        yield f"wav float{8 * width} extensible", wav(width=width, codec=3, extensible=True), 1e-7
    for width in (2, 3, 4):
        yield f"rifx {8 * width} bit", wav(width=width, order=">"), 1e-4
    for form in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "NIST", "VOC"):
        for kind in ("PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"):
            if soundfile.check_format(form, kind):
                loss = 1 / 127 if kind == "PCM_S8" else 1e-4
                yield f"{form} {kind}", written(MONO, format=form, subtype=kind), loss
    for order in ("LITTLE", "BIG"):
        for form in ("AIFF", "AU", "CAF"):
            file = written(MONO, format=form, subtype="PCM_16", endian=order)
            yield f"{form} {order}", file, 1e-4
    for form in ("WAV", "AIFF", "AU", "CAF"):
        for kind in ("ALAW", "ULAW"):
            yield f"{form} {kind}", written(MONO, format=form, subtype=kind), 0.02
    yield "ogg flac", encoded("ogg", "flac"), 1e-4
    yield "m4a alac", encoded("ipod", "alac"), 1e-4
    yield "caf alac", written(MONO, format="CAF", subtype="ALAC_16"), 1e-4
    yield "mka pcm", encoded("matroska", "pcm_s16le"), 1e-4
    yield "wavpack", encoded("wv", "wavpack"), 0.005
    yield "tta", encoded("tta", "tta"), 0.005
    yield "wav pcm_s64le", encoded("wav", "pcm_s64le"), 1e-4
    tag, end = b"ID3\x04\0\0\0\0\0\x05abcde", b"TAG" + bytes(125)
    for form in ("FLAC", "WAV", "AIFF"):
        yield f"id3 before {form}", tag + written(MONO, format=form, subtype="PCM_16"), 1e-4
    yield "tag after flac", written(MONO, format="FLAC") + end, 1e-4
    yield "flac to a pipe", encoded("flac", "flac", pipe=True), 1e-4
    yield "wav to a pipe", encoded("wav", "pcm_s16le", pipe=True), 1e-4
    yield "aiff to a pipe", encoded("aiff", "pcm_s16be", pipe=True), 1e-4
    yield "au to a pipe", encoded("au", "pcm_s16be", pipe=True), 1e-4


def lossy() -> Iterator[tuple[str, bytes, int]]:
    """Files of lossy codecs, with their rate."""
    for rate in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000):
        yield f"mp3 {rate}", encoded("mp3", "libmp3lame", rate), rate
        yield f"wav with mp3 {rate}", encoded("wav", "libmp3lame", rate), rate
        yield f"aac {rate}", encoded("adts", "aac", rate), rate
    for rate in (8000, 22050, 44100):
        source = np.interp(np.arange(rate) / rate, TIME, MONO)
        yield f"ogg vorbis {rate}", written(source, rate, format="OGG", subtype="VORBIS"), rate
        yield f"mp3 of soundfile {rate}", written(source, rate, format="MP3"), rate
        yield f"m4a {rate}", encoded("ipod", "aac", rate, 2), rate
    yield "mp4", encoded("mp4", "aac", 44100), 44100
    yield "mov", encoded("mov", "aac", 44100), 44100
    yield "3gp", encoded("3gp", "libopencore_amrnb", 8000, bit_rate=12200), 8000
    yield "amr", encoded("amr", "libopencore_amrnb", 8000, bit_rate=12200), 8000
    yield "webm opus", encoded("webm", "libopus", 48000), 48000
    yield "mka opus", encoded("matroska", "libopus", 48000), 48000
    yield "opus", encoded("ogg", "libopus", 48000), 48000
    yield "opus of soundfile", written(MONO, format="OGG", subtype="OPUS"), RATE
    tag, end = b"ID3\x03\0\0\0\0\x02\0" + bytes(256), b"TAG" + bytes(125)
    mp3 = encoded("mp3", "libmp3lame", 44100)
    yield "mp3 with tags", tag + mp3 + b"APETAGEX" + bytes(300) + end, 44100
    yield "aac with a tag", tag + encoded("adts", "aac", 44100), 44100
    yield "mp3 to a pipe", encoded("mp3", "libmp3lame", 44100, pipe=True), 44100
    yield "webm to a pipe", encoded("webm", "libopus", 48000, pipe=True), 48000
    yield "zeros after opus", encoded("ogg", "libopus", 48000) + bytes(100), 48000
    yield "mp2", encoded("mp2", "mp2", 44100), 44100
    yield "mkv with mp3", encoded("matroska", "libmp3lame", 44100), 44100
    yield "wma", encoded("asf", "wmav2", 44100, 2, bit_rate=64000), 44100
    yield "ac3", encoded("ac3", "ac3", 44100), 44100
    yield "wav ms adpcm", written(MONO, format="WAV", subtype="MS_ADPCM"), RATE
    yield "wav ima adpcm", written(MONO, format="WAV", subtype="IMA_ADPCM"), RATE
    yield "wav gsm", written(MONO, 8000, format="WAV", subtype="GSM610"), 8000
