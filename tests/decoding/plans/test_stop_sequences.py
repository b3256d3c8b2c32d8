from dataclasses import dataclass

import pytest
import torch

from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.events import Finished
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.first_token import FirstToken
from mmdlm.decoding.plans.stop_sequences import StopSequences
from mmdlm.decoding.plans.streams import Streams
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.decoding.session import Session
from mmdlm.decoding.strategy import Strategy

pytestmark = pytest.mark.filterwarnings("ignore:AdaBlock")

PROMPT, LENGTH, MASK, EOS = torch.tensor([[3, 4, 5, 6]]), 10, 2, 1


@dataclass(frozen=True)
class RightToLeft(Strategy):
    """The last positions commit first."""

    def score(self, view, logits, tokens):
        return view.at.float()


@pytest.mark.parametrize(("size", "steps"), [(None, 10), (None, 5), (5, 10)])
def test_masks_after_a_stop_are_not_filled(size: int | None, steps: int, toy) -> None:
    model = toy()
    plain = decode(model, PROMPT, LENGTH, [Blocks(size), TopK(steps)])
    tokens, step = plain.tokens[0, 4:].tolist(), plain.history.step[0].tolist()
    for at in range(LENGTH):
        when = min(s for t, s in zip(tokens, step, strict=True) if t == tokens[at])
        # The same until the stop appears; then only what stands before it is filled.
        known = [t if s <= when else MASK for t, s in zip(tokens, step, strict=True)]
        first = known.index(tokens[at])
        stop = StopSequences(((tokens[at],),))
        found = decode(model, PROMPT, LENGTH, [Blocks(size), stop, TopK(steps)])
        answer = found.tokens[0, 4:].tolist()
        assert [a for a, k in zip(answer, known, strict=True) if k != MASK] == [
            k for k in known if k != MASK
        ]
        ended = [i for i, k in enumerate(known) if k == MASK and i > first]
        assert [answer[i] for i in ended] == [EOS] * len(ended)
        assert MASK not in answer
        open_before = [k for k in known[:first] if k == MASK]
        assert found.nfe <= when + 1 + len(open_before)


def test_sequences_of_several_ids_and_rows_of_a_batch(toy) -> None:
    model = toy()
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    plain = decode(model, prompts, LENGTH)
    pair = tuple(plain.tokens[0, 4:6].tolist())
    chosen = [StopSequences((pair,))]
    both = decode(model, prompts, LENGTH, chosen)
    for row in range(2):
        alone = decode(model, prompts[row : row + 1], LENGTH, chosen)
        assert both.tokens[row].tolist() == alone.tokens[0].tolist()
    assert both.forwards[0] < plain.forwards[0]


def test_given_text_after_the_answer_stays(toy) -> None:
    model = toy()
    canvas = torch.tensor([[MASK] * 6 + [20, 21]])
    plain = decode(model, PROMPT, 8, canvas=canvas)
    stop = int(plain.tokens[0, 4 + int(plain.history.step[0, :6].argmin())])
    first = decode(model, PROMPT, 8, [StopSequences(((stop,),))], canvas=canvas)
    assert first.tokens[0, -2:].tolist() == [20, 21]
    with pytest.raises(ValueError, match="expected no empty sequence"):
        StopSequences(((),))


def test_blocks_after_a_stop_are_not_opened(toy) -> None:
    model = toy()
    plain = decode(model, PROMPT, LENGTH, [Blocks(2)])
    tokens = plain.tokens[0, 4:].tolist()
    at = next(i for i in range(2, LENGTH) if tokens[i] not in tokens[:i])
    found = decode(model, PROMPT, LENGTH, [StopSequences(((tokens[at],),)), Blocks(2)])
    block = at // 2 * 2
    assert found.tokens[0, 4 : 4 + block].tolist() == tokens[:block]
    assert tokens[at] in found.tokens[0, 4 + block : 6 + block].tolist()
    assert found.tokens[0, 6 + block :].tolist() == [EOS] * (LENGTH - block - 2)
    assert found.nfe <= block + 2


@pytest.mark.parametrize("plan", [AdaBlock(3), SubBlocks(3), Streams(2), FirstToken()], ids=str)
def test_rows_stop_alike_with_every_plan(toy, plan) -> None:
    model = toy(shift=True)
    prompts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    plain = decode(model, prompts, LENGTH, [PrefixLM(), plan])
    early = (plain.history.step == 2).int().argmax(1)
    stops = tuple((int(plain.tokens[i, 4 + at]),) for i, at in enumerate(early))
    chosen = [PrefixLM(), plan, StopSequences(stops)]
    both = decode(model, prompts, LENGTH, chosen)
    assert not bool((both.tokens == MASK).any())
    for row in range(2):
        alone = decode(model, prompts[row : row + 1], LENGTH, chosen)
        assert both.tokens[row].equal(alone.tokens[0])
        assert both.forwards[row] == alone.nfe
    assert sum(both.forwards) < sum(plain.forwards)


def test_a_stop_that_is_masked_again_stops_nothing(toy) -> None:
    model = toy()
    plain, at = decode(model, PROMPT, LENGTH, [RightToLeft()]), LENGTH - 2
    stop = tuple(plain.tokens[0, 4 + at :].tolist())
    session, done = Session(model, [RightToLeft(), StopSequences((stop,))]), {}
    key = session.add(PROMPT[0], LENGTH)
    for _ in range(3):
        session.step()
    copies = [session.fork(key), session.fork(key, again=torch.arange(LENGTH) == at)]
    while session.keys:
        done |= {e.key: e for e in session.step() if isinstance(e, Finished)}
    assert done[copies[0]].tokens.equal(done[key].tokens)
    assert not bool((done[copies[1]].tokens == MASK).any())
    assert int(done[key].step[at]) == 1
    assert int(done[copies[1]].step[at]) >= 3
