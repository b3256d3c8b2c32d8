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
    """Which positions take their candidate and which become masks again, step by step."""
    uncertain = {i for i, p in enumerate(sure) if not masked[i] and p < rule.remask}
    member = [m or i in uncertain for i, m in enumerate(masked)]
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
    takes |= set(rest[: max(0, len(uncertain) + 1 - len(takes))])
    return takes, uncertain - takes


@pytest.mark.parametrize("high", [None, 0.9])
@pytest.mark.parametrize("low", [None, 0.4, 0.7])
@pytest.mark.parametrize("remask", [0.0, 0.4, 0.8])
def test_commits_edits_and_remasks(
    high: float | None, low: float | None, remask: float, cases, softmax, moment
) -> None:
    rule = HierarchyRemask(high, low, remask)
    for logits, masked in cases(25):
        view = moment(logits, masked, rule)
        view.writable[:, 1:] = True
        commits = rule.select(view) & masked
        edits, again = rule.edit(view), rule.revise(view)[:, 1:]
        assert not rule.edit(view).any()  # they are returned once
        assert not (edits & masked).any()
        for i, row in enumerate(logits.tolist()):
            sure = [max(softmax(z)) for z in row]
            limits = [t for t in (high, low, remask) if t is not None]
            if any(abs(p - t) < 1e-6 for p in sure for t in limits):
                continue  # float32 may round to the other side
            takes, back = set(), set()
            if masked[i].any():  # a full block is finished
                takes, back = oracle(view.log_odds[i].tolist(), sure, masked[i].tolist(), rule)
            assert set((commits | edits)[i].nonzero()[:, 0].tolist()) == takes
            assert set(again[i].nonzero()[:, 0].tolist()) == back
            before, after = int(masked[i].sum()), int((masked & ~commits | again)[i].sum())
            assert after < before or not before


def test_given_tokens_are_never_remasked(moment) -> None:
    logits = torch.zeros(1, 4, 9)  # all probabilities are low, those of written positions lowest
    logits[0, [0, 3], 1] = 0.1
    masked = torch.tensor([[True, False, False, True]])
    rule = HierarchyRemask()
    view = moment(logits, masked, rule)
    view.writable[0, 2] = True
    assert rule.select(view).tolist() == [[True, False, False, True]]
    assert not rule.edit(view).any()
    assert rule.revise(view).tolist() == [[False, False, True, False, False]]


def test_an_uncertain_token_may_commit_instead_of_the_best_mask(moment) -> None:
    # A mask and an uncertain token in one run, a mask alone; probabilities 0.35, 0.38 and 0.34.
    logits = torch.tensor([[0.35, 0.33, 0.32], [0.38, 0.31, 0.31], [1, 0, 0], [0.34, 0.33, 0.33]])
    masked = torch.tensor([[True, False, False, True]])
    rule = HierarchyRemask(None, None, 0.39)
    view = moment(logits.log()[None], masked, rule)
    view.writable[:, 1:] = True
    assert rule.select(view)[0].tolist() == [False, True, False, True]
    assert rule.edit(view)[0].tolist() == [False, True, False, False]
    assert view.confidence.argmax() == 0
    assert rule.may_idle  # or the loop would add it


def decoded(model, *strategies) -> Tensor:
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    got = decode(model, prompt, 12, strategies)
    assert not (got.tokens == MASK).any()
    assert max(got.forwards) <= 12
    return got.tokens


@pytest.mark.parametrize("shift", [False, True])
def test_without_remasking_it_is_the_hierarchy(shift: bool, toy) -> None:
    model = toy(shift=shift)
    plain = decoded(model, Hierarchy(0.3, 0.1))
    assert plain.equal(decoded(model, HierarchyRemask(0.3, 0.1, 0.0)))
    assert not plain.equal(decoded(model, HierarchyRemask(0.3, 0.1, 0.3)))


@pytest.mark.parametrize("cache", [[], [PrefixCache()], [DualCache()]])
def test_ends_however_many_are_remasked(cache: list, toy) -> None:
    for remask in (0.2, 0.5, 1.5):  # `decoded` also bounds the forwards
        tokens = decoded(toy(), Blocks(4), HierarchyRemask(0.9, None, remask), *cache)
        assert not (tokens == MASK).any()


@pytest.mark.parametrize("cache", [[], [PrefixCache()], [DualCache()]])
@pytest.mark.parametrize("shift", [False, True])
def test_a_row_in_a_batch_equals_the_row_alone(shift: bool, cache: list, toy, prompts) -> None:
    tokens, mask = prompts(7, 4, 6)
    model, chosen = toy(shift=shift), [Blocks(4), HierarchyRemask(0.3, 0.1, 0.3), *cache]
    batch = decode(model, tokens, 12, chosen, mask=mask)
    for i, size in enumerate((7, 4, 6)):
        alone = decode(model, tokens[i : i + 1, -size:], 12, chosen)
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


def test_bad_combinations_and_arguments(toy) -> None:
    with pytest.raises(ValueError, match="Entropy and HierarchyRemask both decide 'score'"):
        decode(toy(), torch.tensor([[3]]), 2, [Entropy(), HierarchyRemask()])
    with pytest.raises(ValueError, match="HierarchyRemask.remask is -1, expected a probability"):
        HierarchyRemask(remask=-1)
