"""Files of every container, right and damaged: full length and right values, or one error."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from mmdlm.media import read_audio, read_image
from tests.media import images, sounds

DAMAGED = "damaged or truncated|is not a readable image|too large"


def silently(read: Callable[..., object], data: bytes) -> np.ndarray:
    """What a reader returns for a right file, without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*deprecated")
        result = read(data)
    return np.asarray(result if isinstance(result, Image.Image) else result[0]).astype(float)


# --- sounds ---

WRONG_HEADERS, EXACT, LOSSY = (
    {name: rest for name, *rest in make()}
    for make in (sounds.wrong_headers, sounds.exact, sounds.lossy)
)


def test_matrix_of_sounds_is_large_enough() -> None:
    assert len(EXACT) + len(LOSSY) + len(WRONG_HEADERS) >= 200


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_length_of_a_file_decides_where_its_header_is_wrong(name: str) -> None:
    samples = silently(read_audio, *WRONG_HEADERS[name])
    assert samples.shape == sounds.MONO.shape
    np.testing.assert_allclose(samples, sounds.MONO, atol=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_sound_without_loss_is_read_as_written(name: str) -> None:
    data, loss = EXACT[name]
    expected = sounds.STEREO.mean(axis=1) if "stereo" in name else sounds.MONO
    samples = silently(read_audio, data)
    assert samples.shape == expected.shape
    np.testing.assert_allclose(samples, expected, atol=loss)


def length(data: bytes) -> tuple[int, int]:
    """Number of samples and rate by FFmpeg."""
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.audio[0]
        return sum(frame.samples for frame in file.decode(stream)), stream.rate


@pytest.mark.parametrize("name", LOSSY)
def test_sound_with_loss_has_the_length_and_shape_of_ffmpeg(name: str) -> None:
    data, rate = LOSSY[name]
    samples, seen = read_audio(data)
    count, decoded_rate = length(data)
    assert seen == rate
    # FFmpeg decodes all Opus at 48 kHz, and may keep the padding of a last Vorbis block.
    assert abs(len(samples) - count * rate / decoded_rate) <= 0.025 * len(samples)
    size = 2 * len(samples)
    source = np.interp(np.arange(len(samples)) / rate, sounds.TIME, sounds.MONO, right=0)
    if name == "wav gsm":  # its samples are those of 16 kHz, played at half the rate
        source = sounds.MONO
    spectra = np.fft.rfft(samples, size), np.fft.rfft(source, size)
    match = np.fft.irfft(spectra[0] * spectra[1].conj()).max()
    assert match / np.linalg.norm(samples) / np.linalg.norm(source) > 0.95


def test_reader_agrees_with_soundfile_and_ffmpeg() -> None:
    for name in ("FLAC PCM_16", "AIFF PCM_24", "CAF PCM_16", "wav 24 bit"):
        data = EXACT[name][0]
        ours = read_audio(data)[0]
        np.testing.assert_allclose(ours, soundfile.read(io.BytesIO(data))[0], atol=1e-6)
        with av.open(io.BytesIO(data)) as file:
            resampler = av.AudioResampler("fltp")
            parts = [p.to_ndarray() for f in file.decode(audio=0) for p in resampler.resample(f)]
        np.testing.assert_allclose(ours, np.concatenate(parts, axis=1)[0], atol=1e-6)


CHECKED = (
    *("wav 16 bit", "wav float32", "rifx 16 bit", "AIFF PCM_16", "AU PCM_16", "CAF PCM_16"),
    *("W64 PCM_16", "NIST PCM_16", "FLAC PCM_16", "WAV ULAW", "ogg flac", "mka pcm"),
    *("mp3 44100", "mp3 16000", "wav with mp3 44100", "mp3 of soundfile 22050", "aac 44100", "amr"),
    *("ogg vorbis 44100", "opus", "opus of soundfile", "m4a 44100", "mp4", "3gp", "webm opus"),
)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_sound_is_reported(name: str, share: float) -> None:
    data = (EXACT | LOSSY)[name][0]
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_audio(data[: int(share * len(data))])


@pytest.mark.parametrize("name", CHECKED)
def test_sound_with_a_hole_is_reported(name: str) -> None:
    data = (EXACT | LOSSY)[name][0]
    middle, size = len(data) // 2, min(600, len(data) // 8)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_audio(data[:middle] + data[middle + size :])


LONG = np.tile(sounds.MONO, 12)
CUT = {
    "wav": (sounds.written(LONG, format="WAV"), "192\\d{3} of 384000 bytes .*6.0.. of 12.000 s"),
    "mp3": (sounds.written(LONG, format="MP3"), "173 of 336 frames are missing"),
    "ogg": (sounds.written(LONG, format="OGG"), "belong to no whole page, its last page is"),
    "opus": (sounds.written(LONG, format="OGG", subtype="OPUS"), "its last page is missing"),
    "flac": (sounds.written(LONG, format="FLAC"), "flac decoder lost sync"),
}


@pytest.mark.parametrize("name", CUT)
def test_readable_part_of_a_cut_sound_is_used_on_request(name: str) -> None:
    data, message = CUT[name]
    half = data[: len(data) // 2]
    with pytest.raises(ValueError, match=message):
        read_audio(half)
    with pytest.warns(UserWarning, match=message):
        samples, rate = read_audio(half, on_damage="warn")
    assert rate == sounds.RATE
    # The last page of the half Ogg file is cut, and pages last 4 seconds.
    assert (0.3 if name == "ogg" else 0.4) * len(LONG) < len(samples) < 0.6 * len(LONG)
    close = np.abs(samples[3000:50000] - LONG[3000:50000])
    assert np.median(close) < 0.02


def test_flipped_byte_of_flac_and_ogg_is_reported() -> None:
    for data in (CUT["flac"][0], CUT["ogg"][0], CUT["opus"][0]):
        for place in range(len(data) // 4, len(data) - 8, len(data) // 7):
            changed = bytearray(data)
            changed[place] ^= 0x10
            with pytest.raises(ValueError, match="damaged or truncated"):
                read_audio(bytes(changed))


def test_wrong_number_of_frames_in_an_mp3_does_not_shorten_it() -> None:
    data = bytearray(CUT["mp3"][0])
    place = max(data.find(b"Xing"), data.find(b"Info")) + 8
    data[place : place + 4] = struct.pack(">I", 40)
    samples = read_audio(bytes(data))[0]
    assert abs(len(samples) - len(LONG)) < 3 * 1152


@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125) + b"ID3\3\0\0\0\0\0\1\0"])
def test_joined_mp3_files_are_read_in_full(between: bytes) -> None:
    one = LOSSY["mp3 44100"][0]
    samples = read_audio(one + between + one)[0]
    assert 2 * 44100 <= len(samples) < 2 * 44100 + 6 * 1152


@pytest.mark.parametrize("before", [bytes(3000), b"words " * 100])
def test_bytes_around_an_mp3_change_nothing(before: bytes) -> None:
    one = LOSSY["mp3 44100"][0]
    np.testing.assert_array_equal(read_audio(before + one + bytes(5000))[0], read_audio(one)[0])


def test_joined_ogg_files_are_read_in_full() -> None:
    one = sounds.written(sounds.MONO, format="OGG")
    samples = read_audio(one + one)[0]
    np.testing.assert_array_equal(samples, np.tile(read_audio(one)[0], 2))
    other = sounds.written(sounds.MONO, 8000, format="OGG")
    with pytest.raises(ValueError, match="joined from files of different rates"):
        read_audio(one + other)


def test_mp3_of_varying_bit_rate_without_a_count_is_read_in_full() -> None:
    data = CUT["mp3"][0]
    start = walk_start(data)
    samples = read_audio(data[start:])[0]
    assert len(LONG) <= len(samples) < len(LONG) + 3 * 1152


def walk_start(data: bytes) -> int:
    """Place of the second frame of an MP3 file; the first has the number of frames."""
    first = max(data.find(b"Xing"), data.find(b"Info"))
    return data.find(data[data.rfind(b"\xff", 0, first) :][:2], first)


# --- images ---

WHOLE, DEEP = ({name: rest for name, *rest in make()} for make in (images.whole, images.deep))


def test_matrix_of_images_is_large_enough() -> None:
    assert len(WHOLE) + len(DEEP) >= 130


@pytest.mark.parametrize("name", WHOLE)
def test_image_is_read_as_written(name: str) -> None:
    data, expected, loss = WHOLE[name]
    pixels = silently(read_image, data)
    assert pixels.shape == expected.shape
    np.testing.assert_allclose(pixels, expected, atol=loss)


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled_by_their_range(name: str) -> None:
    data, expected = DEEP[name]
    if name.endswith((" 16", "float 0 to 1")):
        pixels = silently(read_image, data)
    else:
        with pytest.warns(UserWarning, match="is shown as black to white"):
            pixels = np.asarray(read_image(data)).astype(float)
    np.testing.assert_allclose(pixels, expected, atol=1.01)


def test_images_of_opencv_are_read_as_written() -> None:
    cv2 = pytest.importorskip("cv2", reason='OpenCV comes with pip install "mmdlm[sim]"')
    files = list(images.by_opencv(cv2))
    assert len(files) == 18
    for name, data, expected, loss in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = np.asarray(read_image(data)).astype(float)
        np.testing.assert_allclose(pixels, expected, atol=loss, err_msg=name)


def test_heic_is_read_as_written() -> None:
    heif = pytest.importorskip("pillow_heif", reason='pip install "mmdlm[data]"')
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(images.RGB)).save(file, quality=95)
    np.testing.assert_allclose(silently(read_image, file.getvalue()), images.RGB, atol=24)
    with pytest.raises(ValueError, match=DAMAGED):
        read_image(file.getvalue()[:-30])


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
FORMATS = {
    **{form: {} for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")},
    **{form: {} for form in ("PPM", "TGA", "QOI", "SGI", "PCX", "DDS", "MPO")},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_image_is_reported(form: str, share: float) -> None:
    data = images.saved(Image.fromarray(NOISE), form)
    with pytest.raises(ValueError, match=DAMAGED):
        read_image(data[: int(share * len(data))])


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "BMP", "PPM", "TGA", "QOI"])
def test_readable_part_of_a_cut_image_is_used_on_request(form: str) -> None:
    options = {"interlace": 0} if form == "GIF" else {}
    data = images.saved(Image.fromarray(NOISE), form, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    with pytest.warns(UserWarning, match="is damaged"):
        pixels = np.asarray(read_image(data[: len(data) // 2], on_damage="warn"))
    same = (pixels == expected).all(axis=(1, 2))
    rows = range(20) if form not in ("BMP", "TGA") else range(44, 64)  # stored from the bottom up
    assert same[list(rows)].all()
    assert same.sum() < 50


META = (
    images.png_chunk(b"tEXt", b"Comment\0words")
    + images.png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"not a profile"))
    + images.png_chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0")
)


def test_each_changed_byte_of_a_png_is_harmless_or_reported() -> None:
    start, end = 33, 33 + len(META)  # of the metadata, after the header
    late = images.png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"late"))
    data = images.png(images.RGB[:8, :8], first=META, last=late)
    harmless = []
    for place in range(8, len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x20
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = np.asarray(read_image(bytes(changed)))
            except ValueError:
                continue
        assert np.array_equal(pixels, images.RGB[:8, :8]), place
        harmless.append(place)
    assert set(range(start, end)) <= set(harmless)
    pixels = range(data.find(b"IDAT"), data.find(b"zTXt") - 4)
    assert not set(pixels) & set(harmless)


@pytest.mark.parametrize("cut", [1, 6, 12])
def test_png_without_its_end_keeps_its_pixels(cut: int) -> None:
    with pytest.warns(UserWarning, match="metadata .IEND. are ignored"):
        pixels = np.asarray(read_image(images.png(images.RGB)[:-cut]))
    assert np.array_equal(pixels, images.RGB)
    with pytest.raises(ValueError, match="IDAT at byte .* is cut off"):
        read_image(images.png(images.RGB)[:-14])


def test_checksum_of_pixels_is_named_and_the_rest_is_used_on_request() -> None:
    data = bytearray(images.saved(Image.fromarray(NOISE), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="chunk IDAT at byte .* has a wrong checksum"):
        read_image(bytes(data))
    with pytest.warns(UserWarning, match="has a wrong checksum"):
        pixels = np.asarray(read_image(bytes(data), on_damage="warn"))
    assert np.array_equal(pixels[:25], NOISE[:25])


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_damaged_exif_costs_no_pixels(form: str) -> None:
    garbage = b"Exif\0\0garbage that is not TIFF" if form != "TIFF" else b""
    options = {"lossless": True} if form == "WEBP" else {}
    plain = images.saved(Image.fromarray(images.RGB), form, **options)
    if form == "PNG":
        bad = images.png(images.RGB, first=images.png_chunk(b"eXIf", garbage))
    elif form == "TIFF":  # a tag whose data lie outside the file
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 1, "a long description of the image"
        bad = images.saved(Image.fromarray(images.RGB), form, exif=exif).replace(
            b"a long", b"\xff" * 6
        )
    else:
        bad = images.saved(Image.fromarray(images.RGB), form, exif=garbage, **options)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        pixels = np.asarray(read_image(bad))
    assert np.array_equal(pixels, np.asarray(read_image(plain)))


def test_raw_profile_that_is_not_hexadecimal_costs_no_pixels() -> None:
    text = b"Raw profile type exif\0\nexif\n      20\nwords, not hexadecimal"
    data = images.png(images.RGB, first=images.png_chunk(b"tEXt", text))
    with pytest.warns(UserWarning, match="EXIF data are damaged and ignored"):
        pixels = np.asarray(read_image(data))
    assert np.array_equal(pixels, images.RGB)


def test_metadata_segment_of_a_wrong_length_costs_no_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = images.saved(Image.fromarray(images.RGB), "JPEG", exif=exif, icc_profile=b"x" * 300)
    expected = np.asarray(read_image(data))
    for marker in (b"\xff\xe1", b"\xff\xe2"):
        place = data.find(marker) + 2
        for size in (2, 40, 20000):
            changed = bytearray(data)
            changed[place : place + 2] = struct.pack(">H", size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = np.asarray(read_image(bytes(changed)))
            assert np.array_equal(pixels, expected)


def test_text_chunk_that_unpacks_to_much_costs_no_pixels() -> None:
    bomb = images.png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))
    with pytest.warns(UserWarning, match="metadata are ignored"):
        pixels = np.asarray(read_image(images.png(images.RGB, first=bomb)))
    assert np.array_equal(pixels, images.RGB)
