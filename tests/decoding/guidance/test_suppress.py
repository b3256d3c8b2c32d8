import pytest
import torch

from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.suppress import Suppress

EOS = 1


def answer(model, *strategies, **more) -> set[int]:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    got = decode(model, prompt, 10, strategies, **more)
    return set(got.tokens[:, 3:].flatten().tolist())


def test_forbidden_ids_are_not_written(toy) -> None:
    gone: set[int] = set()
    for _ in range(3):
        now = answer(toy(), Suppress(sorted(gone)))
        assert not now & gone
        gone |= now


def test_two_of_them_forbid_what_either_forbids(toy) -> None:
    free = sorted(answer(toy()))
    half = len(free) // 2
    split = answer(toy(), Suppress(free[:half]), Suppress(free[half:]))
    assert split == answer(toy(), Suppress(free))


def test_end_ids_can_be_forbidden(toy) -> None:
    ends = slice(0, 4)  # 0, EOS and 3: the mask id never comes
    assert EOS in answer(toy(), Suppress([0, 3]), columns=ends)
    assert answer(toy(), Suppress(eos=True), columns=ends) <= {0, 3}


def test_ids_are_those_of_the_vocabulary_when_columns_are_bounded(toy) -> None:
    assert answer(toy(), Suppress([20, 22, 40]), columns=slice(20, 23)) == {21}


def test_bad_ids_are_named(toy) -> None:
    with pytest.raises(ValueError, match="holds 50; this model's ids are 0 to 49"):
        answer(toy(), Suppress([50]))
    with pytest.raises(ValueError, match="keep at least one"):
        answer(toy(), Suppress(range(50)))
    with pytest.raises(ValueError, match="keep at least one"):
        answer(toy(), Suppress([7]), columns=slice(7, 8))
