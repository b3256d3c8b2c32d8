"""The student's and the teacher's masks."""

import torch

from mmdlm.objectives.dscd import DSCD
from mmdlm.objectives.objective import Batch
from tests.objectives.test_masked import row, small


def masks(length, n=300):
    model = small()
    rows = [row([3, 4], [5] * length)] * n
    batch = Batch(model.arrange(rows), torch.arange(n), torch.zeros(n).double())
    noise, teacher = DSCD().corrupt(batch)
    assert not (teacher & ~noise.masked).any()
    return noise.masked.sum(1), teacher.sum(1)


def test_the_teacher_sees_more_of_long_answers():
    student, teacher = masks(100)
    assert 40 <= student.min() < 45
    assert 85 < student.max() <= 90
    assert ((teacher >= 10) & (teacher <= 60) & (teacher < student)).all()
    share = teacher / student
    assert 0.25 < share.min() < 0.4
    assert 0.6 < share.max() < 0.72  # both counts are rounded down


def test_short_answers_have_fixed_counts():
    student, teacher = masks(6)
    assert (student == 2).all()
    assert (teacher == 1).all()
    assert masks(15)[0].max() <= 7


def test_no_divergence_where_the_views_are_equal():
    model = small()
    batch = Batch(
        model.arrange([row([3, 4], [5, 6, 7])]), torch.tensor([1]), torch.zeros(1).double()
    )
    objective = DSCD(share=1.0)
    noise, teacher = objective.corrupt(batch)
    equal = objective.loss(model, batch, noise, noise.masked)
    assert abs(equal.sum.item()) < 1e-5
    assert objective.loss(model, batch, noise, teacher).sum > 1e-3
