import pytest
import torch

from mmdlm.decoding.commits.factor import Factor


def oracle(confidences: list[float], factor: float) -> list[int]:
    """get_transfer_index_dynamic of Fast-dLLM; indices into `confidences`."""
    n = len(confidences)
    order = sorted(range(n), key=lambda i: (-confidences[i], i))
    limits = [1 - factor / (i + 2) for i in range(n)]
    limits[0] = -1
    top = 0
    for top in range(n):
        if confidences[order[top]] < limits[top]:
            break
    if top in (0, n - 1):
        top += 1
    return sorted(order[:top])


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_commits_as_the_reference(factor: float, cases, softmax, moment) -> None:
    for logits, masked in cases(7):
        taken = Factor(factor).select(moment(logits, masked)) & masked
        for i, row in enumerate(logits.tolist()):
            at = [j for j in range(len(row)) if masked[i, j]]
            if not at:
                continue
            probability = [max(softmax(row[j])) for j in at]
            want = [at[j] for j in oracle(probability, factor)]
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_a_failure_of_the_last_rank_is_ignored(moment) -> None:
    def taken(*logits: float) -> list[bool]:
        table = torch.stack([torch.tensor(logits), torch.zeros(len(logits))], -1)[None]
        return Factor(1.0).select(moment(table, torch.ones(1, len(logits)).bool()))[0].tolist()

    # Limits are none, 2/3, 3/4 of probability.
    assert taken(9.0, 8.0, 0.1) == [True, True, True]
    assert taken(9.0, 0.2, 0.1) == [True, False, False]


def test_factor_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="Factor.factor is -1, expected at least 0"):
        Factor(-1)
