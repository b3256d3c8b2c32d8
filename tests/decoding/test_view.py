"""What strategies may read, and that they write nothing."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.decode import decode
from mmdlm.decoding.memory import Entry, PerAnswer, PerCanvas, PerRequest, PerRow
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.session import Session
from mmdlm.decoding.state import State
from mmdlm.decoding.strategy import GONE, NEW, Strategy
from mmdlm.decoding.view import READABLE, View


@dataclass(frozen=True)
class Writer(Strategy):
    """Sets an attribute of the view."""

    name: str

    def stop(self, view: View) -> Tensor:
        setattr(view, self.name, getattr(view, self.name))
        raise AssertionError("the view let a strategy write")


@pytest.mark.parametrize("name", sorted({*READABLE, "device", "probability"}))
def test_strategies_cannot_write(name: str, toy) -> None:
    with pytest.raises(AttributeError, match=f"cannot set '{name}': only the loop writes"):
        decode(toy(), torch.tensor([[3, 4]]), 4, [Writer(name)])


def test_what_the_view_offers_is_what_the_state_has() -> None:
    known = {*vars(State), *State.__dataclass_fields__}
    assert known >= READABLE


def test_what_is_not_readable_is_named(moment) -> None:
    view = moment(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(AttributeError, match="no 'memories' that strategies may read"):
        _ = view.memories


@dataclass(frozen=True)
class Notes(Strategy):
    """Numbers rows and positions; keeps in `seen` what became of the numbers."""

    seen: list

    def __hash__(self) -> int:
        return id(self)

    def prepare(self, model, columns) -> dict:
        return {"ids": torch.tensor([7])}

    def begin(self, view: View) -> dict[str, Entry]:
        rows, size = len(view.tokens), view.length - view.prompt
        return {
            "row": PerRow(view.tokens[:, -1 - size].clone()),
            "answer": PerAnswer(torch.arange(size).expand(rows, -1) + 10, fill=-1),
            "canvas": PerCanvas(view.tokens.clone(), fill=-2),
            "object": PerRequest([[int(key)] for key in view.keys]),
        }

    def stop(self, view: View) -> Tensor:
        mine = view.memory(self)
        self.seen.append({name: mine[name] for name in (*mine, "ids")})
        return torch.zeros(len(view.tokens), dtype=torch.bool)


def test_memory_follows_rows_that_join_and_leave(toy) -> None:
    notes = Notes([])
    session = Session(toy(), [notes])
    session.add(torch.tensor([3, 4]), 2)
    session.step()
    session.add(torch.tensor([5, 6, 8]), 3)
    for _ in range(4):
        session.step()
    first, both, *_, last = notes.seen
    assert first["row"].tolist() == [4]
    assert both["row"].tolist() == [4, 8]
    assert both["answer"].tolist() == [[10, 11, -1], [10, 11, 12]]
    assert both["canvas"].tolist() == [[-2, 3, 4, 2, 2, -2], [5, 6, 8, 2, 2, 2]]
    assert both["object"] == [[0], [1]]
    assert last["answer"].tolist() == [[10, 11, 12]]
    assert last["object"] == [[1]]
    assert all(seen["ids"].tolist() == [7] for seen in notes.seen)


@dataclass(frozen=True)
class Longer(Strategy):
    """Puts a mask in front of the second position of the first row, once."""

    def resize(self, view: View) -> Tensor | None:
        if int(view.step.max()) != 1:
            return None
        rows = [[0, NEW, 1, 2, 3] if key == 0 else [0, 1, 2, 3, GONE] for key in view.keys]
        return torch.tensor(rows)


def test_memory_follows_positions_when_the_length_changes(toy, prompts) -> None:
    tokens, mask = prompts(2, 2)
    notes = Notes([])
    decode(toy(), tokens, 4, [Longer(), Blocks(2), notes], mask=mask)
    known = notes.seen[2]
    assert known["row"].tolist() == tokens[:, -1].tolist()
    assert known["answer"].tolist() == [[10, -1, 11, 12, 13], [10, 11, 12, 13, -1]]
    (a, b), (c, d) = tokens.tolist()
    assert known["canvas"].tolist() == [[a, b, 2, -2, 2, 2, 2], [c, d, 2, 2, 2, 2, -2]]


@dataclass(frozen=True)
class Careless(Strategy):
    """Stores something that was not declared like this."""

    name: str

    def begin(self, view: View) -> dict[str, Entry]:
        return {"row": PerRow(torch.zeros(len(view.tokens)))}

    def stop(self, view: View) -> Tensor:
        view.memory(self)[self.name] = torch.zeros(5)
        raise AssertionError("memory took what was not declared")


def test_memory_takes_what_was_declared(toy) -> None:
    with pytest.raises(KeyError, match="'other' was not declared by begin"):
        decode(toy(), torch.tensor([[3, 4]]), 4, [Careless("other")])
    with pytest.raises(ValueError, match=r"'row' is torch.float32 \[5\]; begin declared"):
        decode(toy(), torch.tensor([[3, 4]]), 4, [Careless("row")])
