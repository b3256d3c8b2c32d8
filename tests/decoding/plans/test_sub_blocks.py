import pytest
import torch
from torch import Tensor

from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.model import MultimodalDLM

MASK, EOS, BLOCK = 2, 1, 8
PROMPT = torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(4))


def parts(size: int, prompt: int, length: int, shift: bool) -> list[list[int]]:
    """Answer positions opened together, in order, by hand."""
    found: list[list[int]] = []
    for start in range(prompt // BLOCK * BLOCK, prompt + length, BLOCK):
        block = list(range(start, min(start + BLOCK, prompt + length)))
        pieces = [block[i : i + size] for i in range(0, len(block), size)]
        if shift:
            pieces = [block[:1], pieces[0][1:], *pieces[1:]]
        found += [[i - prompt for i in piece if i >= prompt] for piece in pieces]
    return [part for part in found if part]


def slow(model: MultimodalDLM, prompt: Tensor, length: int, size: int, tau: float) -> list[int]:
    """The answer by hand: everything recomputed for every step, Python numbers."""
    tokens, known, shift = prompt.tolist() + [MASK] * length, len(prompt), model.spec.shift
    for part in parts(size, known, length, shift):
        stop = min((known + part[0]) // BLOCK * BLOCK + BLOCK, len(tokens))
        while masked := [known + i for i in part if tokens[known + i] == MASK]:
            logits = model.logits(torch.tensor([tokens[:stop]]))[0].double()
            logits[:, MASK] = -torch.inf
            sure, best = (x.tolist() for x in logits.softmax(-1).max(-1))
            top = max(masked, key=lambda i: (sure[i], -i))
            for i in masked:
                if sure[i] > tau or i == top:
                    tokens[i] = best[i]
    return tokens


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("size", "known"), [(4, 11), (3, 8), (8, 6), (1, 9), (99, 16)])
def test_a_block_is_opened_part_by_part(size: int, known: int, shift: bool, toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=shift)
    steps = decode(model, PROMPT[:, :known], 14, [SubBlocks(size), Threshold(0.0)]).history.step
    found = [(steps[0] == i).nonzero()[:, 0].tolist() for i in range(int(steps.max()) + 1)]
    assert found == parts(size, known, 14, shift)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("size", "known", "tau"), [(4, 11, 0.2), (4, 16, 0.3), (3, 5, 0.15)])
def test_a_decode_in_parts_is_what_it_is_by_hand(
    size: int, known: int, tau: float, shift: bool, toy
) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=shift)
    got = decode(model, PROMPT[:, :known], 17, [SubBlocks(size), Dynamic(tau=tau)])
    assert got.tokens[0].tolist() == slow(model, PROMPT[0, :known], 17, size, tau)


def test_the_first_position_of_a_block_is_scored_by_what_stores_the_block_before(
    toy, watch
) -> None:
    model = toy(attention="block_causal", block_size=4, shift=True)
    forwards = watch(model)
    decode(model, PROMPT[:, :4], 9, [SubBlocks(2), Threshold(0.0)])
    # Blocks of 4 in parts of 2: one position alone, the rest of its part, the other part.
    at = [(4, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 12), (12, 13)]
    assert [f.read for f in forwards] == at
    rows = [(0, 4), (4, 8), (4, 8), (4, 8), (8, 12), (8, 12), (8, 12)]
    assert [f.rows for f in forwards] == rows


@pytest.mark.parametrize("kind", [{}, {"shift": True}, {"attention": "prefix", "block_size": 6}])
def test_other_models_have_their_answer_opened_in_parts(kind: dict, toy) -> None:
    steps = decode(toy(**kind), PROMPT[:, :5], 10, [SubBlocks(4), Threshold(0.0)]).history.step
    blocks = (
        [[0] * 4 + [1] * 2 + [2] * 4] if "block_size" in kind else [[0] * 4 + [1] * 4 + [2] * 2]
    )
    assert steps.tolist() == blocks


def test_steps_are_shared_by_the_size_of_a_part(toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK)
    # 8 steps for 16 positions are 2 for a part of 4, and 4 for a whole block.
    got = decode(model, PROMPT[:, :8], 16, [SubBlocks(4), TopK(8)]).history.step[0]
    assert got.bincount().tolist() == [2] * 8
    assert [set(part.tolist()) for part in got.split(4)] == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


@pytest.mark.parametrize("shift", [False, True])
def test_blocks_behind_the_end_of_all_texts_are_not_computed(shift: bool, toy, watch) -> None:
    model = toy(attention="block_causal", block_size=4, shift=shift)
    forwards = watch(model)
    prompt = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(2))
    chosen = [SubBlocks(2), Dynamic(tau=0.3), EndOfText()]
    got = decode(model, prompt, 200, chosen, columns=slice(0, 6)).tokens[:, 5:]
    last = max(row.index(EOS) for row in got.tolist())
    block = (5 + last) // 4 * 4 + 4
    assert block < 100
    assert max(f.rows[1] for f in forwards) <= block
    assert all((row[row.index(EOS) :].count(EOS)) == 200 - row.index(EOS) for row in got.tolist())


def test_the_size_of_a_part_must_be_positive() -> None:
    with pytest.raises(ValueError, match="SubBlocks.size is 0, expected at least 1"):
        SubBlocks(0)
