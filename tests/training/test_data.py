"""Batches follow from seed and step alone."""

import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.digits import Digits
from mmdlm.data.scenes import Scenes
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer
from mmdlm.training import data as module
from mmdlm.training.data import Data, Steps, useful_workers


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


def attached(data, model, step=0):
    """A data module whose trainer is at a step of four."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=model),
        global_rank=0,
        world_size=1,
        num_devices=1,
        global_step=step,
        max_steps=4,
        max_epochs=-1,
        limit_train_batches=1.0,
        callbacks=[],
        accumulate_grad_batches=1,
    )
    return data


def data_of(**settings):
    train = {"scenes": Scenes(size=32)}
    return Data(
        train, {"scenes": 2}, val={"scenes": Scenes(size=32, seed=1)}, val_rows=2, **settings
    )


def same(one, two):
    one, two = one["scenes"], two["scenes"]
    return (
        flat({"scenes": one}) == flat({"scenes": two})
        and all(map(torch.equal, images(one), images(two)))
        and torch.equal(one.seeds, two.seeds)
        and torch.equal(one.phase, two.phase)
        and one.groups == two.groups
    )


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_workers_give_the_batches_of_the_training_process(model, method):
    alone = attached(data_of(), model, step=1)
    want = [list(alone.train_dataloader()), list(alone.val_dataloader())]
    shared = attached(data_of(workers=2, start_method=method), model, step=1)
    found = [list(shared.train_dataloader()), list(shared.val_dataloader())]
    assert [len(each) for each in want] == [len(each) for each in found] == [3, 1]
    for one, two in zip(sum(want, []), sum(found, []), strict=True):
        assert same(one, two)
    assert not same(want[0][0], want[0][1])


def test_settings_without_effect_are_errors():
    with pytest.raises(ValueError, match="start_method='spawn' has no effect without workers"):
        data_of(start_method="spawn", workers=0)
    with pytest.raises(ValueError, match="val_rows is 0"):
        Data({"a": Scenes()}, {"a": 1}, val_rows=0)


def test_a_run_without_an_end_is_an_error(model):
    data = attached(data_of(), model)
    data.trainer.max_steps, data.trainer.max_epochs = -1, -1
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        data.train_dataloader()


def test_words_of_test_data_are_in_the_vocabulary(model):
    data = Data({"a": Scenes(objects=(1,))}, {"a": 1}, test={"b": Digits(split="held_out")})
    assert set(Digits().vocabulary()) <= set(data.words)
    data = attached(data_of(), model)
    assert len(data.test_dataloader()) == len(data.val_dataloader()) > 0


class Slow(Scenes):
    """Scenes that take their time."""

    def sample(self, index, rng):
        time.sleep(0.05)
        return super().sample(index, rng)


def test_workers_are_chosen_by_the_cost_of_the_first_batches(model):
    steps = Steps(model.processor, {"a": Slow(size=32)}, {"a": 2}, seed=0)
    assert useful_workers(steps, 10_000, idle=3) == 3
    assert useful_workers(steps, 10_000, idle=99) == module.MOST_WORKERS
    assert useful_workers(steps, 10, idle=3) == 0  # over before workers have started
    assert useful_workers(steps, 10_000, idle=0) == 0
    steps.datasets["a"].answer = lambda: None  # cannot be pickled
    assert useful_workers(steps, 10_000, idle=3) == 0


def test_chosen_workers_give_the_batches_of_the_training_process(model, monkeypatch):
    alone = list(attached(data_of(workers=0), model).train_dataloader())
    monkeypatch.setattr(module, "useful_workers", lambda *_: 2)
    loader = attached(data_of(), model).train_dataloader()
    assert loader.num_workers == 2
    assert all(map(same, alone, loader))


def test_workers_need_few_open_files(model):
    resource = pytest.importorskip("resource")
    data = attached(data_of(workers=2), model)
    data.batch_size["scenes"] = 32  # hundreds of tensors
    data.trainer.max_steps = 12
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, limits[1]))
    try:
        assert sum(1 for _ in data.train_dataloader()) == 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
