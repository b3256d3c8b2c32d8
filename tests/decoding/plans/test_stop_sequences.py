import pytest
import torch

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.stop_sequences import StopSequences

PROMPT, LENGTH, MASK, EOS = torch.tensor([[3, 4, 5, 6]]), 10, 2, 1


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
        stop = StopSequences(((tokens[at],),), size)
        found = decode(model, PROMPT, LENGTH, [stop, TopK(steps)])
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
