"""Batches follow from seed and step alone."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

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
    return [t.answer.tolist() for row in batch["scenes"].packed.rows for t in row.turns]


def images(collated):
    return [item.tensor for row in collated.packed.rows for item in row.items]


def test_processes_share_the_rows_of_one_larger_batch(model):
    scenes = Scenes(size=32, count=50)
    one = Steps(model.processor, {"scenes": scenes}, {"scenes": 6}, seed=3)[7]["scenes"]
    parts = [
        Steps(model.processor, {"scenes": scenes}, {"scenes": 3}, 3, r, 2)[7]["scenes"]
        for r in (0, 1)
    ]
    seeds = torch.stack([p.seeds for p in parts], 1).flatten()
    assert torch.equal(seeds, one.seeds)
    assert torch.equal(torch.stack([p.phase for p in parts], 1).flatten(), one.phase)
    drawn = [x for pair in zip(*map(images, parts), strict=True) for x in pair]
    assert all(torch.equal(a, b) for a, b in zip(drawn, images(one), strict=True))


def test_every_row_comes_once_per_pass_in_a_new_order(model):
    steps = Steps(model.processor, {"scenes": Scenes(size=32, count=12)}, {"scenes": 4}, seed=0)
    assert len(steps) == 3
    passes = [
        [answer for step in part for answer in flat(steps[step])] for part in ((0, 1, 2), (3, 4, 5))
    ]
    captions = [[tuple(answers) for answers in answered[::5]] for answered in passes]
    assert sorted(captions[0]) == sorted(captions[1])
    assert captions[0] != captions[1]


def test_steps_repeat_exactly_and_differ(model):
    steps = Steps(model.processor, {"scenes": Scenes(size=32)}, {"scenes": 4}, seed=0)
    assert flat(steps[5]) == flat(steps[5])
    assert flat(steps[5]) != flat(steps[6])


def test_noise_levels_spread_over_the_batch(model):
    phase = Steps(model.processor, {"scenes": Scenes(size=32)}, {"scenes": 4}, seed=0)[2][
        "scenes"
    ].phase
    gaps = torch.sort(phase).values.diff()
    torch.testing.assert_close(gaps, torch.full((3,), 0.25, dtype=torch.float64))


def test_words_come_from_all_data_sets():
    data = Data({"a": Scenes(objects=(1,)), "b": Scenes(objects=(2,))}, {"a": 1, "b": 1})
    assert set(data.words) >= {"circle", "left"}
    assert data.words == sorted(data.words)


def test_every_data_set_needs_a_batch_size():
    with pytest.raises(ValueError, match="batch size"):
        Data({"a": Scenes()}, {"b": 1})


def test_steps_can_be_pickled_without_weights(model):
    steps = Steps(model.processor, {"scenes": Scenes(size=32)}, {"scenes": 2}, seed=0)
    first = steps[3]
    data = pickle.dumps(steps)
    again = pickle.loads(data)
    assert len(data) < 50_000
    assert flat(again[3]) == flat(first)
    assert all(map(torch.equal, images(again[3]["scenes"]), images(first["scenes"])))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_batches_of_the_training_process(model, method):
    steps = Steps(model.processor, {"scenes": Scenes(size=32)}, {"scenes": 2}, seed=0)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(3), num_workers=2, multiprocessing_context=method
    )
    for step, found in enumerate(loader):
        assert flat(found) == flat(steps[step])
        assert all(map(torch.equal, images(found["scenes"]), images(steps[step]["scenes"])))
