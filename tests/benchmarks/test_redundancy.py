"""`mmdlm bench redundancy`: the pair of models, equal budgets, what is measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.benchmarks import pair, redundancy
from mmdlm.benchmarks.budgets import ALL, PRUNING, SKIPPING, ways
from mmdlm.benchmarks.redundancy_report import LONG, Measured, Recovered, contrast
from mmdlm.commands.main import main
from mmdlm.decoding.pruning import option


@pytest.fixture(scope="module")
def tiny():
    return mmdlm.load("tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_all_ways_compute_as_many_image_tokens_as_they_say(tiny, budget, monkeypatch):
    from mmdlm.decoding import loop

    sizes, inner = [], loop.forward.run

    def run(state, *given):
        sizes.append(int((state.sequence.is_medium & state.sequence.mask).sum()))
        return inner(state, *given)

    monkeypatch.setattr(loop.forward, "run", run)
    (task, _) = redundancy.tasks(1)
    found = ways(budget, 16, task.steps, 4)
    assert [way.name for way in found] == [*PRUNING, *SKIPPING]
    for way in [ALL, *found]:
        sizes.clear()
        redundancy.answered(tiny, task, way, {})
        layers = 1 - len(getattr(way.method, "layers", ())) / 4
        assert sum(sizes) / (16 * task.steps) * layers == pytest.approx(way.spent)
        assert way is ALL or way.spent == pytest.approx(budget, abs=0.03)
    option.apply(tiny, None)
    late = next(way for way in found if way.name == "late")
    first = next(way for way in found if way.name == "in the first step")
    assert late.method.step[0] > first.method.step[0]
    assert late.method.keep[0] < first.method.keep[0]
    assert len({way.method.layers for way in found if way.name in SKIPPING}) == 3


def test_impossible_budgets_are_named():
    with pytest.raises(ValueError, match="budget is 1.0, with 10 steps"):
        ways(1.0, 16, 10, 4)
    with pytest.raises(ValueError, match="with 3 steps and 4 layers"):
        ways(0.5, 16, 3, 4)


def test_the_pair_has_equal_budgets_and_one_start(tmp_path):
    lines = []
    found = pair.pair(tmp_path, steps=6, scenes=2, note=lines.append)
    assert {name: (m.spec.attention, m.spec.shift) for name, m in found.items()} == {
        "from-scratch": ("full", False),
        "AR-derived": ("full", True),
    }
    last = [line for line in lines if "step 5 of 6" in line or "of 4" in line or "of 2" in line]
    assert [line.partition(":")[0] for line in last] == (
        ["autoregressive"] * 2 + ["from-scratch"] + ["AR-derived"] * 2
    )
    before = mmdlm.load("tiny", device="cpu", dtype="float32")
    for model in found.values():
        tower = zip(model.encoders.parameters(), before.encoders.image.parameters(), strict=False)
        assert all(torch.equal(a, b) for a, b in tower)
        blocks = model.backbone.blocks[0], before.backbone.blocks[0]
        assert not torch.equal(*(block.attn.qkv.weight for block in blocks))
    again: list[str] = []
    same = pair.pair(tmp_path, steps=6, scenes=2, note=again.append)
    assert not again
    for name, model in same.items():
        pairs = zip(model.parameters(), found[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_new_blocks_know_nothing_and_learn(tmp_path):
    model = pair.untrained("full", None, False)
    (long, _) = redundancy.tasks(4)
    words, exact = redundancy.answered(model, long, ALL, {})
    assert words[0] < 0.5
    assert exact[0] == 0
    losses = []
    pair.train(model, pair.MASKED, range(41), 4, 0, losses.append)
    first, last = (float(line.split()[5].rstrip(",")) for line in (losses[0], losses[-1]))
    assert last < 0.5 * first


def test_all_tokens_hold_all_information(tiny):
    (long, _) = redundancy.tasks(6)
    whole, few = redundancy.information(tiny, "bundled", long, [1.0, 0.1])
    assert np.allclose(whole.shares, 1)
    assert np.allclose(whole.gain, 0)
    assert (whole.right[0] > whole.right[2]).all()
    assert few.shares[0].mean() < 0.8
    option.apply(tiny, None)


def test_shares_and_differences_follow_from_counts():
    right = np.zeros((3, 4, 2))
    right[0], right[1], right[2] = 8, 5, 2
    right[1, 3] = 8
    found = Recovered.of("a", 0.5, right, np.full((4, 2), 10), np.arange(2))
    assert found.shares[0].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert found.right[:, 0].tolist() == [0.8, 0.5, 0.2]
    assert found.gain[0] == 0.5
    value = {"late": 0.8, "progressive": 0.6, "before the model": 0.4, "in the first step": 0.2}
    measured = [
        Measured("a", LONG, 0.5, name, 0.5, np.array([each, each + 0.1]), np.zeros(2))
        for name, each in (value | dict.fromkeys(SKIPPING, 0.9)).items()
    ]
    names = ("late or progressive minus early pruning", "skipped layers minus pruning")
    differences = [contrast(measured, "a", LONG, 0.5, name) for name in names]
    assert np.allclose(differences, [[0.4, 0.4], [0.4, 0.4]])


def test_the_command_trains_and_writes_table_json_and_plot(tmp_path, capsys):
    words = ["bench", "redundancy", "--out", str(tmp_path), "--steps", "3", "--scenes", "2"]
    words += ["--count", "4", "--keep", "0.5"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "from-scratch: step 2 of 3" in first
    for name in ("long answers", "short answers", "information left", "differences"):
        assert name in first.replace("image's ", "")
    results = json.loads((tmp_path / "redundancy.json").read_text())
    assert len(results["answers"]) == 3 * 2 * 8
    best = [one for one in results["answers"] if one["model"] == "bundled" and one["budget"] == 1]
    assert all(one["words"][0] > 0.9 for one in best)
    assert len(results["differences"]) == 3 * 2 * 2
    assert Image.open(tmp_path / "redundancy.png").size[0] > 1000


def test_wrong_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        redundancy.bench_redundancy(tmp_path, steps=1)
