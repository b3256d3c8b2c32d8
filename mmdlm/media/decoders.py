"""Samples of audio files: by their header, by soundfile, or by PyAV."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from mmdlm.media.files import OnDamage, report_damage, require_av
from mmdlm.media.frames import after_id3, walk
from mmdlm.media.pcm import HeaderError, Sound, as_wav, decode, read_header

# Half a day of MP3; larger files are not read into memory to look for damage.
MAX_BYTES = 2**30
BLOCK = 2**20  # samples
WAV_MPEG = (0x50, 0x55)
# Formats that PyAV reads and whose frames nobody needs to look at.
CONTAINERS = (b"fLaC", b"\x1aE\xdf\xa3", b"0&\xb2u", b"wvpk", b"TTA1", b"MAC ")
Samples = tuple[np.ndarray, int]


class _Seekable:
    """A file in which libsndfile, misled by a damaged header, may seek before the start."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.read, self.readinto, self.tell = file.read, file.readinto, file.tell

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new place, the start for one before it."""
        start = {io.SEEK_CUR: self.file.tell()}.get(whence, 0)
        if whence != io.SEEK_END and start + offset < 0:
            offset, whence = 0, io.SEEK_SET
        return self.file.seek(offset, whence)


class _UnreadableError(Exception):
    """A decoder cannot read the file; the next one is tried."""


def read_file(
    file: BinaryIO, name: str, check: Callable[[float], None], on_damage: OnDamage
) -> Samples:
    """Samples [T C] float32 and the rate in Hz of an audio file.

    Args:
        file: open file.
        name: its name for errors.
        check: called with a duration in seconds before decoding; raises if it is too long.
        on_damage: "error" or "warn".
    Raises:
        ValueError: not audio, damaged, too long, or PyAV is needed and missing.
    """
    reason, file = "", _without_tag(file)
    try:
        sound = read_header(file)
        if sound is not None:
            return _by_header(file, sound, name, check, on_damage)
    except HeaderError as error:
        reason = f"header: {error}"
    return _by_decoders(file, name, check, on_damage, reason)


def _without_tag(file: BinaryIO) -> BinaryIO:
    """The file without an ID3 tag that a program put before the header of a WAV or AIFF file."""
    at = after_id3(file.read(10))
    file.seek(at)
    if at and file.read(4) in (b"RIFF", b"FORM"):
        file.seek(at)
        return io.BytesIO(file.read())
    return file


def _by_header(
    file: BinaryIO, sound: Sound, name: str, check: Callable[[float], None], on_damage: OnDamage
) -> Samples:
    """Samples of a WAV, AIFF, AU, CAF or W64 file, compressed or not."""
    is_plain = isinstance(sound.codec, str)
    if is_plain:
        check(sound.seconds)
    file.seek(sound.start)
    raw = file.read(sound.stop - sound.start)
    report_damage(sound.damage, on_damage, "read_audio", name)
    if is_plain:
        return decode(raw, sound), sound.rate
    if sound.codec in WAV_MPEG:
        return _by_decoders(io.BytesIO(raw), name, check, on_damage)
    return _by_decoders(io.BytesIO(as_wav(raw, sound)), name, check, on_damage)


def _by_decoders(
    file: BinaryIO,
    name: str,
    check: Callable[[float], None],
    on_damage: OnDamage,
    reason: str = "",
) -> Samples:
    """Samples from the first library that supports the file."""
    file.seek(0)
    head = file.read(12)
    files, damage = [file], ""
    if not head.startswith(CONTAINERS) and head[4:8] != b"ftyp":
        size = file.seek(0, io.SEEK_END)
        if size > MAX_BYTES:
            raise ValueError(f"read_audio: {name} is too large: {size} bytes; split it")
        file.seek(0)
        found = walk(file.read())
        if found is not None:
            check(found.seconds)
            report_damage(found.damage, on_damage, "read_audio", name)
            files, damage = [io.BytesIO(data) for data in found.data], found.damage
    lenient = "warn" if damage else on_damage
    decoded = [_decoded(one, name, check, lenient, bool(damage), reason) for one in files]
    if len({(samples.shape[1], rate) for samples, rate in decoded}) > 1:
        raise ValueError(f"read_audio: {name} is joined from files of different rates; split it")
    samples = np.concatenate([samples for samples, _ in decoded])
    # The first frame after a gap may be noise far above 1.
    return (np.clip(samples, -1, 1) if lenient == "warn" else samples), decoded[0][1]


def _decoded(
    file: BinaryIO,
    name: str,
    check: Callable[[float], None],
    on_damage: OnDamage,
    known: bool,
    reason: str,
) -> Samples:
    """Samples from the first library that reads a file; `known`: its damage is reported."""
    tried = [reason] if reason else []
    for reader in (_by_soundfile, _by_av):
        file.seek(0)
        try:
            return reader(file, name, check, on_damage, known)
        except _UnreadableError as error:
            tried.append(f"{reader.__name__.removeprefix('_by_')}: {error}")
    raise ValueError(
        f"read_audio: {name} is not readable audio, or damaged or truncated; tried "
        f"{'; '.join(tried)}. Convert it to WAV or FLAC"
    )


def _by_soundfile(
    file: BinaryIO, name: str, check: Callable[[float], None], on_damage: OnDamage, known: bool
) -> Samples:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the C library is missing
        raise _UnreadableError("not installed (pip install soundfile)") from error
    rate = 0
    try:
        with soundfile.SoundFile(_Seekable(file)) as sound:
            rate, frames = sound.samplerate, sound.frames
            # Before decoding, which may exceed the memory.
            if frames >= 2**62:  # written to a pipe; libsndfile fails at its end
                raise _UnreadableError("the file states no length")
            check(frames / rate)
            # Of FLAC the integers are read, since its checksum is of these.
            kind = "int32" if sound.format == "FLAC" else "float32"
            parts, count = [], 0
            while len(part := sound.read(BLOCK, kind, always_2d=True)):  # [T C]
                parts.append(part)
                count += len(part)
                check(count / rate)
            samples = np.concatenate(parts) if parts else np.zeros((0, sound.channels), kind)
            # The length of an MP3 is an estimate; its frames were counted already.
            missing = 0 if known or sound.format in ("MP3", "WAV") else frames - len(samples)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = getattr(error, "error_string", str(error)) or type(error).__name__
        if rate and not known:  # its header was read
            report_damage(reason, on_damage, "read_audio", name)
        raise _UnreadableError(reason) from error
    if missing:
        report_damage(f"{missing} of {frames} samples are missing", on_damage, "read_audio", name)
    if kind == "int32":
        if not missing and not _is_checksum_right(file, samples):
            damage = "its samples do not have its checksum"
            report_damage(damage, on_damage, "read_audio", name)
        samples = (samples * 2.0**-31).astype(np.float32)
    return samples, rate


def _is_checksum_right(file: BinaryIO, samples: np.ndarray) -> bool:
    """Whether samples [T C] int32 are those of which a FLAC file states the MD5 checksum."""
    file.seek(0)
    head = file.read(2**20)
    info = head[head.find(b"fLaC") + 8 :][:34]  # the first block
    stated, bits = info[18:34], ((info[12] & 1) << 4 | info[13] >> 4) + 1
    if not any(stated):  # unknown
        return True
    packed = (samples >> (32 - bits)).astype("<i4").view(np.uint8).reshape(-1, 4)
    return hashlib.md5(packed[:, : (bits + 7) // 8].tobytes()).digest() == stated


def _by_av(
    file: BinaryIO, name: str, check: Callable[[float], None], on_damage: OnDamage, known: bool
) -> Samples:
    """Samples by PyAV, with FFmpeg's decoders."""
    try:
        av = require_av(f"read_audio: {name} is not a format of soundfile; PyAV")
    except ValueError as error:
        if _is_av_format(file):
            raise
        raise _UnreadableError('not installed (pip install "mmdlm[data]")') from error
    parts: list[np.ndarray] = []
    broken: list[int] = []
    try:
        with av.open(file, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise _UnreadableError("the file has no sound")
            stream = container.streams.audio[0]
            rate, stated = stream.rate, _stated_seconds(container, stream)
            if stated is not None:
                check(stated)
            samples = 0
            for part in _frames(av, container, stream, broken):
                parts.append(part)
                samples += len(part)
                check(samples / rate)
    except (av.FFmpegError, EOFError, IndexError, AttributeError) as error:
        if not parts:
            raise _UnreadableError(getattr(error, "strerror", str(error))) from error
        broken.append(1)
    if not parts:
        raise _UnreadableError("no samples")
    if not known:
        damage = _damage(samples / rate, stated, len(broken))
        report_damage(damage, on_damage, "read_audio", name)
    return np.concatenate(parts), rate


def _is_av_format(file: BinaryIO) -> bool:
    """Whether a file is of a kind that only PyAV reads."""
    file.seek(0)
    head = file.read(12)
    magic = (b"\x1aE\xdf\xa3", b"0&\xb2u", b"#!AMR", b"wvpk", b"TTA1", b"MAC ")
    return head[4:8] == b"ftyp" or head.startswith(magic)


def _frames(av: Any, container: Any, stream: Any, broken: list[int]) -> Iterator[np.ndarray]:
    """Samples [T C] of each frame; packets that cannot be decoded are counted in `broken`."""
    # Interleaved: PyAV reads beyond the planes of frames of more than eight channels.
    resampler = av.AudioResampler(format="flt")
    for packet in container.demux(stream):
        frames: list[Any] = []
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            broken.append(packet.size)
        for frame in frames:
            try:
                parts = resampler.resample(frame)
            except ValueError:  # of another rate or number of channels than the first
                broken.append(packet.size)
                continue
            for part in parts:
                yield part.to_ndarray().reshape(-1, part.layout.nb_channels)  # [T C]


def _stated_seconds(container: Any, stream: Any) -> float | None:
    """Duration in the header; None for formats that state none."""
    if container.format.name in ("mp3", "aac", "amr", "ogg"):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None or len(container.streams) > 1:
        return None
    return container.duration / 1_000_000


def _damage(seconds: float, stated: float | None, broken: int) -> str:
    parts = []
    if broken:
        parts.append(f"{broken} of its packets are not readable")
    # Encoders pad the first and last frames, so that durations differ a little.
    if stated is not None and seconds < 0.99 * stated - 0.05:
        parts.append(f"{stated - seconds:.3f} of {stated:.3f} s are missing")
    return ", ".join(parts)
