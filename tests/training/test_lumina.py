"""Training Lumina-DiMOO: the masks of its recipe, compared with the published rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmdlm
from mmdlm.commands.train import run
from mmdlm.data import drawings
from mmdlm.data.collate import batch, collate
from mmdlm.data.form import Form
from mmdlm.data.llava import LLaVA
from mmdlm.objectives.denoising import noisy
from mmdlm.objectives.draw import Draw
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.objectives.schedule import Schedule
from tests.systems.test_lumina_dimoo import picture, published

DRAW = Draw(per="padding", spread="independent", count="floored", whole=5)
OBJECTIVE = Masked("one", "masked", eps=0.0, draw=DRAW, schedule=Schedule("cosine"))
ANSWERS = ["a dog", "on the left of the table", "yes"]
CANVAS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny Lumina-DiMOO and data of both kinds."""
    root = tmp_path_factory.mktemp("run")
    published(root / "model")
    data = root / "data"
    data.mkdir()
    pairs = [(text, picture(i)) for i, text in enumerate(["ab", "cd", "ef"])]
    assert drawings.tokenize(mmdlm.load(root / "model"), pairs, data / "drawings.jsonl") == 3
    rows = []
    for i, answer in enumerate(ANSWERS):
        picture(i).save(data / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (data / "questions.json").write_text(json.dumps(rows))
    return root


def questions(model, root: Path, seed: int) -> Batch:
    """The questions with their answers, </answer> and padding."""
    data = LLaVA(root / "data" / "questions.json", length=CANVAS).connect(model.processor)
    rng = np.random.default_rng(0)
    form = Form(end_of_turn=True)
    examples = [form.of(data.sample(i, rng), model.processor, rng) for i in range(len(data))]
    seeds = torch.arange(len(examples)) + len(examples) * seed
    return batch(model, collate(model.processor, examples, seeds, torch.zeros(3).double()))


def test_the_recipe_trains_two_steps(root, monkeypatch) -> None:
    monkeypatch.chdir(root)
    run(
        [
            "fit",
            *("-c", "train/lumina"),
            "--model.source=model",
            *("--trainer.max_steps=2", "--trainer.accelerator=cpu"),
            *("--trainer.precision=32-true", "--trainer.enable_progress_bar=false"),
            "--trainer.accumulate_grad_batches=1",
        ]
    )
    saved = root / "runs" / "lumina" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    state = checkpoint["state_dict"]
    before = {f"model.{k}": v for k, v in mmdlm.load(root / "model").state_dict().items()}
    moved = {n for n, w in before.items() if n in state and not torch.equal(w, state[n])}
    assert checkpoint["global_step"] == 2
    assert all(weight.isfinite().all() for weight in state.values())
    assert any(name.startswith("model.backbone.") for name in moved)
    assert not any(name.startswith("model.encoders.") for name in moved)


def test_answers_end_their_part_and_padding_follows(root) -> None:
    model = mmdlm.load(root / "model")
    sequence = questions(model, root, 0).sequence
    for row, answer in enumerate(ANSWERS):
        canvas = sequence.tokens[row, -CANVAS:].tolist()
        ids = model.processor.encode(answer).tolist()
        assert canvas == [*ids, 57, *[model.spec.pad_id] * (CANVAS - len(ids) - 1)]


def test_answer_and_padding_are_masked_by_ratios_of_their_own(root) -> None:
    model = mmdlm.load(root / "model")
    sizes = [len(answer) + 1 for answer in ANSWERS]  # with </answer>
    counts = []
    one = questions(model, root, 0)
    for seed in range(300):
        seeds = torch.arange(3) + 3 * seed
        noise = OBJECTIVE.corrupt(Batch(one.sequence, seeds, torch.zeros(3).double()))
        assert not noise.masked[:, :-CANVAS].any()
        canvas, p = noise.masked[:, -CANVAS:], noise.p[:, -CANVAS:]
        row = [(int(canvas[i, :n].sum()), int(canvas[i, n:].sum())) for i, n in enumerate(sizes)]
        for i, n in enumerate(sizes):
            assert p[i, :n].unique().tolist() == pytest.approx([row[i][0] / n])
            assert p[i, n:].unique().tolist() == pytest.approx([row[i][1] / (CANVAS - n)])
        counts.append(row)
    answers, padding = np.array(counts).transpose(2, 1, 0)  # [3 300] each
    assert answers[2].tolist() == [4] * 300  # up to five tokens are masked whole
    assert min(answers.min(), padding.min()) == 1
    # int(n cos(pi r / 2)), at least 1, with r uniform.
    r = (np.arange(10_000) + 0.5) / 10_000
    for found, n in ((answers[1], sizes[1]), (padding[2], CANVAS - sizes[2])):
        want = np.maximum(1, (n * np.cos(math.pi / 2 * r)).astype(int))
        assert found.mean() == pytest.approx(want.mean(), abs=4 * want.std() / math.sqrt(300))
        assert found.max() == want.max()
    assert abs(np.corrcoef(answers[1], padding[1])[0, 1]) < 0.2


def test_the_loss_is_the_plain_mean_of_masked_tokens(root) -> None:
    model = mmdlm.load(root / "model")
    given = questions(model, root, 1)
    noise = OBJECTIVE.corrupt(given)
    with torch.no_grad():
        found = OBJECTIVE.loss(model, given, noise).mean()
        hidden = noisy(model, given.sequence, noise).tokens
        logits = model.logits(hidden, given.sequence.mask)[noise.masked]
    want = F.cross_entropy(logits, given.sequence.tokens[noise.masked])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_whole_needs_a_number_of_masked_tokens() -> None:
    with pytest.raises(ValueError, match="Draw.whole needs a number of masked tokens; set count"):
        Draw(whole=5)
