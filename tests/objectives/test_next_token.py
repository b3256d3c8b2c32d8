"""The next-token loss equals the plain causal loss."""

import pytest
import torch
import torch.nn.functional as F

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.next_token import NextToken
from mmdlm.objectives.objective import Batch


def small(**options):
    torch.manual_seed(0)
    config = TransformerConfig(vocab=12, width=16, layers=2, heads=2, inner=32)
    model = MultimodalDLM(Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, **options))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def test_equals_token_by_token_scoring():
    """Each answer token is scored from the prompt and the tokens before it only."""
    model = small(attention="prefix", block_size=1, shift=True)
    prompt, answer = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8, 1])
    sequence = model.arrange([Row((), (Turn(prompt, answer),))])
    batch = Batch(sequence, torch.zeros(1, dtype=torch.long), torch.zeros(1).double())
    losses = NextToken().step(model, batch)
    want = 0.0
    for i in range(len(answer)):
        shorter = model.arrange([Row((), (Turn(prompt, answer[: i + 1]),))])
        at = torch.zeros_like(shorter.mask)
        at[0, -1] = True
        blind = shorter.with_tokens(shorter.tokens.masked_fill(at, 9))
        want += F.cross_entropy(model.logits_at(blind, at), answer[i : i + 1]).item()
    assert losses.sum.item() == pytest.approx(want, rel=1e-5)
    assert losses.count.item() == 4


def test_model_that_attends_to_the_answer_is_rejected():
    model = small(attention="prefix")
    sequence = model.arrange([Row((), (Turn(torch.tensor([3]), torch.tensor([4])),))])
    batch = Batch(sequence, torch.zeros(1, dtype=torch.long), torch.zeros(1).double())
    with pytest.raises(ValueError, match="block_size"):
        NextToken().step(model, batch)
