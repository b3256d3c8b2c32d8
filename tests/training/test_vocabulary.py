"""Growing a word-level vocabulary: old words keep their logits, new ones can be used."""

from __future__ import annotations

import pytest
import torch

import mmdlm
from mmdlm.checkpoint import save
from mmdlm.text import Tokenizer
from mmdlm.training.vocabulary import grow

NEW = ["The", "cat's", "zebra", "3.14", "猫", "."]


@pytest.fixture
def model():
    return mmdlm.load("tiny", pack=False)


def test_old_words_keep_their_logits(model) -> None:
    tokens = torch.tensor([model.tokenizer.encode("a large red circle")])
    before = model.logits(tokens)
    assert set(grow(model, NEW)) == set(NEW)
    torch.testing.assert_close(model.logits(tokens)[..., : before.shape[-1]], before)


def test_new_words_are_written_as_they_were_read(model) -> None:
    grow(model, NEW)
    for text in ("The zebra. 3.14 猫.", "a red cat's circle"):
        assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_a_capital_starts_from_its_lower_case_word(model) -> None:
    grow(model, ["Red"])
    small, capital = (model.tokenizer.id(word) for word in ("red", "Red"))
    weight = model.backbone.embed.weight
    assert torch.equal(weight[small], weight[capital])


def test_known_words_add_nothing(model) -> None:
    rows = len(model.backbone.embed.weight)
    assert grow(model, ["red", "circle"]) == []
    assert len(model.backbone.embed.weight) == rows


def test_a_grown_model_survives_saving(model, tmp_path) -> None:
    grow(model, NEW)
    save(model, tmp_path / "grown")
    again = mmdlm.load(tmp_path / "grown")
    tokens = torch.tensor([again.tokenizer.encode("The zebra")])
    assert torch.equal(again.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize("word", ["<action_3>", "two words", "end."])
def test_what_cannot_be_a_word_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="cannot be a word"):
        Tokenizer.from_words(["a"]).grown([word])
