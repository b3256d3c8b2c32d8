"""Decoding where the weights lie on another device, see `pretend` in tests/conftest.py."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from mmdlm import discover
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.maskgit import MaskGIT
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.time_shift import TimeShift
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.decoding.scores.gumbel import Gumbel
from mmdlm.decoding.session import Session
from mmdlm.decoding.strategy import Strategy
from mmdlm.layout import Row
from mmdlm.model import MultimodalDLM

LENGTH = 8
STRATEGIES = discover.classes("mmdlm.decoding", Strategy)


@pytest.fixture
def there(pretend) -> Callable[..., tuple[Decoded, Any]]:
    """there(model, prompts, strategies): a decode of a model that lies on a pretended GPU."""

    def run(model: MultimodalDLM, given: tuple, strategies: list, **more: Any) -> Any:
        model = deepcopy(model)
        with pretend(model) as mode:
            tokens, mask = given
            got = decode(model, tokens, LENGTH, strategies, mask=mask, **more)
        return got, mode

    return run


KINDS = {
    "full": {},
    "shifted": {"shift": True},
    "prefix": {"attention": "prefix"},
    "own blocks": {"attention": "block_causal", "block_size": 4},
}


@pytest.mark.filterwarnings("ignore:AdaBlock")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_on_the_host_meets_the_device(name, kind, toy, there, prompts, seeds) -> None:
    model, strategies = toy(**KINDS[kind]), [STRATEGIES[name]()]
    tokens, mask = prompts(6, 3)
    try:
        want = decode(model, tokens, LENGTH, strategies, mask=mask, generator=seeds(0, 1))
    except ValueError:
        return  # not for this kind of model, see test_decode.py
    got, mode = there(model, (tokens, mask), strategies, generator=seeds(0, 1))
    assert not mode.mixed
    assert got.tokens.equal(want.tokens)
    assert got.nfe == want.nfe


FIXED = {
    "every token": [Blocks(4)],
    "two a step": [Blocks(4), TopK(4)],
    "prefix cache": [PrefixCache(), Blocks(4)],
    "dual cache": [DualCache(), Blocks(4)],
    "prefix-LM": [PrefixLM(), Blocks(4)],
    "cosine": [Blocks(4), MaskGIT(6)],
    "time shift": [Blocks(4), TimeShift(8)],
    "timesteps": [Blocks(4), Timesteps()],
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", FIXED)
def test_with_a_fixed_schedule_no_step_waits(name, shift, toy, there, prompts) -> None:
    model, given = toy(shift=shift), prompts(6, 3)
    got, mode = there(model, given, FIXED[name])
    assert got.tokens.equal(decode(model, given[0], LENGTH, FIXED[name], mask=given[1]).tokens)
    looks = [look for look in mode.looks if look.endswith("in left")]
    # At the start; then as each of the two blocks is done. A cache of a shifted family also checks
    # whether the first position of its block is written.
    cached = shift and any(isinstance(s, PrefixCache | DualCache) for s in FIXED[name])
    assert len(looks) == 3 + 2 * cached, mode.looks
    # The layout at the start (ids are checked on the host), its change by a strategy; at the end,
    # whether any was NaN.
    others = [look for look in mode.looks if look not in looks]
    layouts = 1 + (name == "prefix-LM")
    assert len(others) == 1 + 2 * layouts, others


def test_a_threshold_looks_once_a_step(toy, there, prompts) -> None:
    got, mode = there(toy(), prompts(6, 3), [DualCache(), Blocks(4), Threshold(0.2)])
    assert sum(look.endswith("in left") for look in mode.looks) == got.nfe + 1


def test_the_pretence_notices_what_a_gpu_would_refuse(toy, pretend) -> None:
    model = deepcopy(toy())
    with pretend(model) as mode:
        weight = model.backbone.embed.weight
        assert weight.device.type == "cuda"
        assert (2 * weight).device.type == "cuda"
        assert weight.cpu().device.type == "cpu"
        assert torch.zeros(3, device=weight.device).to(weight).device.type == "cuda"
        assert not mode.mixed
        weight[0] + torch.zeros(32)
        assert len(mode.mixed) == 1
        before = len(mode.looks)
        assert isinstance(weight[0, 0].item(), float)
        assert len(weight[weight > 0])
        assert len(mode.looks) == before + 2


def test_copies_of_requests_meet_nothing_on_the_host(toy, pretend) -> None:
    def run(model: MultimodalDLM) -> torch.Tensor:
        session = Session(model, [CFG(1.0), Blocks(4), Gumbel(1.0)])
        given = {"alternatives": {"text": torch.tensor([[9, 4]])}}
        generator = torch.Generator().manual_seed(1)
        session.add_rows(torch.tensor([[5, 6, 7]]), LENGTH, generator=generator, **given)
        for _ in range(3):
            session.advance(events=False)
        again = session.confidence(0) > 0
        session.fork(0)
        session.fork(0, generator=torch.Generator().manual_seed(2), again=again)
        while session.advance(events=False):
            pass
        return torch.stack([done.tokens for done in session.finished()])

    want, model = run(toy()), deepcopy(toy())
    with pretend(model) as mode:
        got = run(model)
    assert not mode.mixed
    assert got.equal(want)
    assert len({tuple(row) for row in want.tolist()}) == 2


def test_pruned_prompts_meet_nothing_on_the_host(toy, pretend) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(6, 32, generator=generator)

    def run(model: MultimodalDLM) -> torch.Tensor:
        rows = [Row((image.to(model.device), torch.tensor([5, 6]))), Row((image[:4], image[:1]))]
        prompt, other = (model.arrange([row]) for row in rows)
        chosen = [CFG(1.0), PruneMedia(0.5, layer=2, step=1)]
        return decode(model, prompt, LENGTH, chosen, alternatives={"text": other}).tokens

    want, model = run(toy()), deepcopy(toy())
    with pretend(model) as mode:
        got = run(model)
    assert not mode.mixed
    assert got.equal(want)
