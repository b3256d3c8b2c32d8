"""Properties of every preset in configs/objectives."""

from dataclasses import replace

import pytest
import torch

from mmdlm import discover
from mmdlm.layout import Row, Turn
from mmdlm.objectives.objective import Batch
from tests.objectives.recorded import PRESETS, preset
from tests.objectives.test_masked import row, small

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
BLOCKS = {"sdar", "dllm_block", "bd3lm", "diffusion_vl", "fast_dllm_v2"}
SHIFTED = {"dream_cart", "dream_vl", "open_dllm", "fast_dllm_v2", "dparallel_dream"}
# Levels that are spread over the batch of a process depend on it.
ALONE = [name for name in NAMES if name not in ("mdlm", "bd3lm", "diffusion_vl")]
ROWS = [
    row([3, 4, 5], [6, 7, 8, 9, 10, 1, 1]),
    row([9, 3], [8, 4, 1]),
    row([4], [5, 6, 11, 10, 7, 1, 1, 1]),
]


def model_for(name):
    blocks = {"attention": "block_causal", "block_size": 4} if name in BLOCKS else {}
    return small(shift=name in SHIFTED, **blocks)


def batch_of(model, rows, first=0):
    seeds = torch.arange(first, first + len(rows)) + 5
    phase = (torch.arange(first, first + len(rows)).double() * 0.37 + 0.6) % 1
    return Batch(model.arrange(rows), seeds, phase)


def parts(losses):
    """Sum and count of the loss and of the extra losses, [terms 2]."""
    terms = [(losses.sum, losses.count), *((total, count) for total, count, _ in losses.extra)]
    return torch.stack([torch.stack(term) for term in terms])


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_finite(name):
    model = model_for(name)
    losses = preset(name).step(model, batch_of(model, ROWS))
    loss = losses.mean()
    loss.backward()
    assert loss > 0
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters())
    assert all(a.isfinite() and b >= 0 for a, b in losses.logs.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_answers_gives_zero(name):
    model = model_for(name)
    losses = preset(name).step(model, batch_of(model, [Row((torch.tensor([3, 4, 5]),))]))
    loss = losses.mean()
    loss.backward()
    assert loss == 0
    assert all(w.grad is None or not w.grad.any() for w in model.parameters())


@pytest.mark.parametrize("name", ALONE)
def test_sums_and_counts_do_not_depend_on_padding_or_batch_split(name):
    """So neither on accumulation nor on the number of processes, which add them up."""
    model, objective = model_for(name), preset(name)
    whole = parts(objective.step(model, batch_of(model, ROWS)))
    alone = [parts(objective.step(model, batch_of(model, [one], i))) for i, one in enumerate(ROWS)]
    torch.testing.assert_close(whole, sum(alone), rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_neither_masked_nor_scored(name):
    model, objective = model_for(name), preset(name)
    batch = objective.prepare(model, batch_of(model, ROWS)) if name != "dscd" else None
    batch = batch or batch_of(model, ROWS)
    noise = objective.corrupt(batch)
    noise = noise[0] if name == "dscd" else noise
    assert noise.masked.any()
    assert not (noise.hidden & ~batch.sequence.is_answer).any()
    assert not (noise.maskable & ~batch.sequence.is_answer).any()


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_change_the_loss(name):
    model, objective = model_for(name), preset(name)
    whole = parts(objective.step(model, batch_of(model, ROWS)))

    def chunked(one):
        inner = getattr(one, "objective", None)
        return replace(one, chunk=2) if inner is None else replace(one, objective=chunked(inner))

    found = parts(chunked(objective).step(model, batch_of(model, ROWS)))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    found[:, 0].sum().backward()
    assert all(w.grad is not None for w in model.parameters())


def test_presets_use_every_objective_for_masks():
    used = set()
    for name in NAMES:
        one = preset(name)
        while one is not None:
            used.add(type(one).__name__)
            one = getattr(one, "objective", None)
    known = set(discover.paths("mmdlm.objectives"))
    # MaskedCodes is mmada_image for image codes alone, in train/mmada; Given keeps fixed tokens of
    # another objective's rows, in train/lavida_infill; Contrastive is in train/retrieval.
    assert used == known - {"Grounded", "NextToken", "MaskedCodes", "Given", "Contrastive"}


@pytest.mark.parametrize("name", NAMES)
def test_preset_replaces_the_settings_of_another_config(name, tmp_path):
    """`mmdlm fit -c finetune/full -c objectives/NAME` keeps nothing of the first objective."""
    import jsonargparse
    import yaml

    from mmdlm.objectives.objective import Objective

    base = yaml.safe_load((PRESETS.parent / "finetune" / "full.yaml").read_text())["model"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": {"objective": base["objective"]}}))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--model.objective", type=Objective)
    words = ["-c", str(tmp_path / "base.yaml"), "-c", str(PRESETS / f"{name}.yaml")]
    made = parser.instantiate(parser.parse_args(words)).model.objective
    assert made == preset(name)


def test_ends_after_the_first_are_padding_where_asked():
    model, objective = model_for("sdar"), preset("sdar")
    batch = objective.prepare(model, batch_of(model, ROWS))
    shorter = [Row((), (Turn(r.turns[0].prompt, t),)) for r, t in zip(ROWS, cut(ROWS), strict=True)]
    assert batch.sequence.is_answer.sum() == sum(len(turn) for turn in cut(ROWS))
    hidden = model.hidden(batch.sequence)[batch.sequence.mask]
    arranged = model.arrange(shorter)
    torch.testing.assert_close(hidden, model.hidden(arranged)[arranged.mask])


def cut(rows):
    """Answers up to their first end token, which is 1."""
    answers = [one.turns[0].answer for one in rows]
    return [answer[: answer.tolist().index(1) + 1] for answer in answers]
