"""Samples become token ids and prepared media."""

import numpy as np
import pytest
import torch

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.collate import collate, rows
from mmdlm.data.dataset import Sample, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer


def build(attention="cascade"):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words(["what", "is", "this", "?", "red", "circle", "a"])
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention=attention)
    return MultimodalDLM(spec, {"image": ViT.tiny()}, {"image": MLP(32, 16)}, tokenizer)


def sample(*turns):
    return Sample(tuple(Turn(*t) for t in turns), image=ViT.example(), group="g")


def one(model, *samples):
    n = len(samples)
    return collate(model, samples, torch.arange(n), torch.zeros(n).double())


def test_answers_are_completed_with_end_tokens():
    model = build()
    batch = one(model, sample(("what is this ?", "a red circle", 5)))
    turn = batch.turns[0][0]
    assert model.tokenizer.decode(turn.answer[:3]) == "a red circle"
    assert turn.answer[3:].tolist() == [1, 1]
    assert batch.groups == ("g",)


def test_turns_share_a_row_only_where_attention_allows_it():
    turns = (("what is this ?", "circle", 2), ("what ?", "red", 2))
    shared, *_ = rows(build(), one(build(), sample(*turns)))
    assert [len(r.turns) for r in shared] == [2]
    model = build("full")
    apart, seeds, phase, _ = rows(model, one(model, sample(*turns)))
    assert [len(r.turns) for r in apart] == [1, 1]
    assert len(set(seeds.tolist())) == 2
    assert len(phase) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([sample(("what ?", "a red circle", 2))], "canvas"),
        ([sample(("what ?", "green", 2))], "green"),
        ([sample(("what ?", "red", 2)), Sample((Turn("a", "red", 2),))], "all or none"),
        ([Sample((Turn("a", "red", 2),), audio=(np.zeros(999, np.float32), 16000))], "audio"),
        ([sample(("what ?", np.zeros((2, 2), np.float32), 4))], "robot"),
    ],
)
def test_bad_samples(given, message):
    with pytest.raises(ValueError, match=message):
        one(build(), *given)
