import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.caches.prompt_once import PromptOnce
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens

PROMPT = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("dual", "shift", "want"),
    [
        (False, False, [(0, 10), (4, 10), (4, 10), (4, 10), (7, 10), (7, 10)]),
        (True, False, [(0, 10), (4, 7), (4, 7), (4, 10), (7, 10), (7, 10)]),
        # The rows that score the first position of the answer and of the block are in.
        (False, True, [(0, 10), (3, 10), (3, 10), (3, 10), (6, 10), (6, 10)]),
        (True, True, [(0, 10), (3, 7), (3, 7), (3, 10), (6, 10), (6, 10)]),
    ],
)
def test_the_prompt_is_computed_in_the_first_step_only(dual, shift, want, toy, watch) -> None:
    model = toy(shift=shift)
    forwards = watch(model)
    got = decode(model, PROMPT, 6, [Blocks(3), PromptOnce(dual)])
    assert [f.rows for f in forwards] == want
    assert got.nfe == len(want)
    assert got.history.step.sort().values.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_block_finished_by_its_opening_pass_costs_one_forward(toy, watch) -> None:
    forwards = watch(toy())
    assert decode(toy(), PROMPT, 6, [Blocks(3), PromptOnce(), TopK(2)]).nfe == 2
    assert [f.rows for f in forwards] == [(0, 10), (4, 10)]


def padded(logits: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [1 3 V] of a block at their places among ten."""
    whole = torch.zeros(1, 10, logits.shape[-1])
    whole[:, start : start + 3] = logits
    return whole


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_every_step_is_what_it_is_by_hand(dual: bool, shift: bool, toy, watch) -> None:
    """The keys of the prompt are those of the first pass, the block's those of the step."""
    model = toy(shift=shift)
    forwards = watch(model)
    decode(model, PROMPT, 6, [Blocks(3), PromptOnce(dual)])
    kv, opened = model.backbone.cache(1, 10), {0: slice(0, 10), 3: slice(4 - shift, 10)}
    for i, step in enumerate(list(forwards)):
        start = 4 if i < 3 else 7
        inside = slice(start - shift, start + 3 if dual else 10)
        sequence = from_tokens(step.tokens, None, "full", None)
        rows, read = opened.get(i, inside), slice(start, start + 3)
        want = step.scored(padded(model.run(sequence, rows, read, kv, None, None), start))
        torch.testing.assert_close(step.logits, want)


@pytest.mark.parametrize(("dual", "other"), [(False, PrefixCache()), (True, DualCache())])
def test_with_a_prompt_that_sees_no_answer_it_is_the_other_cache(dual, other, toy) -> None:
    """Nothing is lost where the prompt is final anyway."""
    for model, more in ((toy(attention="prefix"), []), (toy(), [PrefixLM()])):
        chosen = [Blocks(3), Threshold(0.2), *more]
        ours, theirs = (decode(model, PROMPT, 9, [*chosen, c]) for c in (PromptOnce(dual), other))
        assert ours.tokens.equal(theirs.tokens)
        torch.testing.assert_close(ours.history.confidence, theirs.history.confidence)
    chosen = [Blocks(3), Threshold(0.2)]
    ours, theirs = (decode(toy(), PROMPT, 9, [*chosen, c]) for c in (PromptOnce(dual), other))
    assert not torch.allclose(ours.history.confidence, theirs.history.confidence)
