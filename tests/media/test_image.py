"""Reading images: every form, and every bad input with its error."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.media import image as reader
from mmdlm.media import read_audio, read_image

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
    exif[reader.EXIF_ORIENTATION] = 6  # the camera was held on its side
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
        (Image.fromarray(np.full((2, 2), -1, np.float32)), "spans -1 to -1"),
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
