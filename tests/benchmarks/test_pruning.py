"""`mmdlm bench prune`: its table, pictures, and what it counts."""

import numpy as np
import pytest
from PIL import Image

import mmdlm
from mmdlm.benchmarks.pruning import bench_prune, draw, request, survivors
from mmdlm.data.scenes import draw as draw_scene
from mmdlm.data.scenes import random_scene
from mmdlm.decoding.pruning.option import apply


@pytest.fixture(scope="module")
def tiny():
    return mmdlm.load("tiny")


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(draw_scene(random_scene(np.random.default_rng(1), 2), 64))


@pytest.mark.parametrize(
    ("method", "count"),
    [(None, 16), ("divprune@4", 4), ("attention@4", 4), ({"keep": [8, 3], "layer": [1, 3]}, 3)],
)
def test_survivors_are_what_is_left_at_the_end(tiny, picture, method, count):
    apply(tiny, method)
    places, total = survivors(tiny, request(tiny, picture))
    apply(tiny, None)
    assert total == 16
    assert len(places) == count
    assert places.tolist() == sorted(set(places.tolist()))
    assert places.max() < 16


def test_dropped_tokens_are_pale(tiny, picture):
    sheet = np.asarray(draw(tiny, picture, ["divprune"], 0.25).convert("L")).astype(float)
    whole, pruned = sheet[18:, :192], sheet[18:, 200:392]
    parts = [x.reshape(4, 48, 4, 48).mean((1, 3)) for x in (whole, pruned)]
    apply(tiny, "divprune@0.25")
    places, _ = survivors(tiny, request(tiny, picture))
    apply(tiny, None)
    stays = np.isin(np.arange(16), places).reshape(4, 4)
    assert np.allclose(parts[0][stays], parts[1][stays], atol=1)
    assert (255 - parts[1][~stays] < 0.4 * (255 - parts[0][~stays])).all()


def test_the_table_says_what_is_kept_and_what_changes(tmp_path, capsys):
    plot, show = tmp_path / "new" / "plot.png", tmp_path / "show.png"
    done = bench_prune(
        methods=["divprune,attention"], keep=[1.0, 0.25], count=4, plot=plot, show=show
    )
    assert done == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert [row[:4] for row in rows[:2]] == [
        ["none", "100%", "16", "100.0 %"],
        ["divprune", "100%", "16", "100.0 %"],
    ]
    assert float(rows[0][4].removesuffix(" %")) > 80  # the bundled model knows such drawings
    assert rows[2][:3] == ["divprune", "25%", "4"]
    assert rows[4][:3] == ["attention", "25%", "4"]
    assert Image.open(plot).size[0] > 400
    assert Image.open(show).size == (3 * 200, 210)


def test_own_pictures_are_compared_without_references(tmp_path, picture, capsys):
    picture.save(tmp_path / "one.png")
    assert bench_prune([str(tmp_path)], methods=["uniform"], keep=[0.5]) == 0
    out = capsys.readouterr().out
    assert "1 captions by tiny" in out
    assert [line.split("│")[5].strip() for line in out.splitlines() if "uniform" in line] == ["-"]
