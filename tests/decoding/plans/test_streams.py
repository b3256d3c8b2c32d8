import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.plans.streams import Streams
from mmdlm.model import MultimodalDLM

MASK, LENGTH = 2, 14
PROMPTS = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(8))


def slow(
    model: MultimodalDLM, prompt: Tensor, sizes: list[int], steps: int
) -> tuple[list[int], list[int]]:
    """Tokens and steps by hand: all streams in a number of steps, everything recomputed."""
    tokens, when = prompt.tolist() + [MASK] * LENGTH, [-1] * LENGTH
    parts, at = [], len(prompt)
    for size in sizes:
        parts.append(range(at, at + size))
        at += size
    for step in range(steps):
        logits = model.logits(torch.tensor([tokens]))[0].double()
        logits[:, MASK] = -torch.inf
        sure, best = (x.tolist() for x in logits.softmax(-1).max(-1))
        chosen = []
        for part in parts:
            quota = len(part) // steps + (step < len(part) % steps)
            masked = [i for i in part if tokens[i] == MASK]
            chosen += sorted(masked, key=lambda i: (-sure[i], i))[:quota]
        for i in chosen:
            tokens[i], when[i - len(prompt)] = best[i], step
    return tokens, when


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("sizes", "steps"), [((4, 4, 6), None), ((4, 4, 6), 3), ((2, 12), 5), ((14,), 4), ((3, 11), 1)]
)
def test_streams_equal_a_decode_by_hand(sizes: tuple, steps: int | None, shift: bool, toy) -> None:
    model = toy(shift=shift)
    for prompt in PROMPTS:
        want = slow(model, prompt, list(sizes), steps or max(sizes))
        got = decode(model, prompt[None], LENGTH, [Streams(sizes=sizes, steps=steps)])
        assert (got.tokens[0].tolist(), got.history.step[0].tolist()) == want


def test_every_stream_gets_one_token_per_step(toy) -> None:
    got = decode(toy(), PROMPTS, LENGTH, [Streams(3)])  # 5, 5 and 4 positions
    assert got.nfe == 5
    for row in got.history.step:
        for stream in row.split([5, 5, 4]):
            assert sorted(stream.tolist()) == list(range(len(stream)))


def test_one_stream_is_top_k(toy) -> None:
    for steps in (None, 4):
        one, plain = (
            decode(toy(), PROMPTS, LENGTH, [s]) for s in (Streams(1, steps=steps), TopK(steps))
        )
        assert one.tokens.equal(plain.tokens)
        assert one.history.step.equal(plain.history.step)


@pytest.mark.parametrize("more", [[], [DualCache()]])
def test_the_positions_after_the_streams_open_last(more: list, toy) -> None:
    steps = decode(toy(), PROMPTS, LENGTH, [Streams(sizes=(4, 4), steps=7), *more]).history.step
    assert steps[:, :8].amax() == 3  # 8 of 14 positions get 4 of 7 steps
    assert steps[:, 8:].amin() == 4
    assert steps.amax() == 6


def test_rows_with_given_positions_have_separate_quotas(toy, prompts) -> None:
    tokens, mask = prompts(6, 3, 5)
    canvas = torch.full((3, LENGTH), MASK)
    canvas[0, 1:5], canvas[2, :9] = 9, 8
    chosen = [Streams(sizes=(5, 5), steps=6)]
    batch = decode(toy(), tokens, LENGTH, chosen, mask=mask, canvas=canvas)
    for i, size in enumerate((6, 3, 5)):
        given = canvas[i : i + 1]
        alone = decode(toy(), tokens[i : i + 1, -size:], LENGTH, chosen, canvas=given)
        assert batch.tokens[i, 6:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "Streams.count is 0"),
        ({"steps": 0}, "Streams.steps is 0"),
        ({"sizes": (3, 0)}, r"Streams.sizes is \(3, 0\)"),
        ({"sizes": ()}, r"Streams.sizes is \(\)"),
    ],
)
def test_bad_arguments_of_streams(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Streams(**given)


def test_streams_longer_than_the_answer_are_refused(toy) -> None:
    with pytest.raises(ValueError, match=r"are 20 positions, but the answer has 14"):
        decode(toy(), PROMPTS, LENGTH, [Streams(sizes=(10, 10))])
    with pytest.raises(ValueError, match="Streams and Blocks both decide 'plan'"):
        decode(toy(), PROMPTS, LENGTH, [Streams(), Blocks(4)])
