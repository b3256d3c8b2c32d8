import os

import pytest

from mmdlm.media.search import search_media


def test_search_names_what_it_skips_and_what_fails(tmp_path):
    names = [
        "a.png",
        "b.cr2",
        "c.svg",
        "c.wav",
        "note.txt",
        "more.txt",
        "README",
        ".x.png",
        ".g/y.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = search_media([tmp_path, tmp_path / "typo.png", tmp_path / "c.wav"], "image")
    assert found.files == [tmp_path / "a.png"]
    assert {path.name for path in found.failed} == {"b.cr2", "c.svg", "typo.png", "c.wav"}
    assert "not supported (.cr2)" in str(found.failed[tmp_path / "b.cr2"])
    assert {reason: len(paths) for reason, paths in found.skipped.items()} == {
        "hidden folder": 1,
        "hidden file": 1,
        "not an image (.wav)": 1,
        "not an image (.txt)": 2,
        "not an image (no extension)": 1,
    }
    assert f"skipped {tmp_path / 'more.txt'} and 1 more: not an image (.txt)" in found.summary()


def test_linked_folders_are_searched_once(tmp_path):
    top, other = tmp_path / "top", tmp_path / "other"
    for file in (top / "a.png", top / "sub" / "b.png", other / "c.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for link, target in {
        top / "linked": other,
        top / "twice": other,
        top / "0": top / "sub",
        top / "sub" / "loop": top,
        top / "up": tmp_path,
        other / "back": top,
        top / "gone": tmp_path / "nowhere",
    }.items():
        link.symlink_to(target)
    found = search_media(top, "image")
    assert found.files == [top / "a.png", top / "linked" / "c.png", top / "sub" / "b.png"]
    skipped = {path for paths in found.skipped.values() for path in paths}
    names = ("0", "twice", "up", "gone", "sub/loop", "linked/back")
    assert skipped == {top / name for name in names}
    (tmp_path / "alias").symlink_to(top)
    again = search_media([top, tmp_path / "alias", top / "a.png"], "image")
    assert again.files == found.files


def test_unreadable_folder_fails_and_the_others_are_searched(tmp_path, monkeypatch):
    for name in ("a", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    scandir = os.scandir

    def guarded(path):  # permissions do not stop root, which tests may run as
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = search_media(tmp_path, "image")
    assert found.files == [tmp_path / "a" / "x.png"]
    assert isinstance(found.failed[tmp_path / "secret"], PermissionError)
    with pytest.raises(PermissionError):
        search_media(tmp_path / "secret", "image")
