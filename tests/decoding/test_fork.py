"""Copies of running requests, some of whose tokens are masked again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.events import Finished
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.session import Session
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM
from tests.decoding.test_session import KINDS, LENGTHS, PRESETS, drained, fits, outcome, take

pytestmark = [
    pytest.mark.filterwarnings("ignore:AdaBlock"),
    pytest.mark.filterwarnings("ignore:.*changes nothing in an answer of"),
]
MASK, SIZE = 2, 11
PROMPT, OTHER = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[9, 4]])
Toy = Callable[..., MultimodalDLM]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def after(steps: int, model: MultimodalDLM, chosen: list | str, **given: object) -> Session:
    """A session with one request, which has done some steps."""
    session = Session(model, chosen)
    session.add_rows(PROMPT, given.pop("length", SIZE), generator=seeded(3), **given)
    for _ in range(steps):
        assert not any(isinstance(event, Finished) for event in session.step())
    return session


@pytest.mark.parametrize("kind", ["full shifted", "cascade"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "odd"])
def test_a_copy_goes_on_as_the_request_does(name: str, kind: str, exact_toy: Toy) -> None:
    model = exact_toy(**KINDS[kind])
    if not fits(model, name):
        return  # which presets fit which models is tested in test_presets_on_families.py
    alone, want = after(0, model, name, length=LENGTHS.get(name, SIZE)), {}
    drained(alone, want)
    session, done, keys = after(0, model, name, length=LENGTHS.get(name, SIZE)), {}, [0]
    session.add(PROMPT[0, :3], 6)
    while 0 in session.keys and len(keys) < 3:
        keys.append(session.fork(0))
        take(session, done)
    drained(session, done)
    assert len(keys) > 1
    for key in keys:
        assert outcome(done[key]) == outcome(want[0])
        torch.testing.assert_close(done[key].confidence, want[0].confidence)


@pytest.mark.parametrize("pruning", [[], [PruneMedia(keep=0.5, layer=2, step=1)]])
def test_copies_have_the_other_prompts_too(exact_toy: Toy, pruning: list) -> None:
    generator = torch.Generator().manual_seed(0)
    model = exact_toy(attention="prefix")
    image = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    prompt = model.arrange([Row((image, torch.tensor([5, 6])))])
    other = model.arrange([Row((torch.tensor([7]), image[:4], torch.tensor([8])))])
    chosen, given = [CFG(1.5), Gumbel(1.0), *pruning], {"alternatives": {"text": other}}
    want = decode(model, prompt, SIZE, chosen, generator=seeded(3), **given)
    session, done = Session(model, chosen), {}
    session.add_rows(prompt, SIZE, generator=seeded(3), **given)
    keys = [0]
    for _ in range(3):
        keys.append(session.fork(0))
        take(session, done)
    fresh = session.fork(0, generator=seeded(9))
    drained(session, done)
    for key in keys:
        assert done[key].tokens.equal(want.tokens[0, -SIZE:])
        assert done[key].forwards == want.nfe
    assert not done[fresh].tokens.equal(done[0].tokens)
    assert done[fresh].tokens[done[0].step < 3].equal(done[0].tokens[done[0].step < 3])


def test_a_generator_gives_the_copy_other_numbers(toy: Toy) -> None:
    model, chosen, done = toy(), [Gumbel(1.0)], {}
    session = after(0, model, chosen)
    keys = [session.fork(0, generator=seeded(seed)) for seed in (4, 3)]
    drained(session, done)
    for key, seed in zip(keys, (4, 3), strict=True):
        want = decode(model, PROMPT, SIZE, chosen, generator=[seeded(seed)])
        assert done[key].tokens.equal(want.tokens[0, -SIZE:])
    assert done[keys[1]].tokens.equal(done[0].tokens)


def some(*positions: int) -> Tensor:
    again = torch.zeros(SIZE, dtype=torch.bool)
    again[list(positions)] = True
    return again


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [(0,), (1, 2, 6), tuple(range(SIZE))])
def test_tokens_masked_again_are_as_if_they_had_never_been_there(
    kind: str, guided: bool, positions: tuple[int, ...], exact_toy: Toy
) -> None:
    """Keys and values that saw them are computed again."""
    model = exact_toy(**KINDS[kind])
    given = {"alternatives": {"text": OTHER}} if guided else {}
    chosen = [*([CFG(1.0)] if guided else []), Threshold(0.5)]
    session = after(2, model, chosen, **given)
    canvas, done = session.canvas(0), {}
    key = session.fork(0, again=some(*positions))
    canvas[list(positions)] = MASK
    assert session.canvas(key).equal(canvas)
    plain = decode(model, PROMPT, SIZE, chosen, **given)
    want = decode(model, PROMPT, SIZE, chosen, canvas=canvas[None], **given)
    drained(session, done)
    assert done[0].tokens.equal(plain.tokens[0, -SIZE:])
    assert done[key].tokens.equal(want.tokens[0, -SIZE:])
    late = done[key].step >= 2
    assert (done[key].step[late] - 2).equal(want.history.step[0, late])


@pytest.mark.parametrize(
    "name",
    ["fast_dllm", "fast_dllm_dual", "dkv", "elastic", "free_cache", "window_diffusion", "klass"],
)
def test_copies_with_masks_again_are_the_same_alone_and_together(name, exact_toy: Toy) -> None:
    model, found = exact_toy(), []
    for count in (1, 3):
        session, done = after(3, model, name), {}
        keys = [session.fork(0, again=some(*range(i + 2))) for i in range(count)]
        if count == 1:
            session.remove(0)
        drained(session, done)
        found.append(outcome(done[keys[0]]))
        assert not any(bool((done[key].tokens == MASK).any()) for key in keys)
    assert found[0] == found[1]


@pytest.mark.parametrize(("size", "steps"), [(16, 4), (8, 2)])
def test_a_schedule_takes_the_masks_into_the_steps_that_are_left(toy, size, steps) -> None:
    session, done = after(steps, toy(), [Blocks(size), TopK(steps=8)], length=16), {}
    assert int((session.canvas(0) != MASK).sum()) == 2 * steps
    key = session.fork(0, again=torch.ones(16, dtype=torch.bool))
    assert (session.canvas(key) == MASK).all()
    drained(session, done)
    assert done[key].forwards == done[0].forwards == 8


def test_what_was_given_is_not_masked_again(toy: Toy) -> None:
    canvas = torch.full((1, SIZE), MASK)
    canvas[0, 4] = 20
    session, done = after(2, toy(), [Blocks(4)], canvas=canvas), {}
    key = session.fork(0, again=torch.ones(SIZE, dtype=torch.bool))
    assert session.canvas(key).equal(canvas[0])
    assert session.confidence(key).equal(torch.zeros(SIZE))
    drained(session, done)
    assert done[key].tokens[4] == 20


def test_a_copy_of_a_kept_request_can_be_extended(toy: Toy) -> None:
    session, done = Session(toy(attention="prefix")), {}
    key = session.add(PROMPT[0], SIZE, keep=True)
    take(session, done)
    copy = session.fork(key)
    drained(session, done)
    answers = []
    for each in (key, copy):
        session.extend(each, torch.tensor([11, 12]), 5)
        drained(session, done)
        answers.append(done[each].tokens.tolist())
    assert answers[0] == answers[1]


def test_errors_name_what_cannot_be_copied(toy: Toy) -> None:
    session = after(1, toy(), [])
    with pytest.raises(KeyError, match="request 5 is not running"):
        session.fork(5)
    with pytest.raises(ValueError, match=r"again is \[3\], expected \[11\]"):
        session.fork(0, again=torch.zeros(3, dtype=torch.bool))
    assert session.keys == [0]
