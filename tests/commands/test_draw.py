"""`mmdlm draw`: files, animation, images in the terminal, and errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mmdlm
from mmdlm.commands.draw import blocks, shown
from mmdlm.commands.main import main
from tests.systems.test_mmada import published


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(published(tmp_path_factory.mktemp("mmada")))


def pixels(image: Image.Image | Path) -> list:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image)).tolist()


def test_writes_the_image_that_the_function_draws(folder, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "circle.png"
    given = ["--model", folder, "--seed", "4", "--steps", "5", "--guidance", "2"]
    assert main(["draw", "a red circle", "--out", str(out), "--json", *given]) == 0
    said = json.loads(capsys.readouterr().out)
    want = mmdlm.draw(mmdlm.load(folder), "a red circle", seed=4, steps=5, guidance=2.0)
    assert pixels(out) == pixels(want)
    assert (said["file"], said["forwards"]) == (str(out), 10)


def test_several_texts_are_numbered_and_have_their_own_seeds(folder, tmp_path) -> None:
    out = tmp_path / "p.png"
    given = ["--model", folder, "--seed", "7", "--steps", "3", "--size", "8x4"]
    assert main(["draw", "ab", "ab", "--out", str(out), *given]) == 0
    files = [tmp_path / f"p-{i}.png" for i in (1, 2)]
    model = mmdlm.load(folder)
    for file, seed in zip(files, (7, 8), strict=True):
        assert pixels(file) == pixels(mmdlm.draw(model, "ab", size=(8, 4), seed=seed, steps=3))
    assert Image.open(files[0]).size == (8, 4)


def test_several_images_of_a_text_have_the_next_seeds(folder, tmp_path) -> None:
    out = tmp_path / "p.png"
    given = ["--model", folder, "--seed", "7", "--steps", "3", "--n", "2"]
    assert main(["draw", "ab", "ef", "--out", str(out), *given]) == 0
    model = mmdlm.load(folder)
    wanted = [("ab", 7), ("ab", 8), ("ef", 9), ("ef", 10)]
    for i, (text, seed) in enumerate(wanted, 1):
        drawn = mmdlm.draw(model, text, seed=seed, steps=3)
        assert pixels(tmp_path / f"p-{i}.png") == pixels(drawn)


def test_the_best_of_several_is_written(folder, tmp_path, capsys) -> None:
    out = tmp_path / "best.png"
    given = ["--model", folder, "--seed", "7", "--steps", "5", "--best-of", "6", "--json"]
    assert main(["draw", "ab", "--out", str(out), *given]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(out)
    want = mmdlm.draw(mmdlm.load(folder), "ab", seed=7, steps=5, best_of=6)
    assert pixels(out) == pixels(want)


def test_an_animation_begins_grey_and_ends_with_the_image(folder, tmp_path) -> None:
    out, gif = tmp_path / "p.png", tmp_path / "p.gif"
    given = ["--model", folder, "--seed", "1", "--steps", "6", "--live"]
    assert main(["draw", "ab", "--out", str(out), "--gif", str(gif), *given]) == 0
    film = Image.open(gif)
    assert film.n_frames >= 4
    assert pixels(film.convert("RGB")) == np.full((8, 8, 3), 128).tolist()
    film.seek(film.n_frames - 1)
    assert np.abs(np.array(pixels(film.convert("RGB"))) - np.array(pixels(out))).mean() < 8


def test_an_image_is_shown_as_half_blocks() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 1, 4, 4))
    text = blocks(image, 64)
    assert text.plain.splitlines() == ["▀" * 4] * 2
    assert str(text.spans[0].style) == "#ff0000 on #0000ff"
    screen = io.StringIO()
    with shown(True, Console(file=screen, force_terminal=True, width=20)) as show:
        show(image)
    assert "▀▀▀▀" in screen.getvalue().replace("\x1b[0m", "") or "▀" in screen.getvalue()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "tiny"], "this model cannot draw"),
        (["--gif", "a.png"], "whose name ends in .gif"),
        (["--size", "big"], "expected a side such as 512, or 768x512"),
        (["--n", "2", "--gif", "a.gif"], "is for one image"),
        (["--best-of", "4", "--live"], "leave --best-of out"),
    ],
)
def test_errors_are_one_line(given, said, capsys) -> None:
    assert main(["draw", "ab", *given]) == 2
    assert said in capsys.readouterr().err
