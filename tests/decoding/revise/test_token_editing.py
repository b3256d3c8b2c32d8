import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.dystruct import Dystruct
from mmdlm.decoding.plans.ada_block import AdaBlock
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.preset import strategies
from mmdlm.decoding.revise.token_editing import TokenEditing
from mmdlm.decoding.strategy import Strategy
from mmdlm.model import MultimodalDLM

MASK, LENGTH, BLOCK = 2, 13, 4
PROMPTS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(4))


def slow(
    model: MultimodalDLM, prompt: Tensor, length: int, commit: float, tau: float, passes: int
) -> tuple[list[int], int, int]:
    """Tokens, forwards and edits by hand: everything recomputed, Python numbers."""
    tokens, known = prompt.tolist() + [MASK] * length, len(prompt)
    forwards = edits = 0
    for start in range(known // BLOCK * BLOCK, len(tokens), BLOCK):
        stop, extra = min(start + BLOCK, len(tokens)), 0
        mine = [i for i in range(start, stop) if i >= known]
        while mine:
            masked = [i for i in mine if tokens[i] == MASK]
            extra += not masked
            if extra > passes:
                break
            forwards += 1
            logits = model.logits(torch.tensor([tokens[:stop]]))[0].double()
            logits[:, MASK] = -torch.inf
            sure, best = (x.tolist() for x in logits.softmax(-1).max(-1))
            new = {i: best[i] for i in masked if sure[i] > commit}
            if masked and not new:
                top = max(masked, key=lambda i: (sure[i], -i))
                new = {top: best[top]}
            written = [i for i in mine if i not in masked]
            changed = {i: best[i] for i in written if sure[i] > tau and best[i] != tokens[i]}
            edits += len(changed)
            for i, token in (new | changed).items():
                tokens[i] = token
            if not masked and not changed:
                break
    return tokens, forwards, edits


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("commit", "tau", "passes"), [(0.1, 0.2, 16), (0.3, 0.15, 2), (0.05, 0.1, 0), (0.0, 0.1, 16)]
)
def test_editing_equals_a_decode_by_hand(
    commit: float, tau: float, passes: int, shift: bool, toy
) -> None:
    model = toy(attention="block_causal", block_size=BLOCK, shift=shift)
    chosen, total = [Dynamic(tau=commit), TokenEditing(tau, passes)], 0
    for prompt in (*PROMPTS, PROMPTS[0, :6]):
        tokens, forwards, edits = slow(model, prompt, LENGTH, commit, tau, passes)
        got = decode(model, prompt[None], LENGTH, chosen)
        assert got.tokens[0].tolist() == tokens
        assert got.nfe == forwards
        total += edits
    assert total > 0 or passes == 0  # otherwise the test shows nothing


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ({"attention": "block_causal", "block_size": 4}, []),
        ({"attention": "block_causal", "block_size": 4}, [BlockCache()]),
        ({"attention": "block_causal", "block_size": 4, "shift": True}, [Blocks(5)]),
        ({"shift": True}, [Blocks(5)]),
        ({}, [AdaBlock(4, 0.02, tuple(range(3, 30)), share=0.5)]),
        ({}, [Blocks(5), PrefixCache()]),
        ({"shift": True}, [Blocks(5), PrefixCache()]),
        ({}, [Blocks(5), DualCache()]),
        ({"shift": True}, [Blocks(5), DualCache()]),
        ({"attention": "block_causal", "block_size": 4, "shift": True}, [PrefixCache()]),
    ],
)
def test_a_row_in_a_batch_equals_the_row_alone(kind: dict, more: list, toy, prompts) -> None:
    model, sizes = toy(**kind), (7, 4, 6, 5)
    tokens, mask = prompts(*sizes)
    chosen = [Threshold(0.2), TokenEditing(0.12, 5), *more]
    batch = decode(model, tokens, LENGTH, chosen, mask=mask)
    plain = decode(model, tokens, LENGTH, [chosen[0], *more], mask=mask)
    assert not batch.tokens.equal(plain.tokens)  # otherwise the test shows nothing
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], LENGTH, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


def test_a_threshold_nothing_reaches_costs_one_forward_per_block(toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK)
    plain, edited = (
        decode(model, PROMPTS[:1], 12, [Dynamic(tau=0.3), *more])
        for more in ([], [TokenEditing(1.0)])
    )
    assert edited.tokens.equal(plain.tokens)
    assert edited.nfe == plain.nfe + 3


def test_given_tokens_are_never_edited(toy) -> None:
    model = toy(attention="block_causal", block_size=BLOCK)
    canvas = torch.full((4, LENGTH), MASK)
    canvas[:, 2], canvas[1, 5:9] = 9, 11
    got = decode(model, PROMPTS, LENGTH, [Threshold(0.2), TokenEditing(0.0)], canvas=canvas)
    assert got.tokens[:, :8].equal(PROMPTS)
    assert (got.tokens[:, 10] == 9).all()
    assert (got.tokens[1, 13:17] == 11).all()


def test_the_published_numbers_are_those_of_the_preset() -> None:
    chosen = strategies("llada21")
    assert Dynamic(32, 0.95) in chosen
    assert TokenEditing(0.9, 16) in chosen


def test_strategies_that_need_final_tokens_are_refused(toy) -> None:
    with pytest.raises(ValueError, match="Dystruct cannot be combined with TokenEditing"):
        decode(toy(), PROMPTS, LENGTH, [TokenEditing(), Dystruct()])


@pytest.mark.parametrize(
    ("given", "message"),
    [({"tau": -0.1}, "TokenEditing.tau is -0.1"), ({"passes": -1}, "TokenEditing.passes is -1")],
)
def test_bad_arguments_of_token_editing(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenEditing(**given)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("cache", [None, SubBlockCache()])
def test_open_positions_of_several_blocks_are_edited_as_alone(
    block_size: int, cache: Strategy | None, toy, prompts
) -> None:
    model = toy(attention="block_causal", block_size=block_size, shift=block_size == 1)
    tokens, mask = prompts(6, 5, 8)
    chosen = [Blocks(LENGTH), TokenEditing(0.1, passes=0), *([cache] if cache else [])]
    batch = decode(model, tokens, LENGTH, chosen, mask=mask)
    for i, size in enumerate((6, 5, 8)):
        alone = decode(model, tokens[i : i + 1, -size:], LENGTH, chosen)
        assert batch.tokens[i, 8:].equal(alone.tokens[0, size:])
        assert batch.history.confidence[i].allclose(alone.history.confidence[0], atol=1e-4)
