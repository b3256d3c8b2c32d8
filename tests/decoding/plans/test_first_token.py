import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.first_token import FirstToken
from mmdlm.decoding.plans.streams import Streams
from mmdlm.decoding.plans.sub_blocks import SubBlocks

pytestmark = pytest.mark.filterwarnings("ignore:AdaBlock")

PROMPT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def test_the_prompt_alone_gives_the_first_token_of_a_shifted_family(toy, watch) -> None:
    model = toy(shift=True)
    forwards = watch(model)
    decoded = decode(model, PROMPT, 7, [PrefixLM(), FirstToken(), TopK(3)])
    assert [f.rows for f in forwards] == [(0, 4), (4, 11), (4, 11), (4, 11)]
    assert (decoded.history.step == 0).sum(1).tolist() == [1, 1]
    assert decoded.history.step[:, 0].tolist() == [0, 0]
    logits = model.backbone.head(
        model.backbone(model.backbone.tokens(PROMPT), torch.arange(4)[None])
    )
    logits[..., 2] = -torch.inf
    assert decoded.tokens[:, 4].tolist() == logits[:, -1].argmax(-1).tolist()
    counts = [(decoded.history.step == i).sum(1).tolist() for i in range(1, 4)]
    assert counts == [[2, 2]] * 3


def test_the_rest_is_filled_in_blocks(toy) -> None:
    decoded = decode(toy(shift=True), PROMPT, 7, [PrefixLM(), FirstToken(), Blocks(4), TopK(7)])
    step = decoded.history.step
    # One step for the first token; 4 of 7 steps for a block, as without it.
    assert step.amax(1).tolist() == [1 + 3 + 2] * 2
    assert step[:, 0].tolist() == [0, 0]
    assert int(step[:, 1:4].max()) < int(step[:, 4:].min())


def test_it_changes_nothing_where_the_prompt_does_not_decide_alone(toy) -> None:
    for model, rest in ((toy(shift=True), []), (toy(), [PrefixLM()])):
        plain = decode(model, PROMPT, 6, [*rest, Blocks(3)])
        found = decode(model, PROMPT, 6, [*rest, Blocks(3), FirstToken()])
        assert found.tokens.equal(plain.tokens)
        assert found.history.step.equal(plain.history.step)


@pytest.mark.parametrize(
    "more",
    [
        [Blocks(2), Threshold(0.2)],
        [Blocks(3), DualCache()],
        [AdaBlock(3)],
        [SubBlocks(3), Threshold(0.2)],
        [Streams(2)],
    ],
    ids=str,
)
def test_it_goes_first_with_every_plan(toy, more: list) -> None:
    model = toy(shift=True)
    given = [PrefixLM(), FirstToken(), *more]
    both = decode(model, PROMPT, 8, given)
    assert (both.history.step[:, 0] == 0).all()
    assert (both.history.step[:, 1:] > 0).all()
    assert not bool((both.tokens == 2).any())
    for row in range(2):
        alone = decode(model, PROMPT[row : row + 1], 8, given)
        assert both.tokens[row].equal(alone.tokens[0])
        assert both.forwards[row] == alone.nfe
