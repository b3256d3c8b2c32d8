import pytest
import torch

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.numerics import rank


def oracle(confidence: list[float], is_open: list[bool], masks: int, steps: int, now: int) -> list:
    """The quota of get_num_transfer_tokens, and everything in the last step."""
    quota = masks // steps + (1 if now < masks % steps else 0)
    if now >= steps - 1:
        quota = len(confidence)
    places = sorted((-c, i) for i, (c, o) in enumerate(zip(confidence, is_open, strict=True)) if o)
    return sorted(i for _, i in places[:quota])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_commits_its_quota(steps: int, cases, moment) -> None:
    for n, (logits, masked) in enumerate(cases(3)):
        now, more = n % 4, n % 3
        masks = masked.sum(1) + more
        view = moment(logits, masked, block_step=now, block_masks=masks)
        taken = TopK(steps).select(view) & masked
        for i in range(len(masked)):
            want = oracle(
                view.confidence[i].tolist(), masked[i].tolist(), int(masks[i]), steps, now
            )
            assert taken[i].nonzero()[:, 0].tolist() == want


def test_one_per_step_without_a_number_of_steps(cases, moment) -> None:
    for logits, masked in cases(4):
        view = moment(logits, masked)
        taken = TopK().select(view) & masked
        assert taken.sum(1).tolist() == masked.any(1).long().tolist()


def test_rank_gives_ties_to_the_lower_position() -> None:
    assert rank(torch.tensor([[1.0, 3.0, 1.0, 3.0, -torch.inf]])).tolist() == [[2, 0, 3, 1, 4]]


def test_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="TopK.steps is 0, expected at least 1"):
        TopK(steps=0)
