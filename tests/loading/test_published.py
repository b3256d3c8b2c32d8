import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdlm import discover
from mmdlm.backbones.family import Family
from mmdlm.checkpoint import load, save_published
from mmdlm.loading.shards import INDEX, SINGLE
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

FAMILIES = ("llada", "dream")


def test_unknown_architecture_names_what_is_supported(
    published: Callable[..., Path], configure: Callable[..., Path]
) -> None:
    folder = configure(published(), architectures=["GPT2"], model_type="gpt2")
    with pytest.raises(
        ValueError, match=r"\['GPT2'\], model_type 'gpt2'.*Supported: .*dream.*llada"
    ):
        load(folder)


def test_family_override_reads_what_config_does_not_tell(
    golden: Path,
    published: Callable[..., Path],
    configure: Callable[..., Path],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = configure(published(), architectures=["Mine"], model_type=...)
    assert same(load(folder, family="llada"), load(golden / "backbones" / "llada"))
    with pytest.raises(ValueError, match="no 'lada'; did you mean 'llada'"):
        load(folder, family="lada")
    with pytest.raises(ValueError, match=r"much larger model .*belong together"):
        load(golden / "backbones" / "llada", family="dream")


def test_config_that_fits_two_families_asks(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Family):
        @classmethod
        def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
            return True

    from mmdlm.backbones.llada import LLaDA

    families = {"A": LLaDA, "B": Other}
    monkeypatch.setattr(discover, "classes", lambda p, b: families if b is Family else {})
    with pytest.raises(ValueError, match="LLaDA and Other both fit"):
        load(golden / "backbones" / "llada")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [5e9, 1e5])
def test_published_export_is_bit_equal(
    golden: Path,
    tmp_path: Path,
    family: str,
    shard_bytes: float,
    weights_of: Callable[[Path], dict[str, Tensor]],
    same: Callable[[nn.Module, nn.Module], bool],
) -> None:
    folder = golden / "backbones" / family
    model = load(folder)
    save_published(model, tmp_path, shard_bytes=shard_bytes)
    first, second = weights_of(folder), weights_of(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 5e9)
    again = load(tmp_path)
    assert again.spec == model.spec
    assert same(again, model)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((folder / "config.json").read_text())
    differ = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert differ <= {"torch_dtype"}


def test_published_export_of_a_bfloat16_checkpoint_is_bit_equal(
    tmp_path: Path,
    published: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, Tensor]],
    rewrite: Callable[..., Path],
) -> None:
    folder = rewrite(published(), lambda w: {k: v.bfloat16() for k, v in w.items()})
    save_published(load(folder), tmp_path / "again", dtype="bfloat16")
    first, second = weights_of(folder), weights_of(tmp_path / "again")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_published_export_replaces_an_earlier_one(
    golden: Path, tmp_path: Path, same: Callable[[nn.Module, nn.Module], bool]
) -> None:
    model = load(golden / "backbones" / "dream")
    save_published(model, tmp_path, shard_bytes=1e5)
    save_published(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", SINGLE]
    save_published(model, tmp_path, shard_bytes=1e5)
    assert not (tmp_path / SINGLE).exists()
    assert same(load(tmp_path), model)


def test_published_export_leaves_no_tokenizer_of_another_model(
    golden: Path, tmp_path: Path
) -> None:
    Tokenizer.from_words(["a"]).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    save_published(load(golden / "backbones" / "dream"), tmp_path)
    assert load(tmp_path).tokenizer is None


def test_published_export_refuses_what_the_layout_cannot_hold(
    tmp_path: Path, multimodal: Callable[[], MultimodalDLM]
) -> None:
    model = multimodal()
    with pytest.raises(ValueError, match=r"text models only, this one has encoders \(image"):
        save_published(model, tmp_path)
    text = MultimodalDLM(model.spec)
    with pytest.raises(ValueError, match="published LLaDA config.json cannot express {'attention'"):
        save_published(text, tmp_path)
