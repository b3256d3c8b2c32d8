"""Samples become token ids and prepared media."""

import numpy as np
import pytest
import torch

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data import collate
from mmdlm.data.dataset import example
from mmdlm.messages import Turn
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer


def build(attention="cascade"):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words(["what", "is", "this", "?", "red", "circle", "a"])
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention=attention)
    return MultimodalDLM(spec, {"image": ViT.tiny()}, {"image": MLP(32, 16)}, tokenizer)


def sample(*turns):
    return example([Turn(*t) for t in turns], image=ViT.example(), group="g")


def one(model, *samples):
    n = len(samples)
    return collate.collate(model.processor, samples, torch.arange(n), torch.zeros(n).double())


def test_answers_are_completed_with_end_tokens():
    model = build()
    batch = one(model, sample(("what is this ?", "a red circle", 5)))
    turn = batch.packed.rows[0].turns[0]
    assert model.tokenizer.decode(turn.answer[:3]) == "a red circle"
    assert turn.answer[3:].tolist() == [1, 1]
    assert batch.groups == ("g",)


def test_turns_share_a_row_only_where_attention_allows_it():
    turns = (("what is this ?", "circle", 2), ("what ?", "red", 2))
    model = build()
    shared = one(model, sample(*turns))
    assert [len(row.turns) for row in shared.packed.rows] == [2]
    assert len(collate.batch(model, shared).seeds) == 1
    model = build("full")
    apart = one(model, sample(*turns))
    assert [len(row.turns) for row in apart.packed.rows] == [1, 1]
    batch = collate.batch(model, apart)
    assert len(set(batch.seeds.tolist())) == 2
    assert len(batch.phase) == 2
    assert len(batch.media["image"]) == 1  # the image of both turns is encoded once


def test_examples_with_and_without_media_share_a_batch():
    model = build("full")
    mixed = [sample(("what ?", "red", 2)), example([Turn("a", "red", 2)])]
    together = collate.batch(model, one(model, *mixed)).sequence
    logits = model.logits_at(together, together.is_answer)
    for i, each in enumerate(mixed):
        alone = collate.batch(model, one(model, each)).sequence
        expected = model.logits_at(alone, alone.is_answer)
        torch.testing.assert_close(logits[2 * i : 2 * i + 2], expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([sample(("what ?", "a red circle", 2))], "3 tokens, but its slot only 2"),
        ([sample(("what ?", "green", 2))], "green"),
        ([example([Turn("a", "red", 2)], audio=(np.zeros(999, np.float32), 16000))], "audio"),
        (
            [sample(("what ?", np.zeros((2, 2), np.float32), 4))],
            "output is 'actions', expected one of text",
        ),
        ([example([Turn("a", "red", 2)], names=("a",)), sample(("a", "red", 2))], "all or none"),
    ],
)
def test_bad_samples(given, message):
    with pytest.raises(ValueError, match=message):
        one(build(), *given)
