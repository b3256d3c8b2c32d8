"""Requests that are added to a running batch, removed from it, and continued."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.events import Committed, Finished
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.session import Session
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:AdaBlock"),
    pytest.mark.filterwarnings("ignore:.*changes nothing in an answer of"),
]
EOS, MASK = 1, 2
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full shifted": {"shift": True},
    "prefix": {"attention": "prefix"},
    "cascade": {"attention": "cascade", "block_size": 4},
    "block causal": {"attention": "block_causal", "block_size": 4},
    "block causal shifted": {"attention": "block_causal", "block_size": 4, "shift": True},
}
PRESETS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "configs" / "decoding").glob("*.yaml")
)
LENGTHS = {"daedal": 2, "dystruct": 4}
Toy = Callable[..., MultimodalDLM]
Request = tuple[Tensor, int, int]  # prompt ids, length, seed


def add(session: Session, request: Request) -> int:
    prompt, length, seed = request
    return session.add(prompt, length, generator=torch.Generator().manual_seed(seed))


def drained(session: Session, done: dict[int, Finished]) -> None:
    """Runs a session to its end."""
    while session.keys:
        take(session, done)


def take(session: Session, done: dict[int, Finished]) -> None:
    for event in session.step():
        if isinstance(event, Finished):
            done[event.key] = event


def outcome(done: Finished) -> tuple[list[int], list[int], int]:
    return done.tokens.tolist(), done.step.tolist(), done.forwards


def fits(model: MultimodalDLM, name: str) -> bool:
    try:
        Session(model, name)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "odd"])
def test_a_request_added_later_is_what_it_is_alone(name: str, kind: str, exact_toy: Toy) -> None:
    model = exact_toy(**KINDS[kind])
    if not fits(model, name):
        return  # which presets fit which models is tested in test_presets_on_families.py
    generator = torch.Generator().manual_seed(len(name))
    length = LENGTHS.get(name, 11)
    sizes = ((6, length), (9, length + 2), (3, length), (5, length - 1))
    requests = [
        (torch.randint(3, 50, (size,), generator=generator), many, 40 + i)
        for i, (size, many) in enumerate(sizes)
    ]
    alone = []
    for request in requests:
        session, done = Session(model, name), {}
        add(session, request)
        drained(session, done)
        alone.append(done[0])
    for k in (1, 4):
        session, done, keys = Session(model, name), {}, []
        for request in requests:
            keys.append(add(session, request))
            for _ in range(k):
                take(session, done)
        drained(session, done)
        for key, want in zip(keys, alone, strict=True):
            assert outcome(done[key]) == outcome(want)
            torch.testing.assert_close(done[key].confidence, want.confidence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fast_dllm", "llada", "prompt_once", "parallel"])
def test_extending_equals_a_fresh_decode_of_the_conversation(
    name: str, kind: str, exact_toy: Toy
) -> None:
    model = exact_toy(**KINDS[kind])
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, 50, (7,), generator=generator)
    session, done = Session(model, name), {}
    key = session.add(text, 10, keep=True)
    for _ in range(3):
        drained(session, done)
        answer = done.pop(key).tokens.tolist()
        answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
        more = torch.randint(3, 50, (4,), generator=generator)
        text = torch.cat([text, torch.tensor(answer), more])
        session.extend(key, more, 9)
        session.add(text[:5], 6)  # others run beside it
        fresh, want = Session(model, name), {}
        fresh.add(text, 9)
        drained(fresh, want)
        drained(session, done)
        assert done[key].tokens.equal(want[0].tokens)
        assert done[key].step.equal(want[0].step)
        assert done[key].forwards == want[0].forwards


def test_ids_outside_the_vocabulary_are_refused(toy: Toy) -> None:
    """And a refused prompt neither joins the batch nor ends the conversation."""
    session = Session(toy())
    for ids, message in (([3, 50], "id 50 at position .0, 1"), ([-100], "id -100 at position")):
        with pytest.raises(ValueError, match=message):
            session.add(torch.tensor(ids), 2)
    assert session.keys == []
    key = session.add(torch.tensor([3, 4]), 2, keep=True)
    while session.keys:
        session.step()
    for ids in ([50], [5, -1]):
        with pytest.raises(ValueError, match=f"prompt holds the id {ids[-1]} at position"):
            session.extend(key, torch.tensor(ids), 2)
    assert session.extend(key, torch.tensor([5]), 2) == key


def test_extending_reuses_whole_blocks(toy: Toy, watch) -> None:
    model = toy(attention="block_causal", block_size=4)
    session, done = Session(model), {}
    key = session.add(torch.arange(3, 11), 8, keep=True)
    drained(session, done)
    forwards = watch(model)
    session.extend(key, torch.tensor([20, 21, 22]), 4)
    drained(session, done)
    # The last block of the answer was read while it still had masks.
    assert forwards[0].rows == (12, 20)


def test_events_tell_what_a_decode_did(toy: Toy) -> None:
    prompt, model = torch.tensor([5, 6, 7]), toy()
    session, events = Session(model, [Blocks(4), Threshold(0.2)]), []
    key = session.add(prompt, 8)
    seen = []
    while session.keys:
        seen.append(session.canvas(key))
        events += session.step()
    want = decode(model, prompt[None], 8, [Blocks(4), Threshold(0.2)])
    *commits, last = events
    assert isinstance(last, Finished)
    assert last.tokens.equal(want.tokens[0, 3:])
    assert last.forwards == want.nfe == session.calls
    for number, event in enumerate(commits):
        assert isinstance(event, Committed)
        at = (want.history.step[0] == number).nonzero()[:, 0]
        assert event.positions == at.tolist()
        assert event.tokens == last.tokens[at].tolist()
        assert event.confidence == pytest.approx(last.confidence[at].tolist())
    assert (seen[0] == MASK).all()
    assert int((seen[1] != MASK).sum()) == len(commits[0].positions)


def test_removed_requests_leave_the_others_alone(toy: Toy) -> None:
    model, chosen = toy(), [Blocks(4), Threshold(0.2)]
    session, done = Session(model, chosen), {}
    first, second = (session.add(torch.arange(3, 3 + n), 8) for n in (4, 6))
    take(session, done)
    session.remove(first)
    third = session.add(torch.arange(9, 12), 5)
    session.remove(third)
    drained(session, done)
    assert set(done) == {second}
    want = decode(model, torch.arange(3, 9)[None], 8, chosen)
    assert done[second].tokens.equal(want.tokens[0, 6:])
    with pytest.raises(KeyError, match=f"no request {first}; running"):
        session.remove(first)
    with pytest.raises(KeyError, match="not running"):
        session.canvas(second)
    with pytest.raises(KeyError, match="added with keep=True"):
        session.extend(second, torch.tensor([4]), 3)


def test_media_join_with_their_rows(toy: Toy) -> None:
    model, generator = toy(), torch.Generator().manual_seed(1)
    rows = [
        Row((torch.randn(n, 32, generator=generator), torch.randint(3, 50, (4,)))) for n in (3, 6)
    ]
    session, done = Session(model, [Blocks(4)]), {}
    keys = []
    for row in (rows[0], Row((torch.arange(3, 9),)), rows[1]):
        keys.append(session.add(model.arrange([row]), 8))
        take(session, done)
    drained(session, done)
    for key, row in zip((keys[0], keys[2]), rows, strict=True):
        alone = decode(model, model.arrange([row]), 8, [Blocks(4)])
        assert done[key].tokens.equal(alone.tokens[0, -8:])


def test_a_full_canvas_is_finished_at_once(toy: Toy) -> None:
    session = Session(toy())
    key = session.add(torch.tensor([3]), 2, canvas=torch.tensor([7, 8]))
    (event,) = session.step()
    assert (event.key, event.tokens.tolist(), event.forwards) == (key, [7, 8], 0)
    assert session.step() == []


def test_one_request_is_one_row(toy: Toy) -> None:
    with pytest.raises(ValueError, match="the prompt has 2 rows, expected 1; use add_rows"):
        Session(toy()).add(torch.tensor([[3], [4]]), 2)
    assert Session(toy()).add_rows(torch.tensor([[3], [4]]), 2) == [0, 1]


def test_presets_are_enrolled() -> None:
    assert set(PRESETS) <= set(preset.names())
