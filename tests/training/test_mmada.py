"""Training MMaDA: the three losses of its recipe, and the images it learns to draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmdlm
from mmdlm.commands.train import run
from mmdlm.data import drawings
from mmdlm.data.collate import batch, collate
from mmdlm.data.drawings import Drawings
from mmdlm.objectives.denoising import noisy
from mmdlm.objectives.masked_codes import MaskedCodes
from tests.systems.test_mmada import picture, published


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny MMaDA and data of all three kinds."""
    root = tmp_path_factory.mktemp("run")
    published(root / "model")
    data = root / "data"
    data.mkdir()
    pairs = [(text, picture(i)) for i, text in enumerate(["ab", "cd", "ef", "gh"])]
    assert drawings.tokenize(mmdlm.load(root / "model"), pairs, data / "drawings.jsonl") == 4
    rows = [{"question": "what is it", "answer": "a cat"}] * 3
    (data / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        picture(i).save(data / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a dog"}]
    table = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(3)]
    (data / "questions.json").write_text(json.dumps(table))
    return root


def batch_of(model, root: Path, drop: float = 0.0, count: int = 4):
    data = Drawings(root / "data" / "drawings.jsonl", drop).connect(model.processor)
    examples = [data.sample(i, np.random.default_rng(i)) for i in range(count)]
    return batch(
        model, collate(model.processor, examples, torch.arange(count), torch.rand(count).double())
    )


def test_the_recipe_trains_two_steps(root, monkeypatch) -> None:
    monkeypatch.chdir(root)
    sizes = {"images": 2, "texts": 1, "questions": 2}
    run(
        [
            "fit",
            *("-c", "train/mmada"),
            "--model.source=model",
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.enable_progress_bar=false",
            "--model.schedule.warmup=1",
            f"--data.batch_size={sizes}",
        ]
    )
    saved = root / "runs" / "mmada" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    before = {f"model.{k}": v for k, v in mmdlm.load(root / "model").state_dict().items()}
    moved = {n for n, w in before.items() if n in state and not torch.equal(w, state[n])}
    assert all(weight.isfinite().all() for weight in state.values())
    assert any(name.startswith("model.backbone.") for name in moved)
    assert not any(name.startswith("model.encoders.") for name in moved)


def test_only_image_codes_are_masked_and_the_loss_is_their_mean(root) -> None:
    model, objective = mmdlm.load(root / "model"), MaskedCodes()
    given = objective.prepare(model, batch_of(model, root))
    assert given.sequence.tokens[:, -18].tolist() == [52] * 4  # <|soi|>, then 16 codes, <|eoi|>
    assert given.sequence.tokens[:, -1].tolist() == [53] * 4
    noise = objective.corrupt(given)
    is_code = given.sequence.tokens >= 64
    assert torch.equal(noise.maskable, is_code)
    assert bool((noise.masked & ~is_code).any()) is False
    assert bool((noise.masked.sum(1) >= 1).all())
    losses = objective.step(model, batch_of(model, root))
    hidden = noisy(model, given.sequence, noise).tokens
    logits = model.logits(hidden, given.sequence.mask)
    want = F.cross_entropy(logits[noise.masked], given.sequence.tokens[noise.masked])
    torch.testing.assert_close(losses.mean(), want, rtol=1e-5, atol=1e-5)


def test_the_number_of_masked_codes_follows_the_cosine(root) -> None:
    model, objective = mmdlm.load(root / "model"), MaskedCodes()
    one = objective.prepare(model, batch_of(model, root, count=1))
    counts = []
    for seed in range(400):
        seeds = torch.tensor([seed])
        noise = objective.corrupt(type(one)(one.sequence, seeds, torch.zeros(1).double()))
        counts.append(int(noise.masked.sum()))
    assert min(counts) >= 1
    # The mean of cos(pi u / 2) over u is 2 / pi; the standard error of 400 draws is 0.25 codes.
    assert np.mean(counts) == pytest.approx(16 * 2 / np.pi, abs=0.9)


def test_texts_are_left_out_as_often_as_asked(root) -> None:
    model = mmdlm.load(root / "model")
    data = Drawings(root / "data" / "drawings.jsonl", 0.3).connect(model.processor)
    packed = model.processor.pack([data.sample(0, np.random.default_rng(i)) for i in range(300)])
    lengths = [sum(map(len, row.turns[0].parts)) for row in packed.rows]
    assert set(lengths) == {3, 5}  # <|t2i|>, bos, (two letters,) eos
    assert lengths.count(3) / 300 == pytest.approx(0.3, abs=0.1)


def test_codes_learned_by_heart_are_drawn(root) -> None:
    torch.manual_seed(0)
    model = mmdlm.load(root / "model")
    objective, data = MaskedCodes(), batch_of(model, root)
    weights = [w for n, w in model.named_parameters() if n.startswith("backbone.")]
    optimizer = torch.optim.AdamW(weights, 3e-3)
    for step in range(300):
        seeds = torch.arange(4) + 100 * step
        loss = objective.step(model, type(data)(data.sequence, seeds, data.phase)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = [json.loads(x) for x in (root / "data" / "drawings.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    drawn = mmdlm.draw(model, texts, seed=0, guidance=0.0, steps=16, details=True)
    right = [
        float((one.codes == torch.tensor(row["codes"])).float().mean())
        for one, row in zip(drawn, rows, strict=True)
    ]
    assert min(right) > 0.9


def test_files_of_another_form_are_refused(root, tmp_path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a", "codes": [1, 2]}\n')
    with pytest.raises(ValueError, match="line 1: expected"):
        Drawings(wrong)
    wrong.write_text('{"text": "a", "codes": [[99]]}\n')
    model = mmdlm.load(root / "model")
    with pytest.raises(ValueError, match="code 99, but the model only 16"):
        Drawings(wrong).connect(model.processor)
    with pytest.raises(FileNotFoundError, match="tokenize"):
        Drawings(tmp_path / "none.jsonl")
    tiny = mmdlm.load("tiny")
    with pytest.raises(ValueError, match="does not draw"):
        Drawings(root / "data" / "drawings.jsonl").connect(tiny.processor)
    with pytest.raises(ValueError, match="models that draw images"):
        MaskedCodes().prepare(tiny, batch_of(model, root))
