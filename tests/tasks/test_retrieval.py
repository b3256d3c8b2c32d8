"""Search among vectors: `mmdlm index`, then `mmdlm search`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.commands.main import main
from mmdlm.representation import similarity
from mmdlm.tasks.retrieval import Index, search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("options", [(), ("--masks", "3"), ("--pooling", "last")])
def test_a_picture_finds_itself_first(folder, tmp_path, capsys, options):
    out = tmp_path / "vectors.jsonl"
    assert main(["index", str(folder), "--out", str(out), *options]) == 0
    capsys.readouterr()
    asked = str(folder / "3.png")
    assert main(["search", asked, "--index", str(out), "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == asked
    assert [r["file"] for r in found["results"]][0] == asked
    assert found["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert found["results"][1]["score"] < 1


def test_the_index_needs_no_name(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["search", "a red circle"]) == 2
    assert "there is no index index.jsonl; make it with mmdlm index" in capsys.readouterr().err
    assert main(["index", str(folder)]) == 0
    assert "5 done, 0 done before" in capsys.readouterr().err
    assert main(["index", str(folder)]) == 0
    assert "0 done, 5 done before" in capsys.readouterr().err
    assert main(["search", str(folder / "3.png"), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("3.png")


def test_scores_are_those_of_the_vectors(folder, tmp_path):
    model, out = mmdlm.load("tiny"), tmp_path / "v.jsonl"
    assert main(["embed", str(folder), "--out", str(out), "--masks", "2"]) == 0
    index = Index.read(out)
    assert index.vectors.shape == (5, 2, 192)
    assert index.options == {"masks": 2}
    (found,) = search(model, index, ["a red circle"], top=9)
    query = mmdlm.embed(model, text="a red circle", masks=2)
    for file, score in found:
        document = mmdlm.embed(model, image=file, masks=2)
        wanted = max(query[0] @ d for d in document) + max(query[1] @ d for d in document)
        assert score == pytest.approx(float(wanted) / 2, abs=1e-5)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_similarity_of_single_vectors_is_the_cosine():
    a, b = torch.randn(3, 1, 8), torch.randn(4, 1, 8)
    assert torch.allclose(similarity(a, b), a[:, 0] @ b[:, 0].T)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['{"file": "a", "text": "b"}'], "holds no vectors; make them with"),
        (
            ['{"file": "a", "embedding": [1.0]}', '{"file": "b", "embedding": [1.0, 0.0]}'],
            "different models or settings",
        ),
    ],
)
def test_wrong_indices_are_named(tmp_path, lines, error):
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=error):
        Index.read(path)


def test_an_index_of_another_model_is_refused(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"file": "a", "embedding": [1.0, 0.0]}')
    with pytest.raises(ValueError, match="192 numbers, those of the index 2"):
        search(mmdlm.load("tiny"), Index.read(path), ["circle"])
