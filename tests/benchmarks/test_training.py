"""`mmdlm bench train`: the same conversations in random batches, in buckets and packed."""

import json

import numpy as np
import pytest
import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.benchmarks import training
from mmdlm.benchmarks.training import Drawn, Pass, bench_train, race, tables, ways
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer
from mmdlm.training.buckets import lengths


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words([f"w{i}" for i in range(40)])
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    return MultimodalDLM(Spec("mmdlm", config, 2, 1, 0), tokenizer=tokenizer)


def test_drawn_lengths_are_log_normal(model):
    sizes = Drawn(model, 4000).sizes
    for column, (middle, sigma) in enumerate((training.PROMPT, training.ANSWER)):
        assert abs(np.median(sizes[:, column]) / middle - 1) < 0.1
        assert abs(np.log(sizes[:, column]).std() / sigma - 1) < 0.1


def test_every_way_trains_on_the_same_conversations():
    sizes = np.random.default_rng(0).integers(10, 500, 400)
    plain, alike, packed = ways(sizes, 4, 10, None, 0)
    assert sorted(plain.batches.flat) == sorted(alike.batches.flat) == sorted(packed.batches.flat)
    assert len(set(plain.batches.flat)) == 40
    assert np.ptp(sizes[alike.batches], 1).mean() < 0.1 * np.ptp(sizes[plain.batches], 1).mean()
    assert packed.pack == sizes[plain.batches].max()
    with pytest.raises(ValueError, match="12 rows make 3 batches of 4"):
        ways(sizes[:12], 4, 10, None, 0)


def test_less_is_padding_and_the_loss_of_packed_rows_is_the_same(model, monkeypatch):
    monkeypatch.setattr(training, "LONGEST", 200)
    dataset = Drawn(model, 60)
    chosen = ways(lengths(dataset, model), 4, 5, 400, 0)
    passes = race(model, dataset, chosen, 2, None)
    assert [p.way for p in passes] == ["plain", "buckets", "packed 400"] * 2
    plain, alike, packed = passes[:3]
    assert plain.tokens == alike.tokens == packed.tokens
    assert alike.computed < plain.computed > packed.computed
    assert all(part >= 0 for p in passes for part in p.seconds.values())
    assert packed.loss == pytest.approx(plain.loss, rel=2e-3)  # the weights change a little
    speeds, parts = tables(passes)
    assert speeds.row_count == parts.row_count == 3


def test_the_command_measures_the_users_data(model, monkeypatch, tmp_path):
    rows = [{"question": "w1 " * n, "answer": "w2 " * (n % 5 + 1)} for n in range(1, 25)]
    file, out = tmp_path / "chat.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(training, "load", lambda *_, **__: model)
    assert bench_train(data=file, batch_size=2, steps=3, rounds=1, tail=2, out=out) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["way"].split()[0] for each in found] == ["plain", "buckets", "packed"]
    assert set(found[0]) > set(Pass.__annotations__)
    with pytest.raises(ValueError, match="tail=2 has no effect without data"):
        bench_train(tail=2)
    with pytest.raises(ValueError, match="steps is 0"):
        bench_train(steps=0)
