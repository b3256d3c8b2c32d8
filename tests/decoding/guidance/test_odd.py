import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.odd import ODD, ascent
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
CASES = json.loads(GOLDEN.read_text())["methods"]["odd_update"]["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_update_is_that_of_odd(case: dict, moment) -> None:
    given, logits = case["params"], torch.tensor(case["logits"])
    masked = torch.zeros(logits.shape[:2], dtype=torch.bool)
    for row, at in zip(masked, case["masked"], strict=True):
        row[at] = True
    view = moment(logits, masked)
    tokens = torch.where(masked, view.model.spec.mask_id, torch.tensor(case["tokens"]))
    view.tokens[:, 1:] = tokens
    odd = ODD(given["alpha"], given["quality_scale"], protected=given["protected"])
    got = odd.guide(view, logits.clone())
    torch.testing.assert_close(got, torch.tensor(case["output"]), atol=1e-4, rtol=0)


def objective(logits, masks, known, tokens, basis) -> torch.Tensor:
    """w (v . d) of one row by torch's own differentiable functions."""
    p = logits.softmax(-1)
    rows = [p[i] for i in range(len(p)) if masks[i]]
    ones = torch.eye(p.shape[-1], dtype=p.dtype)
    rows += [ones[tokens[i]] for i in range(len(p)) if known[i]]
    v = torch.stack(rows).amax(0)
    v = v / v.norm()
    d = v.detach()
    for other in basis:
        d = d - (d @ other) * other
    d = d / d.norm()
    w = sum(p[i].max() for i in range(len(p)) if masks[i]) / masks.sum().clamp(min=1)
    return w * (v @ d)


def test_the_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    for n in range(30):
        reads, vocab = 2 + n % 5, 4 + n % 6
        basis: list[torch.Tensor] = []
        for _ in range(3):
            logits = 3 * torch.randn(reads, vocab, generator=generator, dtype=torch.float64)
            kind = torch.randint(0, 3, (reads,), generator=generator)
            masks, known = kind != 1, kind == 1
            masks[0], known[0] = True, False
            tokens = torch.randint(0, vocab, (reads,), generator=generator)
            logits.requires_grad_(True)
            value = objective(logits, masks, known, tokens, basis)
            want = torch.autograd.grad(value, logits)[0]
            got, d = ascent(logits.detach(), masks, known, tokens, basis)
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
            assert all(abs(d @ other) < 1e-9 for other in basis)
            basis.append(d)


def test_a_row_equal_to_another_has_no_direction() -> None:
    logits, everything = torch.randn(3, 5), torch.ones(3, dtype=torch.bool)
    row = (logits, everything, ~everything, torch.zeros(3, dtype=torch.long))
    _, first = ascent(*row, [])
    away, second = ascent(*row, [first])
    assert not second.any()
    assert not away.any()


def test_repeated_positions_have_no_effect(moment) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, 4, 6, generator=generator)
    masked = torch.tensor([[True, True, False, False], [True, True, True, True]])
    padded, odd = moment(logits, masked), ODD(protected=())
    padded._state.read = None
    padded._state.real = torch.tensor([[True, True, True, True], [True, True, False, False]])
    padded._state.at = torch.tensor([[1, 2, 3, 4], [1, 2, 2, 2]])
    got = odd.guide(padded, logits.clone())
    basis = [ascent(logits[0], masked[0], ~masked[0], torch.zeros(4).long(), [])[1]]
    two = torch.ones(2, dtype=torch.bool)
    away, _ = ascent(logits[1, :2], two, ~two, torch.zeros(2).long(), basis)
    want = logits[1, :2] + 16.0 / away.norm(dim=-1).max() * away
    torch.testing.assert_close(got[1, :2], want)


def same(count: int) -> torch.Tensor:
    return torch.tensor([[5, 9, 7, 30]]).expand(count, -1)


def test_one_sample_is_unchanged(toy) -> None:
    for more in ([], [Blocks(4), TopK(4)]):
        got, plain = (decode(toy(), same(1), 8, [*more, *odd]) for odd in ([ODD()], []))
        assert got.tokens.equal(plain.tokens)
        assert got.history.step.equal(plain.history.step)


def test_alpha_0_changes_nothing(toy, seeds) -> None:
    got, plain = (
        decode(toy(), same(4), 8, [*odd, Gumbel(1.0)], generator=seeds(1, 2, 3, 4))
        for odd in ([ODD(alpha=0)], [])
    )
    assert got.tokens.equal(plain.tokens)


def test_the_first_sample_is_unchanged_and_the_others_are_not(toy, seeds) -> None:
    chosen = [Gumbel(0.5), TopK(4)]
    plain, moved = (
        decode(toy(), same(6), 16, [*chosen, *odd], generator=seeds(*range(6)))
        for odd in ([], [ODD()])
    )
    equal = (moved.tokens == plain.tokens).all(1).tolist()
    assert equal == [True] + [False] * 5


def test_a_small_change_raises_the_objective_of_every_row(moment) -> None:
    logits = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    masks = torch.ones(4, 5, dtype=torch.bool)
    pushed = ODD(alpha=1e-3, protected=()).guide(moment(logits, masks), logits.clone())
    basis: list[torch.Tensor] = []
    for i in range(4):
        row = (masks[i], ~masks[i], torch.zeros(5, dtype=torch.long), basis)
        before, after = (objective(z[i], *row) for z in (logits, pushed))
        assert after == before if i == 0 else after > before
        basis.append(ascent(logits[i], *row)[1])


def test_end_tokens_are_left_alone(moment) -> None:
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    view = moment(logits, torch.ones(3, 4, dtype=torch.bool))
    got = ODD().guide(view, logits.clone())
    assert got[..., view.model.spec.eos_id].equal(logits[..., view.model.spec.eos_id])
    assert (got[1:, :, 1:] != logits[1:, :, 1:]).all()


def test_the_change_shrinks_with_the_steps_of_each_row(moment) -> None:
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    view, lengths = moment(logits, torch.ones(3, 4, dtype=torch.bool)), []
    for step in range(5):
        view._state.step = torch.tensor([9, step, step + 1])
        change = ODD(8.0, steps=4).guide(view, logits.clone()) - logits
        lengths.append(change.norm(dim=-1).amax(1))
    want = [[0.0, 8.0, 6.0], [0.0, 6.0, 4.0], [0.0, 4.0, 2.0], [0.0, 2.0, 0.0], [0.0] * 3]
    torch.testing.assert_close(torch.stack(lengths), torch.tensor(want))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": -1.0}, "ODD.alpha is -1.0, expected at least 0"),
        ({"quality": float("nan")}, "ODD.quality is nan, expected at least 0"),
        ({"steps": 0}, "ODD.steps is 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_odd(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ODD(**given)
