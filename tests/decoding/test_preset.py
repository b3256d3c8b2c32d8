import warnings
from pathlib import Path

import pytest
import torch

import mmdlm
from mmdlm.decoding import preset
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks

SHIPPED = Path(__file__).parents[2] / "configs" / "decoding"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_a_name_gives_the_strategies_of_its_file() -> None:
    want = [Blocks(32), PrefixCache(), Threshold(0.9), EndOfText()]
    assert preset.strategies("fast_dllm") == want


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_preset_decodes(name: str, toy) -> None:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    by_name = mmdlm.decode(toy(), prompt, 10, name, generator=seeds[0])
    assert not (by_name.tokens == 2).any()
    again = mmdlm.decode(toy(), prompt, 10, preset.strategies(name), generator=seeds[1])
    assert by_name.tokens.equal(again.tokens)
    assert by_name.nfe == 1 or name != "one_step"


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "configs" / "decoding"
    folder.mkdir(parents=True)
    recipe = "- class_path: mmdlm.decoding.plans.blocks.Blocks\n  init_args: {size: 7}\n"
    (folder / "llada.yaml").write_text(recipe)
    (folder / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert preset.strategies("llada") == preset.strategies("mine") == [Blocks(7)]
    assert preset.strategies(str(folder / "mine.yaml")) == [Blocks(7)]
    assert preset.names() == sorted([*NAMES, "mine"])


def test_lists_may_mix_instances_and_recipes() -> None:
    recipe = {"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": {"tau": 0.5}}
    assert preset.strategies([Blocks(3), recipe]) == [Blocks(3), Threshold(0.5)]
    assert preset.strategies(None) == preset.strategies([]) == []


@pytest.mark.parametrize("name", ["fast_dlm", "../decoding/llada", "", "*", "no/such.yaml"])
def test_unknown_names_are_refused_with_those_known(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=", ".join(NAMES)) as error:
        preset.strategies(name)
    if name == "fast_dlm":
        assert "did you mean 'fast_dllm'" in str(error.value)


@pytest.mark.parametrize(
    "path",
    ["os.system", "mmdlm.model.MultimodalDLM", "mmdlm.decoding.commits.threshold.Treshol", "x"],
)
def test_only_strategies_of_ours_are_built(path: str) -> None:
    with pytest.raises(ValueError, match="(is outside|name a class of) mmdlm.decoding") as error:
        preset.strategies([{"class_path": path}])
    if "Treshold" in path:
        assert "did you mean mmdlm.decoding.commits.threshold.Threshold" in str(error.value)


@pytest.mark.parametrize("given", [{"taw": 0.5}, {"tau": "high"}])
def test_bad_arguments_are_named_with_their_strategy(given: dict) -> None:
    with pytest.raises(ValueError, match="Threshold"):
        preset.strategies(
            [{"class_path": "mmdlm.decoding.commits.threshold.Threshold", "init_args": given}]
        )


@pytest.mark.parametrize("text", ["a: 1", "", "- ["])
def test_files_that_hold_no_list_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml"):
        preset.strategies(str(file))


def test_one_strategy_is_no_list() -> None:
    with pytest.raises(TypeError, match="give a list, e.g"):
        preset.strategies(Threshold())


def test_a_strategy_too_coarse_for_the_answer_is_named() -> None:
    with pytest.warns(UserWarning, match=r"^Blocks\(size=32\) changes nothing in an answer of 20"):
        assert preset.effective("llada", 20) == preset.strategies("llada")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset.effective("llada", 33)
        preset.effective("parallel", 3)
