from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.exact import Exact
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import GONE, Strategy
from mmdlm.decoding.view import View

PROMPT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def test_the_prompt_runs_once_and_is_as_it_is_alone(toy, watch) -> None:
    model = toy()
    forwards = watch(model)
    decode(model, PROMPT, 4, [PrefixLM()])
    assert [f.rows for f in forwards] == [(0, 8), (4, 8), (4, 8), (4, 8)]
    seen = torch.ones(8, 8, dtype=torch.bool)
    seen[:4, 4:] = False
    for step in forwards:
        want = step.scored(model.logits(step.tokens, seen.expand(2, -1, -1)))
        want[..., 2] = step.logits[..., 2]
        torch.testing.assert_close(step.logits, want)


@pytest.mark.parametrize("shift", [False, True])
def test_equals_a_model_of_prefix_attention_wherever_it_stands_in_the_list(
    shift: bool, toy
) -> None:
    trained = decode(toy(attention="prefix", shift=shift), PROMPT, 6, [Blocks(3)])
    for order in ([PrefixLM(), Exact(), Blocks(3)], [Blocks(3), Exact(), PrefixLM()]):
        turned = decode(toy(shift=shift), PROMPT, 6, order)
        assert turned.tokens.equal(trained.tokens)
        torch.testing.assert_close(turned.history.confidence, trained.history.confidence)


def test_models_whose_prompt_never_sees_the_answer_are_rejected(toy) -> None:
    with pytest.raises(ValueError, match="requires full attention, but this model has prefix"):
        decode(toy(attention="prefix"), PROMPT, 2, [PrefixLM()])


@dataclass(frozen=True)
class Cut(Strategy):
    """Takes the last three positions from rows whose prompt ends in 10, in step 2."""

    def resize(self, view: View) -> Tensor | None:
        cut = (view.tokens[:, view.prompt - 1] == 10) & (view.step == 2)
        if not cut.any():
            return None
        order = torch.arange(view.length - view.prompt).repeat(len(cut), 1)
        order[cut, -3:] = GONE
        return order


def test_the_prompt_stays_apart_when_another_row_is_cut(toy, prompts) -> None:
    tokens, mask = prompts(4, 7)
    tokens[:, -1] = torch.tensor([11, 10])
    for length in (6, 10):
        batch = decode(toy(), tokens, length, [Cut(), PrefixLM()], mask=mask)
        assert (batch.history.step[1, -3:] == -1).all()
        alone = decode(toy(), tokens[:1, -4:], length, [PrefixLM()])
        assert batch.tokens[0, 7:].equal(alone.tokens[0, 4:])
        assert batch.history.confidence[0].allclose(alone.history.confidence[0], atol=1e-4)
