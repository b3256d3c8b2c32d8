"""Reading images and audio: every form, and every bad input with its error."""

from __future__ import annotations

import gc
import struct
import sys
import types
import warnings
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmdlm import media
from mmdlm.media import find_media, media_kind, read_audio, read_image

RED = np.zeros((6, 8, 3), np.uint8)
RED[:, :, 0] = 255


def png(array: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """PNG bytes of a grey uint8 or uint16 array; the header may claim another (columns, rows)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    depth = 8 * array.dtype.itemsize
    columns, rows = size or array.shape[::-1]
    head = struct.pack(">IIBBBBB", columns, rows, depth, 0, 0, 0, 0)
    body = b"".join(b"\0" + row.astype(f">u{array.dtype.itemsize}").tobytes() for row in array)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def pixels(item) -> np.ndarray:
    image = read_image(item)
    assert image.mode == "RGB"
    return np.asarray(image)


def tone(seconds: float = 0.5, rate: int = 16000, level: float = 0.5) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


# --- images ---


def test_image_forms_give_the_same_pixels(tmp_path):
    path = tmp_path / "red.png"
    Image.fromarray(RED).save(path)
    first = torch.from_numpy(RED).permute(2, 0, 1)
    forms = [path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(RED), RED]
    forms += [first, first / 255, RED.astype(np.float64) / 255, RED.astype(np.uint16) * 257]
    for form in forms:
        assert np.array_equal(pixels(form), RED)


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "YCbCr", "HSV"])
def test_image_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "x.tiff"
    image = Image.new("RGB", (8, 6), "white").convert(mode)
    image = image if mode == "HSV" else image.save(path) or path
    assert (pixels(image) == 255).all()


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = pixels(tmp_path / "red.jpg")[4, 4].astype(int)
    assert red > 200
    assert max(green, blue) < 60


def test_16_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    for form in (png(ramp), ramp, Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        assert np.array_equal(pixels(form)[:, :, 0], np.rint(ramp / 257).astype(np.uint8))
    spread = Image.fromarray((ramp / 65535).astype(np.float32))
    assert np.array_equal(pixels(spread)[:, :, 2], np.rint(ramp / 257).astype(np.uint8))


def test_transparency_is_composited_on_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixels(half)[0, 0].tolist() == [255, 127, 127]
    clear = Image.new("LA", (4, 4), (0, 0))
    clear.save(tmp_path / "clear.png")
    assert (pixels(tmp_path / "clear.png") == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (pixels(tmp_path / "palette.png") == 255).all()
    assert (pixels(np.zeros((4, 4, 4), np.uint8)) == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, :4] = 255
    exif = Image.Exif()
    exif[media.EXIF_ORIENTATION] = 6  # the camera was held on its side
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    upright = pixels(tmp_path / "x.png")
    assert upright.shape == (8, 4, 3)
    assert (upright[:4] == 255).all()
    assert (upright[4:] == 0).all()


def test_animation_gives_its_first_frame_with_a_warning(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("blue", "white", "black")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="has 3 frames; only the first"):
        first = pixels(tmp_path / "x.gif")
    assert first[0, 0].tolist() == [0, 0, 255]


def test_one_pixel_image(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_truncated_image_is_rejected(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{extension}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"x\.\w+ is (damaged or truncated|not a readable image)"):
        read_image(path)


def test_other_bytes_are_rejected_as_images(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image at all")
    with pytest.raises(ValueError, match=r"x\.png is not a readable image"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match="the 3 bytes is not a readable image"):
        read_image(b"abc")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="bytes are empty"):
        read_image(b"")
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)


def test_decompression_bombs_are_rejected_before_decoding():
    tiny = np.zeros((1, 1), np.uint8)
    with pytest.raises(ValueError, match="bomb"):
        read_image(png(tiny, size=(20000, 20000)))
    large = png(tiny, size=(10000, 10000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="10000x10000, more than 89478485 pixels"):
            read_image(large)


def test_error_for_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "horse.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"hors\.png; did you mean horse\.png"):
        read_image(tmp_path / "hors.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere.x\.wav; its folder does not exist"):
        read_audio(tmp_path / "nowhere" / "x.wav")
    with pytest.raises(FileNotFoundError, match="download it first"):
        read_image("https://example.org/x.png")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), r"array is \[2, 2, 5\]"),
        (np.zeros((0, 2, 3), np.uint8), "Y, X > 0"),
        (np.zeros((2, 2, 3), np.int64), "dtype is int64"),
        (np.full((2, 2, 3), 255.0), "divide by 255"),
        (torch.full((3, 2, 2), torch.nan), "spans nan to nan"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "spans 70000 to 70000"),
        (Image.fromarray(np.full((2, 2), -1, np.float32)), "expected 0 to 1 in mode F"),
    ],
)
def test_invalid_arrays_are_rejected_as_images(item, message):
    with pytest.raises(ValueError, match=message):
        read_image(item)


def test_other_types_are_rejected():
    with pytest.raises(TypeError, match="item is a NoneType"):
        read_image(None)
    with pytest.raises(TypeError, match="item is a ndarray"):
        read_audio(np.zeros(3))


# --- audio ---


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_audio_files_are_read_as_recorded(tmp_path, extension):
    path, sound = tmp_path / f"x.{extension}", tone(1.0, 22050)
    soundfile.write(path, sound, 22050)
    for form in (path, str(path), path.read_bytes()):
        samples, rate = read_audio(form)
        assert (rate, samples.dtype, samples.shape) == (22050, np.float32, sound.shape)
        assert np.abs(samples - sound).max() < (0.05 if extension in ("ogg", "mp3") else 1e-4)


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(), 0.5 * tone()], axis=1)
    soundfile.write(tmp_path / "x.wav", both, 16000, subtype="FLOAT")
    for form in (tmp_path / "x.wav", (both, 16000), (both.T, 16000), (torch.tensor(both), 16000)):
        np.testing.assert_allclose(read_audio(form)[0], 0.75 * tone(), atol=1e-6)
    six = np.repeat(tone()[:, None], 6, axis=1)
    np.testing.assert_allclose(read_audio((six, 16000))[0], tone(), atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-32768, 0, 16384], np.int16), [-1, 0, 0.5]),
        (np.array([-(2**31), 0, 2**30], np.int32), [-1, 0, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([-1, 0, 0.5], np.float16), [-1, 0, 0.5]),
        ([-1.0, 0.0, 0.5], [-1, 0, 0.5]),
        ([-1.2, 0.0, 1.1], [-1, 0, 1]),
    ],
)
def test_every_dtype_is_scaled_to_one(samples, expected):
    out, rate = read_audio((samples, np.int64(8000)))
    assert out.dtype == np.float32
    assert out.tolist() == expected
    assert type(rate) is int


@pytest.mark.parametrize("rate", [8000, 11025, 44056, 96000])
def test_unusual_rates_are_kept(rate):
    assert read_audio((tone(), rate))[1] == rate


@pytest.mark.parametrize("rate", [0, -16000, 16000.5, float("nan"), 10, 10**7])
def test_invalid_rates_are_rejected(rate):
    with pytest.raises(ValueError, match="expected a whole number from 1000 to 768000"):
        read_audio((tone(), rate))


def test_swapped_or_untyped_rate_is_rejected():
    with pytest.raises(TypeError, match=r"\(samples, rate\) in this order"):
        read_audio((16000, tone()))
    with pytest.raises(TypeError, match="is a str, expected Hz"):
        read_audio((tone(), "16000"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((2, 2, 2), np.float32), r"shape \[2, 2, 2\]"),
        (np.zeros((80, 300), np.float32), "at most 64 channels"),
        (
            np.array([0.1, np.nan, np.inf]),
            "2 of 3 values are NaN or infinite, the first at sample 1",
        ),
        (np.array([0.0, 20000.0]), "peak at 20000"),
        (np.array([1, 2], np.int64), "is int64"),
        (np.array([1 + 1j]), "is complex128"),
    ],
)
def test_invalid_samples_are_rejected(samples, message):
    with pytest.raises(ValueError, match=message):
        read_audio((samples, 16000))


def test_empty_and_other_files_are_rejected_as_audio(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match=r"empty\.wav: no samples"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "zero.wav").touch()
    with pytest.raises(ValueError, match="0 bytes"):
        read_audio(tmp_path / "zero.wav")
    (tmp_path / "x.wav").write_bytes(b"this is text, not audio, and long enough")
    with pytest.raises(ValueError, match="tried soundfile: .*; torchcodec: .*; wave: "):
        read_audio(tmp_path / "x.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="100 of 100 values"):
        read_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_truncated_audio_file_is_rejected(tmp_path, extension):
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, tone(2), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"x.{extension}"):
        read_audio(path)


def test_wav_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(data))[0]) == 8000


def test_silence_is_read_with_a_warning(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(800), 16000)
    with pytest.warns(UserWarning, match="silent"):
        samples, _ = read_audio(tmp_path / "x.wav")
    assert not samples.any()


def test_10_ms_of_audio_are_read():
    assert len(read_audio((tone(0.01), 16000))[0]) == 160


def test_too_long_audio_is_rejected_before_decoding(tmp_path):
    soundfile.write(tmp_path / "x.flac", tone(3), 16000)
    with pytest.raises(ValueError, match="lasts 3 s, more than max_seconds=2"):
        read_audio(tmp_path / "x.flac", max_seconds=2)
    with pytest.raises(ValueError, match="lasts 3 s, more than max_seconds=2.5"):
        read_audio((tone(3), 16000), max_seconds=2.5)
    assert len(read_audio(tmp_path / "x.flac", max_seconds=3)[0]) == 48000
    hours = np.broadcast_to(np.float32(0.1), 2 * 3600 * 1000)
    with pytest.raises(ValueError, match="lasts 7200 s, more than max_seconds=1800"):
        read_audio((hours, 1000))
    assert len(read_audio((hours, 1000), max_seconds=None)[0]) == 7_200_000


@pytest.mark.parametrize(
    ("width", "subtype"), [(1, "PCM_U8"), (2, "PCM_16"), (3, "PCM_24"), (4, "PCM_32")]
)
def test_wave_reader_equals_soundfile(tmp_path, monkeypatch, width, subtype):
    both = np.stack([tone(), -0.3 * tone()], axis=1)
    soundfile.write(tmp_path / "x.wav", both, 16000, subtype=subtype, format="WAV")
    with wave.open(str(tmp_path / "x.wav")) as sound:
        assert sound.getsampwidth() == width
    expected, _ = read_audio(tmp_path / "x.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    samples, rate = read_audio(tmp_path / "x.wav")
    assert rate == 16000
    np.testing.assert_allclose(samples, expected, atol=1e-6)
    with pytest.raises(ValueError, match="lasts 0.5 s, more than max_seconds=0.1"):
        read_audio(tmp_path / "x.wav", max_seconds=0.1)
    with pytest.raises(ValueError, match="soundfile: not installed .*; torchcodec: not installed"):
        read_audio(b"RIFX and something else")


def test_torchcodec_reads_what_soundfile_cannot(monkeypatch):
    class AudioDecoder:
        def __init__(self, data: bytes) -> None:
            if data != b"m4a data":
                raise ValueError("no stream")
            self.metadata = types.SimpleNamespace(duration_seconds=0.5)

        def get_all_samples(self) -> types.SimpleNamespace:
            return types.SimpleNamespace(data=torch.from_numpy(tone())[None], sample_rate=16000)

    decoders = types.SimpleNamespace(AudioDecoder=AudioDecoder)
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(decoders=decoders))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    samples, rate = read_audio(b"m4a data")
    assert rate == 16000
    np.testing.assert_array_equal(samples, tone())
    with pytest.raises(ValueError, match="max_seconds=0.2"):
        read_audio(b"m4a data", max_seconds=0.2)
    with pytest.raises(ValueError, match="torchcodec: no stream"):
        read_audio(b"other data")


# --- files and folders ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JPG", "image"), ("b.tiff", "image"), ("c.Flac", "audio"), ("d.txt", None), ("e", None)],
)
def test_media_kind_follows_the_extension(name, kind):
    assert media_kind(name) == kind
    assert media_kind(Path("folder.wav") / name) == kind


def test_folders_are_searched_in_order_without_duplicates(tmp_path):
    names = ["b/2.png", "b/1.JPG", "a.png", "c.wav", "note.txt", ".hidden.png", ".git/x.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.png", "b/1.JPG", "b/2.png")]
    assert find_media(tmp_path, "image") == expected
    assert find_media(str(tmp_path), "audio") == [tmp_path / "c.wav"]
    mixed = find_media([tmp_path / "b/2.png", tmp_path], "image")
    assert mixed == [expected[2], expected[0], expected[1]]
    assert find_media([tmp_path / "note.txt"], "image") == [tmp_path / "note.txt"]


def test_find_media_rejects_invalid_paths(tmp_path):
    (tmp_path / "x.wav").touch()
    with pytest.raises(ValueError, match=r"x\.wav is audio, expected image"):
        find_media([tmp_path / "x.wav"], "image")
    with pytest.raises(ValueError, match=r"no image in folder .*; expected a file with \.avif"):
        find_media(tmp_path, "image")
    with pytest.raises(FileNotFoundError, match=r"did you mean x\.wav"):
        find_media([tmp_path / "y.wav"], "audio")
    with pytest.raises(ValueError, match="kind='video'"):
        find_media(tmp_path, "video")


def test_reading_leaves_no_file_open(tmp_path):
    Image.fromarray(RED).save(tmp_path / "x.png")
    soundfile.write(tmp_path / "x.wav", tone(), 16000)
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        read_image(tmp_path / "x.png")
        read_audio((tmp_path / "x.wav").read_bytes())
        read_audio(tmp_path / "x.wav")
        gc.collect()
    # An error raised while an object is collected goes nowhere, so they are counted instead.
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []
