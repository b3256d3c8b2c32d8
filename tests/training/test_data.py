"""Batches follow from seed and step alone."""

import numpy as np
import pytest
import torch

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.scenes import Scenes
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer
from mmdlm.training.data import Data, Steps


@pytest.fixture
def model():
    scenes = Scenes(size=32)
    tokenizer = Tokenizer.from_words(scenes.vocabulary())
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention="cascade")
    return MultimodalDLM(
        spec,
        {"image": ViT(size=32, patch=8, dim=16, depth=1, heads=2)},
        {"image": MLP(16, 16)},
        tokenizer,
    )


def flat(batch):
    return [t.answer.tolist() for turns in batch["scenes"].turns for t in turns]


def test_processes_share_the_rows_of_one_larger_batch(model):
    scenes = Scenes(size=32, count=50)
    one = Steps(model, {"scenes": scenes}, {"scenes": 6}, seed=3)[7]["scenes"]
    parts = [Steps(model, {"scenes": scenes}, {"scenes": 3}, 3, r, 2)[7]["scenes"] for r in (0, 1)]
    seeds = torch.stack([p.seeds for p in parts], 1).flatten()
    assert torch.equal(seeds, one.seeds)
    assert torch.equal(torch.stack([p.phase for p in parts], 1).flatten(), one.phase)
    pictures = [x for pair in zip(*(p.media["image"] for p in parts), strict=True) for x in pair]
    assert all(
        torch.equal(a.tensor, b.tensor) for a, b in zip(pictures, one.media["image"], strict=True)
    )


def test_every_row_comes_once_per_pass_in_a_new_order(model):
    steps = Steps(model, {"scenes": Scenes(size=32, count=12)}, {"scenes": 4}, seed=0)
    assert len(steps) == 3
    first, second = steps.order("scenes", 0), steps.order("scenes", 1)
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)


def test_steps_repeat_exactly_and_differ(model):
    steps = Steps(model, {"scenes": Scenes(size=32)}, {"scenes": 4}, seed=0)
    assert flat(steps[5]) == flat(steps[5])
    assert flat(steps[5]) != flat(steps[6])


def test_noise_levels_spread_over_the_batch(model):
    phase = Steps(model, {"scenes": Scenes(size=32)}, {"scenes": 4}, seed=0)[2]["scenes"].phase
    gaps = torch.sort(phase).values.diff()
    torch.testing.assert_close(gaps, torch.full((3,), 0.25, dtype=torch.float64))


def test_words_come_from_all_data_sets():
    data = Data({"a": Scenes(objects=(1,)), "b": Scenes(objects=(2,))}, {"a": 1, "b": 1})
    assert set(data.words) >= {"circle", "left"}
    assert data.words == sorted(data.words)


def test_every_data_set_needs_a_batch_size():
    with pytest.raises(ValueError, match="batch size"):
        Data({"a": Scenes()}, {"b": 1})
