"""Batches of rows of like length, and conversations packed into rows."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.mlp import MLP
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.commands.train import run
from mmdlm.data.chat import Chat
from mmdlm.data.collate import batch
from mmdlm.data.scenes import Scenes
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.text import Tokenizer
from mmdlm.training.buckets import computed, grouped, lengths, saved
from mmdlm.training.data import Data

WORDS = ["red", "green", "blue", "what", "?"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words(WORDS)
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    return MultimodalDLM(Spec("mmdlm", config, 2, 1, 0), tokenizer=tokenizer)


@pytest.fixture
def chat(tmp_path):
    """130 rows with prompts and answers of many lengths."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(130):
        prompt, answer = (
            " ".join(rng.choice(WORDS[:3], size=int(n))) for n in rng.lognormal(2, 0.8, 2) + 1
        )
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(lines))
    return file


def data_of(chat, model, world=1, **settings):
    data = Data({"chat": Chat(chat)}, 4, seed=3, **settings)
    data.train["chat"].connect(model.processor)
    data.measure(model, world)
    return data


def sizes(steps, count, start=0):
    """Tokens of every row of some batches."""
    return [[row.length for row in steps[i]["chat"].packed.rows] for i in range(start, count)]


def share(batches):
    """Share of computed tokens that are not padding."""
    return sum(map(sum, batches)) / sum(len(rows) * max(rows) for rows in batches)


def test_batches_have_rows_of_like_length_and_each_row_once_per_pass(chat, model):
    apart = sizes(data_of(chat, model, buckets=False, tail=1).steps(model.processor), 65)
    alike = sizes(data_of(chat, model, tail=1).steps(model.processor), 65)
    assert share(alike) > 0.8 > 0.65 > share(apart)
    first, second = ([n for rows in part for n in rows] for part in (alike[:32], alike[33:]))
    every = sorted(n for rows in apart[:32] for n in rows)
    assert abs(sum(first) - sum(every)) < 0.05 * sum(every)
    order = data_of(chat, model, tail=1).steps(model.processor)._order("chat", 1)
    assert sorted(order) == list(range(130))
    assert alike[:32] != alike[33:]
    means = [np.mean(rows) for rows in alike[:32]]
    assert abs(np.corrcoef(means, np.arange(32))[0, 1]) < 0.5  # the lengths are in no order


def test_processes_get_the_rows_of_one_larger_batch(chat, model):
    data = data_of(chat, model, world=2, tail=2)
    parts = [sizes(data.steps(model.processor, rank, 2), 16) for rank in (0, 1)]
    data.batch_size["chat"] = 8
    one = sizes(data.steps(model.processor), 16)
    woven = [
        [n for pair in zip(*rows, strict=True) for n in pair] for rows in zip(*parts, strict=True)
    ]
    assert woven == one
    random = data_of(chat, model, tail=2, buckets=False)
    random.batch_size["chat"] = 8
    assert share(woven) > 1.2 * share(sizes(random.steps(model.processor), 16))


def test_the_order_follows_from_seed_and_step(chat, model):
    whole = sizes(data_of(chat, model, tail=3).steps(model.processor), 50)
    resumed = sizes(data_of(chat, model, tail=3).steps(model.processor), 50, start=40)
    assert resumed == whole[40:]


def test_lengths_are_those_of_the_rows(chat, model):
    for tail in (None, 1):
        data = data_of(chat, model, tail=tail)
        found = lengths(data.train["chat"], model, tail)
        steps = data.steps(model.processor)
        steps.shuffle = False
        rows = [n for each in sizes(steps, 32) for n in each]
        assert np.corrcoef(found[:128], rows)[0, 1] > 0.98
        assert abs(found[:128].mean() / np.mean(rows) - 1) < 0.1


def test_buckets_are_used_where_they_save_something(chat, model, tmp_path):
    assert "chat" in data_of(chat, model, tail=1).lengths
    assert not data_of(chat, model, tail=1, pack=100).lengths
    assert not data_of(chat, model, tail=1, buckets=False).lengths
    equal = tmp_path / "equal.jsonl"
    equal.write_text(chat.read_text().splitlines()[0] + "\n")
    equal.write_text(equal.read_text() * 30)
    assert not data_of(equal, model).lengths
    assert data_of(equal, model, buckets=True).lengths
    with pytest.raises(ValueError, match="no data set tells the lengths"):
        Data({"scenes": Scenes()}, 2, buckets=True).measure(model)
    for key in ("pack", "tail"):
        with pytest.raises(ValueError, match=f"{key} is 0"):
            Data({"scenes": Scenes()}, 2, **{key: 0})


@pytest.mark.parametrize("first", [0, 3, 7])
@pytest.mark.parametrize("rows", [5, 40, 333])
def test_a_pass_keeps_its_rows(first, rows):
    rng = np.random.default_rng(1)
    size, first = 8, min(first, rows)
    tokens, order = rng.integers(1, 100, rows), rng.permutation(rows)
    found = grouped(order, tokens, size, first, rng)
    assert sorted(found) == list(range(rows))
    assert (found[:first] == order[:first]).all()
    whole = (rows - first) // size * size
    assert (found[first + whole :] == order[first + whole :]).all()
    if rows == 333:
        body = slice(first, first + whole)
        assert computed(found[body], tokens, size) < 0.7 * computed(order[body], tokens, size)
        assert 0.3 < saved(tokens, size) < 0.6


def test_answers_are_followed_by_few_end_tokens(chat, model):
    data = data_of(chat, model, tail=3)
    steps = data.steps(model.processor)
    rows = [row.turns[0].answer for i in range(32) for row in steps[i]["chat"].packed.rows]
    ends = [int((answer == model.spec.eos_id).sum()) for answer in rows]
    assert set(ends) == {1, 2, 3}
    assert len(set(map(len, rows))) > 10
    assert max(map(len, rows)) <= data.train["chat"].length


def test_packed_batches_have_the_loss_of_unpacked_ones(chat, model):
    parts = [
        data_of(chat, model, tail=2, buckets=False, pack=n).steps(model.processor)[5]["chat"]
        for n in (None, 64)
    ]
    apart, packed = (batch(model, part) for part in parts)
    assert len(packed.sequence.tokens) < len(apart.sequence.tokens) == 4
    one, two = (Masked().step(model, each).mean() for each in (apart, packed))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_ends_with_the_same_bits(chat, config, tmp_path):
    text = config.read_text()
    text = text[: text.index("data:\n")]
    config.write_text(
        f"""{text}
data:
  train: {{chat: {{class_path: mmdlm.data.chat.Chat, init_args: {{path: {chat}}}}}}}
  batch_size: 4
  tail: 2
  pack: 40
  buckets: true
"""
    )
    whole = tmp_path / "whole"
    options = ["fit", "-c", str(config), "--model.schedule.decay", "0"]
    run([*options, "--trainer.callbacks.dirpath", str(whole)])
    run([*options, "--trainer.max_steps", "3"])
    run([*options, "--ckpt_path", "last"])
    one, two = (torch.load(p / "last.ckpt", weights_only=True) for p in (whole, tmp_path / "ckpt"))
    assert one["global_step"] == two["global_step"] == 6
    state = two["state_dict"]
    assert all(torch.equal(weight, state[name]) for name, weight in one["state_dict"].items())


def test_workers_get_buckets_and_packing(chat, model):
    steps = data_of(chat, model, tail=2, pack=40, buckets=True).steps(model.processor)
    there = pickle.loads(pickle.dumps(steps))
    for step in (0, 33):
        one, two = steps[step]["chat"], there[step].copied()["chat"]
        assert one.row_tokens == two.row_tokens == 40
        pairs = zip(one.packed.rows, two.packed.rows, strict=True)
        assert all(torch.equal(a.turns[0].answer, b.turns[0].answer) for a, b in pairs)


def test_media_count_as_many_tokens_as_the_first_one(tmp_path):
    scenes = Scenes(size=32)
    tokenizer = Tokenizer.from_words([*scenes.vocabulary(), *WORDS])
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    spec = Spec("mmdlm", config, 2, 1, 0, attention="cascade")
    vit = ViT(size=32, patch=8, dim=16, depth=1, heads=2)
    model = MultimodalDLM(spec, {"image": vit}, {"image": MLP(16, 16)}, tokenizer).train()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [{"images": ["a.png"] * n, "question": "what ?", "answer": "red"} for n in (0, 1, 2)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = Chat(file).connect(model.processor)
    found = lengths(dataset, model)
    packed = model.processor.pack([dataset.sample(i, np.random.default_rng(0)) for i in range(3)])
    assert found.tolist() == model.embed(packed.rows).mask.sum(1).tolist()
    assert all(module.training for module in model.modules())
