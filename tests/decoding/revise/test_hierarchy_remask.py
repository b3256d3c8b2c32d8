import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.hierarchy import Hierarchy
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.revise.hierarchy_remask import HierarchyRemask
from mmdlm.decoding.scores.entropy import Entropy

MASK = 2


def oracle(
    odds: list[float], sure: list[float], masked: list[bool], rule: HierarchyRemask
) -> tuple[set[int], set[int]]:
    """What takes its token and what becomes a mask again, word by word."""
    doubted = {i for i, p in enumerate(sure) if not masked[i] and p < rule.remask}
    member = [m or i in doubted for i, m in enumerate(masked)]
    takes, run = set(), []
    for i, inside in enumerate([*member, False]):
        if inside:
            run.append(i)
        elif run:
            best = max(run, key=lambda j: (odds[j], -j))
            takes |= {best} if rule.low is None or sure[best] > rule.low else set()
            run = []
    takes |= {i for i, m in enumerate(member) if m and rule.high and sure[i] > rule.high}
    rest = sorted((i for i, m in enumerate(member) if m and i not in takes), key=lambda i: -odds[i])
    takes |= set(rest[: max(0, len(doubted) + 1 - len(takes))])
    return takes, doubted - takes


@pytest.mark.parametrize("high", [None, 0.9])
@pytest.mark.parametrize("low", [None, 0.4, 0.7])
@pytest.mark.parametrize("remask", [0.0, 0.4, 0.8])
def test_doubts_commits_and_takes_back(
    high: float | None, low: float | None, remask: float, cases, softmax, moment
) -> None:
    rule = HierarchyRemask(high, low, remask)
    for logits, masked in cases(25):
        state = moment(logits, masked)
        state.writable[:, 1:] = True
        commits = rule.select(state) & masked
        edits, again = rule.edit(state), rule.revise(state)[:, 1:]
        assert not (edits & masked).any()
        for i, row in enumerate(logits.tolist()):
            sure = [max(softmax(z)) for z in row]
            limits = [t for t in (high, low, remask) if t is not None]
            if any(abs(p - t) < 1e-6 for p in sure for t in limits):
                continue  # float32 may see it on the other side
            takes, back = set(), set()
            if masked[i].any():  # a row without masks waits for others
                takes, back = oracle(state.log_odds[i].tolist(), sure, masked[i].tolist(), rule)
            assert set((commits | edits)[i].nonzero()[:, 0].tolist()) == takes
            assert set(again[i].nonzero()[:, 0].tolist()) == back
            before, after = int(masked[i].sum()), int((masked & ~commits | again)[i].sum())
            assert after < before or not before


def test_known_tokens_are_never_doubted(moment) -> None:
    logits = torch.zeros(1, 4, 9)  # the model is sure of nothing, and least of what is written
    logits[0, [0, 3], 1] = 0.1
    masked = torch.tensor([[True, False, False, True]])
    state, rule = moment(logits, masked), HierarchyRemask()
    state.writable[0, 2] = True
    assert rule.select(state).tolist() == [[True, False, False, True]]
    assert not rule.edit(state).any()
    assert rule.revise(state).tolist() == [[False, False, True, False, False]]


def test_the_best_mask_may_wait_beside_a_doubted_token(moment) -> None:
    # A mask and a doubted token in one run, a mask alone: sure by 0.35, 0.38 and 0.34.
    logits = torch.tensor([[0.35, 0.33, 0.32], [0.38, 0.31, 0.31], [1, 0, 0], [0.34, 0.33, 0.33]])
    masked = torch.tensor([[True, False, False, True]])
    state, rule = moment(logits.log()[None], masked), HierarchyRemask(None, None, 0.39)
    state.writable[:, 1:] = True
    assert rule.select(state)[0].tolist() == [False, True, False, True]
    assert rule.edit(state)[0].tolist() == [False, True, False, False]
    assert state.confidence.argmax() == 0
    assert rule.may_idle  # or the loop would add it


def lone(model, *strategies) -> Tensor:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    got = decode(model, prompt, 12, strategies)
    assert not (got.tokens == MASK).any()
    assert got.nfe <= 12
    return got.tokens


@pytest.mark.parametrize("shift", [False, True])
def test_without_doubt_it_is_the_hierarchy(shift: bool, toy) -> None:
    model = toy(shift=shift)
    plain, none = lone(model, Hierarchy(0.3, 0.1)), lone(model, HierarchyRemask(0.3, 0.1, 0.0))
    assert plain.equal(none)
    assert not plain.equal(lone(model, HierarchyRemask(0.3, 0.1, 0.3)))


@pytest.mark.parametrize("cache", [[], [PrefixCache()], [DualCache()]])
def test_ends_whatever_is_doubted(cache: list, toy) -> None:
    for remask in (0.2, 0.5, 1.5):  # `lone` also bounds the forwards
        tokens = lone(toy(), Blocks(4), HierarchyRemask(0.9, None, remask), *cache)
        assert not (tokens == MASK).any()


def test_its_own_score_is_said() -> None:
    with pytest.raises(ValueError, match="Entropy and HierarchyRemask both decide 'score'"):
        decode(None, torch.tensor([[3]]), 2, [Entropy(), HierarchyRemask()])
    with pytest.raises(ValueError, match="HierarchyRemask.remask is -1, expected a probability"):
        HierarchyRemask(remask=-1)
