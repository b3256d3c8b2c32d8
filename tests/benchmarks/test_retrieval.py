"""Recall of retrieval, and the recipe that trains for it."""

import re

import numpy as np
import pytest
import torch

import mmdlm
from mmdlm.benchmarks.retrieval import bench_retrieval, compare, pairs, recall
from mmdlm.commands.train import run
from mmdlm.data.scenes import Scenes
from mmdlm.messages import Example, Slot, assistant, user


def test_recall_counts_rows_whose_own_column_is_among_the_best():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.9, 0.8, 0.7]])
    assert recall(scores, 1) == pytest.approx(1 / 3)
    assert recall(scores, 2) == pytest.approx(2 / 3)
    assert recall(scores, 3) == 1
    assert recall(torch.zeros(4, 4), 1) == 0  # vectors that are all alike find nothing


def test_repeated_answers_count_once():
    examples = [
        Example((user(question), assistant(Slot(value=answer))))
        for question, answer in (("a", "red"), ("b", "blue"), ("c", "red"))
    ]
    prompts, answers = pairs(examples)
    assert answers == ["red", "blue"]
    assert len(prompts) == 2


def test_a_trained_model_finds_more_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = [Scenes(questions=0, seed=9).sample(i, np.random.default_rng(i)) for i in range(12)]
    before = compare(mmdlm.load("tiny"), examples)
    options = ["--trainer.max_steps=12", "--trainer.accelerator=cpu", "--data.batch_size=12"]
    run(["fit", "-c", "train/retrieval", *options, "--trainer.enable_progress_bar=false"])
    folder = tmp_path / "runs" / "retrieval" / "version_0" / "model"
    after = compare(mmdlm.load(folder), examples)
    assert sum(after.values()) > sum(before.values())
    capsys.readouterr()
    assert bench_retrieval(str(folder), count=6, masks=2) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"recall@\d+ +│ +\d+\.\d %", out)) == 6
