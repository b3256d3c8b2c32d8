import torch

from mmdlm.objectives.complementary import Complementary
from mmdlm.objectives.given import Given
from mmdlm.objectives.masked import Masked
from tests.objectives.recorded import batch_of, sequence_of

TOKENS = torch.randint(3, 9, (4, 12), generator=torch.Generator().manual_seed(0))


def test_given_tokens_are_neither_masked_nor_scored() -> None:
    answer = torch.ones_like(TOKENS, dtype=torch.bool)
    answer[:, :3] = False
    batch = batch_of(sequence_of(TOKENS, answer))
    inner = Masked(weight="one", normaliser="masked", full=0.5)
    plain, found = inner.corrupt(batch), Given(inner, (5, 7)).corrupt(batch)
    given = (TOKENS == 5) | (TOKENS == 7)
    assert bool((plain.masked & given).any())
    assert torch.equal(found.masked, plain.masked & ~given)
    assert torch.equal(found.maskable, answer & ~given)
    assert torch.equal(found.p, plain.p)
    both = Complementary(Given(inner, (5, 7))).corrupt(batch)
    other = both.complement()
    assert torch.equal(both.masked | other.masked, answer & ~given)
    assert not bool((both.masked & other.masked).any())


def test_without_ids_it_is_the_other_objective() -> None:
    answer = torch.ones_like(TOKENS, dtype=torch.bool)
    batch = batch_of(sequence_of(TOKENS, answer))
    assert torch.equal(Given().corrupt(batch).masked, Given().objective.corrupt(batch).masked)
