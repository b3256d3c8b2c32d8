"""WebDataset shards."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmdlm.data.formats import of, open_data
from mmdlm.data.webdataset import Member, WebDataset
from mmdlm.media import read_audio, read_image
from mmdlm.messages import Media, Text

RNG = np.random.default_rng(0)


def image(red: int, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(stream, kind)
    return stream.getvalue()


def clip(kind: str = "wav") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(160, 0.1), 16000, format=kind)
    return stream.getvalue()


def write(path: Path, **members: bytes | str | dict) -> Path:
    """A tar file; "__" stands for the dot in the names of its members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, value in members.items():
            value = json.dumps(value) if isinstance(value, dict) else value
            data = value.encode() if isinstance(value, str) else value
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shown(data, index: int = 0) -> list[object]:
    """Texts, media and answer of a row's last conversation."""
    return [
        p.text if isinstance(p, Text) else p.item if isinstance(p, Media) else p.value
        for m in data.sample(index, RNG).conversations[-1]
        for p in m.parts
    ]


def test_samples_of_several_shards_in_any_order(tmp_path: Path) -> None:
    for i in range(3):
        write(
            tmp_path / f"part-{i:03d}.tar",
            **{f"{i}a__png": image(10 * i), f"{i}a__txt": f"image {i}\n"},
            **{f"{i}b__wav": clip(), f"{i}b__txt": f"sound {i}"},
        )
    pattern = tmp_path / "part-{000..002}.tar"
    data = open_data(pattern, length=4, prompt="describe")
    assert isinstance(data, WebDataset)
    assert data.rows == open_data(tmp_path).rows
    assert [shown(data, i)[-1] for i in (5, 2, 0)] == ["sound 2", "image 1", "image 0"]
    assert read_image(shown(data, 4)[0]).getpixel((0, 0)) == (20, 0, 0)
    assert read_audio(shown(data, 1)[0])[0].shape == (160,)
    again = pickle.loads(pickle.dumps(data))  # as in a worker process
    assert shown(again, 4) == shown(data, 4)
    assert data.places[3] == f"{tmp_path / 'part-001.tar'}, sample 1b"


@pytest.mark.parametrize("kind", ["jpg", "webp", "flac", "mp3"])
def test_media_of_all_kinds(tmp_path: Path, kind: str) -> None:
    is_image = kind in ("jpg", "webp")
    content = image(9, kind.replace("jpg", "jpeg")) if is_image else clip(kind)
    data = open_data(write(tmp_path / "x.tar", **{f"a__{kind}": content, "a__txt": "b"}), length=2)
    part = data.sample(0, RNG).conversations[0][0].parts[0]
    assert (part.kind, part.item) == ("image" if is_image else "audio", content)


def test_json_holds_messages_conversations_or_columns(tmp_path: Path) -> None:
    first, second = image(1), image(2)
    parts = [{"type": "image", "image": "b.2.png"}, {"type": "text", "text": "and"}]
    parts += [{"type": "image"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "m"}]
    said = [{"from": "human", "value": "what <image>"}, {"from": "gpt", "value": "c"}]
    path = write(
        tmp_path / "x.tar",
        **{"b__1__png": first, "b__2__png": second, "b__json": {"messages": turns}},
        **{"c__png": first, "c__json": {"conversations": said, "id": 3}},
        **{"d__json": {"question": "1 + 1?", "answer": "2"}},
        **{"e__png": second, "e__json": {"caption": "red", "width": 4}},
        **{"f__png": first, "f__txt": "black", "f__json": {"caption": "other", "url": "x"}},
    )
    data = open_data(path, length=2)
    assert [shown(data, i) for i in range(5)] == [
        [second, "and", first, "?", "m"],
        ["what ", first, "c"],
        ["1 + 1?", "2"],
        [second, "red"],
        [first, "black"],
    ]


def test_folders_and_other_files_in_the_tar(tmp_path: Path) -> None:
    members = {"./s.1/0001__png": image(1), "./s.1/0001__txt": "yes", "./s.1/._0001__txt": "no"}
    path = write(tmp_path / "x.tar", README="about", **members)
    data = open_data(path, length=2)
    assert [shown(data, i)[-1] for i in range(len(data))] == ["yes"]


def test_a_member_is_read_from_its_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert Member(tmp_path / "x", "a.txt", 3, 4).read() == b"3456"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a__png": b"x"}, "x.tar, sample a holds png; expected a .txt or .json"),
        ({"a__txt": "x"}, "x.tar, sample a has a text alone"),
        ({"a__png": b"x", "a__json": "{"}, "x.tar, sample a has no valid text"),
        ({"a__png": b"x", "a__json": "[1]"}, "x.tar, sample a: the .json is a list"),
        ({"a__png": b"x", "a__txt": b"\xff\xfe"}, "x.tar, sample a has no valid text"),
        ({"a__png": b"x", "a__json": {"url": "u"}}, "x.tar, sample a does not name what to learn"),
    ],
)
def test_errors_name_shard_and_sample(tmp_path: Path, members: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(write(tmp_path / "x.tar", **members))


def test_damaged_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", a__txt="text" * 500, b__txt="more")
    (tmp_path / "gz.tar").write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(path.read_bytes()[:1500])
    for name in ("x.tar", "gz.tar"):
        with pytest.raises(ValueError, match=f"{name} is not a complete, uncompressed tar file"):
            open_data(tmp_path / name)


def test_missing_shards_and_network_addresses_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "p-0.tar", a__txt="x")
    with pytest.raises(FileNotFoundError, match="p-1.tar does not exist"):
        of(tmp_path / "p-{0..1}.tar")
    for address in ("https://example.com/p-{0..1}.tar", "hf://datasets/x", "s3://bucket/x.tar"):
        with pytest.raises(ValueError, match="on the network.*download it first"):
            of(address)
        with pytest.raises(ValueError, match="on the network"):
            WebDataset(Path(address))
