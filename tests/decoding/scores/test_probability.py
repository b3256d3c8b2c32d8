import pytest
import torch

from mmdlm.decoding.numerics import log_odds
from mmdlm.decoding.scores.probability import Probability


def test_ranks_by_probability(cases, softmax, moment) -> None:
    for logits, masked in cases(0):
        tokens = torch.randint(logits.shape[-1], logits.shape[:2])
        view = moment(logits, masked)
        view._state.log_odds = log_odds(logits, tokens)
        score = Probability().score(view, logits, tokens)
        for row, column, got in zip(logits, tokens, score.sigmoid(), strict=True):
            want = [softmax(z)[t] for z, t in zip(row.tolist(), column.tolist(), strict=True)]
            assert got.tolist() == pytest.approx(want, rel=1e-5)


def test_log_odds_keep_the_order_where_float32_probabilities_round_to_one() -> None:
    margins = torch.tensor([20.0, 30.0, 25.0, 90.0])
    logits = torch.stack([margins, torch.zeros(4), torch.zeros(4)], -1)[None]
    odds = log_odds(logits, torch.zeros(1, 4, dtype=torch.long))
    assert logits.softmax(-1)[..., 0].unique().tolist() == [1.0]
    torch.testing.assert_close(odds[0], margins - torch.tensor(2.0).log())


def test_log_odds_of_the_only_possible_token_are_infinite() -> None:
    logits = torch.tensor([[[3.0, -torch.inf, -torch.inf]]])
    assert log_odds(logits, torch.zeros(1, 1, dtype=torch.long)).item() == torch.inf


def test_log_odds_of_a_large_vocabulary_are_computed_in_pieces() -> None:
    logits = 5 * torch.randn(2, 3, 200_000, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(200_000, (2, 3), generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(log_odds(logits, tokens).double(), p.logit(), atol=1e-4, rtol=1e-5)
    assert log_odds(logits[:, :0], tokens[:, :0]).shape == (2, 0)
