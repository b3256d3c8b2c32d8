"""What strategies know when an answer changes its length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.credit import Credit
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.state import DecodeState
from mmdlm.decoding.strategy import Strategy


@dataclass(frozen=True)
class Longer(Strategy):
    """Puts a mask in front of the second position of the first row, once."""

    def resize(self, state: DecodeState) -> Tensor | None:
        if state.step != 1:
            return None
        keep = [*range(4), state.GONE]
        rows = [[0, state.NEW, 1, 2, 3] if row == 0 else keep for row in state.rows]
        return torch.tensor(rows)


@dataclass(frozen=True)
class Notes(Strategy):
    """Numbers rows and positions, and says what became of the numbers."""

    def begin(self, state: DecodeState) -> None:
        rows, length = state.tokens.shape
        state.memory[self, "row"] = torch.full((rows,), -1)
        state.memory[self, "answer"] = torch.full((rows, length - state.prompt, 2), -1)
        state.memory[self, "canvas"] = torch.full((rows, length), -1)
        state.memory[self, "number"] = 7

    def stop(self, state: DecodeState) -> Tensor:
        if state.step == 0:
            state.memory[self, "row"] = torch.tensor([10, 20])
            state.memory[self, "answer"] = torch.arange(16).view(2, 4, 2)
            state.memory[self, "canvas"] = torch.arange(12).view(2, 6)
            state.memory[self, "number"] = 8
            state.memory[self, "late"] = torch.ones(2, 4)
        if state.step == 2:
            seen.append({key[1]: value for key, value in state.memory.items() if key[0] == self})
        return torch.zeros(len(state.tokens), dtype=torch.bool)


seen: list[dict] = []


def test_what_was_set_up_at_the_beginning_moves_with_its_positions(toy, prompts) -> None:
    seen.clear()
    tokens, mask = prompts(2, 2)
    decode(toy(), tokens, 4, [Longer(), Notes()], mask=mask)
    (known,) = seen
    assert known["row"].tolist() == [10, 20]
    first, second = known["answer"].tolist()
    assert first == [[0, 1], [-1, -1], [2, 3], [4, 5], [6, 7]]
    assert second == [[8, 9], [10, 11], [12, 13], [14, 15], [-1, -1]]
    assert known["canvas"].tolist() == [[0, 1, 2, -1, 3, 4, 5], [6, 7, 8, 9, 10, 11, -1]]
    assert known["number"] == 7  # not a tensor: as at the beginning
    assert "late" not in known


def test_a_row_beside_one_that_grows_keeps_its_credit(toy, prompts) -> None:
    model, strategies = toy(), [DAEDAL(growth=3.0, expansion=2, check=2), Credit(alpha=2.0)]
    grown = 0
    tokens, mask = prompts(7, 5, 3)
    both = decode(model, tokens, 6, strategies, mask=mask)
    for i, size in enumerate((7, 5, 3)):
        alone = decode(model, tokens[i : i + 1, -size:], 6, strategies)
        answer = alone.tokens[0, size:]
        assert both.tokens[i, 7 : 7 + len(answer)].equal(answer)
        assert both.history.confidence[i, : len(answer)].allclose(
            alone.history.confidence[0], atol=1e-4
        )
        grown += len(answer) > 6
    assert grown
