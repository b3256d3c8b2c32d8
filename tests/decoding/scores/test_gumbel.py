import pytest
import torch

from mmdlm.decoding.decode import decode
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.state import Streams
from mmdlm.decoding.view import View


def draws(seed: int) -> list[tuple[Streams, int]]:
    """The random stream of a single row."""
    return [(Streams(torch.Generator().manual_seed(seed), 1, torch.device("cpu")), 0)]


def test_is_the_formula_of_llada(cases, moment, monkeypatch) -> None:
    for logits, masked in cases(9):
        view = moment(logits, masked)
        u = torch.rand(*logits.shape, dtype=torch.float64)
        monkeypatch.setattr(View, "uniform", lambda _, *size, dtype, u=u: u.to(dtype))
        want = logits.double().exp() / (-u.log()) ** 0.7
        assert Gumbel(0.7).pick(view, logits).equal(want.argmax(-1))


def test_samples_from_the_softmax(moment) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(1, 20_000, 4)
    view = moment(logits, torch.ones(1, 20_000).bool())
    view._state.draws = draws(0)
    for temperature in (0.5, 2.0):
        picks = Gumbel(temperature).pick(view, logits)[0]
        share = picks.bincount(minlength=4) / len(picks)
        want = (logits[0, 0] / temperature).softmax(-1)
        torch.testing.assert_close(share, want, atol=0.015, rtol=0)


def test_temperature_zero_is_greedy_and_draws_nothing(toy) -> None:
    prompt = torch.tensor([[3, 4, 5]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    cold = decode(toy(), prompt, 6, [Gumbel(0.0)], generator=generator)
    assert cold.tokens.equal(decode(toy(), prompt, 6).tokens)
    assert generator.get_state().equal(before)


def test_never_picks_an_impossible_token(moment) -> None:
    logits = torch.zeros(1, 4000, 3)
    logits[..., 1] = -torch.inf
    view = moment(logits, torch.ones(1, 4000).bool())
    view._state.draws = draws(0)
    assert 1 not in Gumbel(5.0).pick(view, logits)


@pytest.mark.parametrize("temperature", [-1, float("inf"), float("nan")])
def test_temperature_is_finite_and_not_negative(temperature: float) -> None:
    with pytest.raises(
        ValueError, match=f"Gumbel.temperature is {temperature}, expected at least 0"
    ):
        Gumbel(temperature)
