import pytest
import torch

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
def test_blocks_are_filled_from_left_to_right(size: int, toy) -> None:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    steps = decode(toy(), prompt, 10, [Blocks(size), Threshold(0.2)]).history.step
    blocks = steps.split(size, 1)
    for earlier, later in zip(blocks, blocks[1:], strict=False):
        assert (earlier.amax(1) < later.amin(1)).all()  # each row goes on by itself


def test_the_models_own_block_size_and_no_blocks_without(toy) -> None:
    prompt = torch.tensor([[3, 4, 5]])
    own = decode(toy(attention="prefix", block_size=4), prompt, 8)
    set_by_hand = decode(toy(attention="prefix", block_size=4), prompt, 8, [Blocks(4)])
    assert own.history.step.equal(set_by_hand.history.step)
    assert own.history.step[0, :4].max() < own.history.step[0, 4:].min()
    one_window = decode(toy(), prompt, 8).history.step
    assert one_window.equal(decode(toy(), prompt, 8, [Blocks(8)]).history.step)


def test_a_block_already_known_is_passed_over(toy) -> None:
    canvas = torch.tensor([[9, 9, 2, 9, 2, 2]])
    steps = decode(toy(), torch.tensor([[3]]), 6, [Blocks(2)], canvas=canvas).history.step
    assert steps[0, :4].tolist() == [-1, -1, 0, -1]
    assert sorted(steps[0, 4:].tolist()) == [1, 2]


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="Blocks.size is 0, expected at least 1"):
        Blocks(0)
