"""CART weights against the published sum, token by token."""

import pytest
import torch

from mmdlm.layout import Row, Turn
from mmdlm.objectives.weights import cart
from tests.objectives.test_masked import row, small


def slow(context, p):
    """Weights of one turn by the published double sum."""
    return [
        sum(
            0.5 * p * (1 - p) ** (abs(n - j) - 1)
            for j, seen in enumerate(context)
            if seen and j != n
        )
        for n in range(len(context))
    ]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8, 1.0])
def test_equals_the_double_sum_whatever_the_padding(p):
    sequence = small().arrange([row([3] * 150, [4] * 30), row([5, 6], [7, 8, 9])])
    context = (torch.rand(sequence.mask.shape) < 0.5) & sequence.mask
    found = cart(context, sequence, p)
    for i, real in enumerate(sequence.mask):
        want = torch.tensor(slow(context[i][real].tolist(), p))
        torch.testing.assert_close(found[i][real], want, rtol=1e-5, atol=2e-6)


def test_turns_are_not_context_of_each_other():
    turns = (
        Turn(torch.tensor([7]), torch.tensor([8, 1, 4])),
        Turn(torch.tensor([9, 3]), torch.tensor([10])),
    )
    model = small("cascade")
    media = (torch.randn(3, 16),)
    together, (a, b) = (
        model.arrange([Row(media, turns)]),
        (model.arrange([Row(media, (t,))]) for t in turns),
    )
    found = cart(together.mask, together, 0.2)[0]
    torch.testing.assert_close(found[3:7], cart(a.mask, a, 0.2)[0, 3:])
    torch.testing.assert_close(found[7:], cart(b.mask, b, 0.2)[0, 3:])


def test_the_shifted_form_moves_the_context_by_one_token():
    sequence = small().arrange([row([3, 4], [5, 6, 7])])
    context = torch.tensor([[True, True, False, True, False]])
    found = cart(context, sequence, 0.3, is_shifted=True)
    # Without the first token, and with one after the last.
    want = slow([False, True, False, True, False, True], 0.3)[:5]
    torch.testing.assert_close(found[0], torch.tensor(want))
