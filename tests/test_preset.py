from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdlm import preset
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.plans.blocks import Blocks


def test_preset_takes_recipes_as_well_as_strategies(tmp_path: Path) -> None:
    file = tmp_path / "decoding.yaml"
    recipe = {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tau": 0.5}}
    preset.write(file, {"caption": {"length": 8, "strategies": [Blocks(8), recipe]}})
    entry = preset.read(file)["caption"]
    assert entry["length"] == 8
    assert [preset.strategy(each) for each in entry["strategies"]] == [Blocks(8), Threshold(0.5)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "names no strategy of mmdlm.decoding"),
        ({"class_path": "mmdlm.decoding.decode.Decoded"}, "names no strategy"),
        ({"class_path": "mmdlm.decoding.treshold.Threshold"}, "did you mean .*threshold.Threshold"),
        (
            {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tua": 1}},
            r"Threshold takes .*, not \['tua'\]",
        ),
        ("Threshold", "names no strategy"),
    ],
)
def test_preset_names_strategies_only(tmp_path: Path, recipe: Any, message: str) -> None:
    file = tmp_path / "decoding.yaml"
    file.write_text(yaml.safe_dump({"caption": {"strategies": [recipe]}}))
    with pytest.raises(ValueError, match=message):
        preset.read(file)


def test_paths_of_the_first_edition_are_found_by_class() -> None:
    recipe = {"class_path": "mmdlm.decoding.threshold.Threshold", "init_args": {"tau": 0.5}}
    assert preset.strategy(recipe) == Threshold(0.5)


@pytest.mark.parametrize("text", ["- a\n", "caption: 3\n", "a: [", ""])
def test_preset_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "decoding.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="decoding.yaml"):
        preset.read(file)
