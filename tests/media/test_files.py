"""Finding and opening media files."""

from __future__ import annotations

import gc
import io
import os
import random
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import mmdlm
from mmdlm.commands.main import main
from mmdlm.media import find_media, image, media_kind, read_audio, read_image
from tests.media import images, sounds


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
    with pytest.raises(ValueError, match=r"no image in folder .*; expected a file with \.apng"):
        find_media(tmp_path, "image")
    with pytest.raises(FileNotFoundError, match=r"did you mean x\.wav"):
        find_media([tmp_path / "y.wav"], "audio")
    with pytest.raises(ValueError, match="kind='video'"):
        find_media(tmp_path, "video")


def test_reading_leaves_no_file_open(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    soundfile.write(tmp_path / "x.wav", 0.1 * np.sin(np.arange(8000)), 16000)
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        read_image(tmp_path / "x.png")
        read_audio((tmp_path / "x.wav").read_bytes())
        read_audio(tmp_path / "x.wav")
        gc.collect()
    # An error raised while an object is collected goes nowhere, so they are counted instead.
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []


# What Pillow opens only with another program, or not at all.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}


def test_every_extension_that_can_be_read_is_found_in_folders(tmp_path):
    known = Image.registered_extensions().items()
    readable = {ext for ext, form in known if form in Image.OPEN and form not in NOT_DECODED}
    images = readable | {".heic", ".heif", ".jpe", ".jfif", ".tif", ".avif"}
    sounds = set(
        [
            ".m4a",
            ".webm",
            ".amr",
            ".aac",
            ".opus",
            ".oga",
            ".aiff",
            ".au",
            ".caf",
            ".mp4",
            ".w64",
            ".wma",
            ".3gp",
            ".mkv",
        ]
    )
    for name in images | sounds:
        (tmp_path / f"x{name}").touch()
    assert {path.suffix for path in find_media(tmp_path, "image")} == images
    assert {path.suffix for path in find_media(tmp_path, "audio")} == sounds


@pytest.mark.parametrize("read", [read_image, read_audio])
def test_pipes_and_devices_are_refused_without_waiting(tmp_path, read):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is a pipe, expected a regular file"):
        read(tmp_path / "x.png")
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        read("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(ValueError, match="is a socket"):
            read(tmp_path / "s")


@pytest.mark.parametrize("read", [read_image, read_audio])
def test_other_ways_of_treating_damage_are_rejected(read):
    with pytest.raises(ValueError, match="on_damage='ignore', expected 'error' or 'warn'"):
        read(b"data", on_damage="ignore")


def test_missing_library_is_named_and_only_its_files_fail(tmp_path, monkeypatch):
    for name in ("av", "pillow_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(image, "_register_heif", image._register_heif.__wrapped__)
    monkeypatch.setattr(image.features, "check", lambda name: False)
    for kind, library in ((b"heic", r"mmdlm\[data\]"), (b"avif", "pillow>=11.3")):
        with pytest.raises(ValueError, match=f"needs .*{library}"):
            read_image(b"\0\0\0\x18ftyp" + kind + bytes(50))
    for start in (b"\0\0\0\x18ftypM4A ", b"\x1aE\xdf\xa3webm", b"#!AMR\n"):
        with pytest.raises(ValueError, match=r"PyAV needs the extra: pip install .mmdlm\[data\]"):
            read_audio(start + bytes(52))
    with pytest.raises(ValueError, match="tried soundfile: .*; av: not installed"):
        read_audio(b"some other bytes")


def test_model_and_commands_take_what_to_do_with_damage(tmp_path, capsys):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue()[:-20])
    model = mmdlm.load("tiny")
    with pytest.raises(ValueError, match="on_damage='warn'"):
        mmdlm.caption(model, tmp_path / "x.png")
    model.on_damage = "warn"
    with pytest.warns(UserWarning, match="is damaged"):
        text = mmdlm.caption(model, tmp_path / "x.png")
    assert main(["caption", str(tmp_path / "x.png")]) == 1
    assert "--on-damage warn" in capsys.readouterr().err
    assert main(["caption", str(tmp_path / "x.png"), "--on-damage", "warn"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}: {text}\n"


def test_damaged_files_give_only_our_errors():
    rng = random.Random(0)
    sounds_made = [data for _, data, *_ in [*sounds.exact(), *sounds.lossy()]]
    images_made = [data for _, data, *_ in images.whole()]
    messages = []
    for read, files in ((read_audio, sounds_made), (read_image, images_made)):
        for _ in range(400):
            data = bytearray(rng.choice(files))
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(rng.choice((60, len(data))))] = rng.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(bytes(data), on_damage=rng.choice(("error", "warn")))
                except ValueError as error:
                    messages.append(str(error))
    assert len(messages) > 100
    assert all(text.startswith(("read_audio: ", "read_image: ")) for text in messages)
