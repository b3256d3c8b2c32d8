import pytest
import torch

from mmdlm.decoding.guidance.nucleus import Nucleus


def oracle(p: list[float], top_p: float, top_k: int | None) -> set[int]:
    """Which tokens stay: the likeliest, until the mass is there, at most top_k."""
    order, mass, stay = sorted(range(len(p)), key=lambda i: (-p[i], i)), 0.0, []
    for i in order:
        if mass > top_p and top_p < 1:
            break
        stay.append(i)
        mass += p[i]
    return set(stay[:top_k])


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_keeps_the_likely_tokens(top_p: float, top_k: int | None, cases, softmax, moment) -> None:
    for logits, masked in cases(10):
        out = Nucleus(top_p, top_k, temperature=2.0).guide(moment(logits, masked), logits)
        for row, kept in zip(logits.tolist(), out, strict=True):
            for z, left in zip(row, kept, strict=True):
                want = oracle(softmax([x / 2 for x in z]), top_p, top_k)
                assert set(left.isfinite().nonzero()[:, 0].tolist()) == want
                assert all(left[i].item() == pytest.approx(z[i] / 2) for i in want)


@pytest.mark.parametrize("given", [{"top_p": 0}, {"top_p": 2}, {"top_k": 0}, {"temperature": 0}])
def test_bad_arguments_of_a_nucleus(given: dict) -> None:
    with pytest.raises(ValueError, match=f"Nucleus.{next(iter(given))} is"):
        Nucleus(**given)


def test_all_of_the_likeliest_stay_whatever_the_mass(moment) -> None:
    logits = torch.tensor([[[9.0, 0.0, 0.0]]])
    out = Nucleus(0.01).guide(moment(logits, torch.ones(1, 1).bool()), logits)
    assert out.isfinite().tolist() == [[[True, False, False]]]
