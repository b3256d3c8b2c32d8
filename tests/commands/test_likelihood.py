"""`mmdlm likelihood` ranks answers about an image."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdlm.commands.main import main
from mmdlm.data import scenes


def test_the_right_caption_is_most_probable(tmp_path, capsys):
    scene = scenes.random_scene(np.random.default_rng(3), 1)
    Image.fromarray(scenes.draw(scene)).save(tmp_path / "scene.png")
    right = scenes.describe(scene)
    words = ["likelihood", "describe the picture", right, "a large red cross on the left"]
    words += ["--image", str(tmp_path / "scene.png"), "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in shown] == words[2:4]
    assert main([*words, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["answer"] for one in found] == words[2:4]
    assert found[0]["bound"] > found[1]["bound"] + 5
    assert shown[0].startswith(f"{found[0]['bound']:.3f}")


def test_help_explains_the_number(capsys):
    with pytest.raises(SystemExit):
        main(["likelihood", "--help"])
    assert "bound on the log likelihood" in capsys.readouterr().out
