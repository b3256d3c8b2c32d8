"""No GPU is needed to see what would stop on one: tensors that say they lie on another device.

Every call of torch is watched. A tensor that comes from the model's weights, or was moved to them,
is "there", and so is what is computed from it; the rest is on the host. Noted are calls that mix
both, which a GPU refuses, and calls that bring a value to the host, which wait for it.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mmdlm import discover
from mmdlm.backbones import recorded
from mmdlm.decoding.blocks import Blocks
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.dual_cache import DualCache
from mmdlm.decoding.maskgit import MaskGIT
from mmdlm.decoding.prefix_cache import PrefixCache
from mmdlm.decoding.prefix_lm import PrefixLM
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.threshold import Threshold
from mmdlm.decoding.time_shift import TimeShift
from mmdlm.decoding.timesteps import Timesteps
from mmdlm.decoding.top_k import TopK
from mmdlm.model import MultimodalDLM

LENGTH = 8
THERE, HERE = torch.device("cuda", 0), torch.device("cpu")
STRATEGIES = discover.classes("mmdlm.decoding", Strategy)
# To a value, or to a size that depends on values.
LOOKS = {
    *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal"),
    *("nonzero", "masked_select", "unique", "allclose"),
}
# What takes tensors of both sides: indices, and copies from one to the other.
BETWEEN = {"__getitem__", "__setitem__", "copy_", "to", "device", "__get__"}


class Pretend(TorchFunctionMode):
    """Knows which tensors are "there"."""

    def __init__(self, model: MultimodalDLM) -> None:
        super().__init__()
        self.looks: list[str] = []
        self.mixed: list[str] = []
        for weight in [*model.parameters(), *model.buffers()]:
            weight.is_there = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [is_there(x) for x in tensors]
        if func == torch.Tensor.device.__get__:
            return THERE if there[0] else HERE
        if func == torch.Tensor.is_cuda.__get__:
            return there[0]
        if name in ("cpu", "to"):
            return self._moved(name, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = HERE
        bare = [isinstance(x, Tensor) and x.ndim > 0 for x in tensors]
        sides = {side for side, counts in zip(there, bare, strict=True) if counts}
        if len(sides) > 1 and name not in BETWEEN:
            self.mixed.append(f"{name} {where()}")
        by_flags = name in ("__getitem__", "__setitem__") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool and is_there(x)
            for x in tree_leaves(args[1])
        )
        if (name in LOOKS and any(there)) or (by_flags and name == "__getitem__"):
            self.looks.append(f"{name} {where()}")
        result = func(*args, **kwargs)
        drawn = kwargs.get("generator") is not None  # which lies where it draws
        if any(there) or drawn or (asked is not None and torch.device(asked).type == "cuda"):
            mark(result)
        return result

    def _moved(self, name: str, args: tuple, kwargs: dict) -> Tensor:
        """A copy on the asked side."""
        x, given = args[0], [*args[1:], *kwargs.values()]
        places = [torch.device(g) for g in given if isinstance(g, torch.device | str)]
        places += [THERE if is_there(g) else HERE for g in given if isinstance(g, Tensor)]
        if name == "cpu":
            places = [HERE]
        kinds = [g if isinstance(g, torch.dtype) else g.dtype for g in given if has_type(g)]
        goes = is_there(x) if not places else places[0].type == "cuda"
        if is_there(x) and not goes:
            self.looks.append(f"{name} {where()}")
        result = x.clone()
        if kinds:
            result = result.to(kinds[0])
        result.is_there = goes
        return result


def has_type(given: Any) -> bool:
    return isinstance(given, torch.dtype | Tensor)


def is_there(x: Tensor) -> bool:
    return getattr(x, "is_there", False)


def mark(result: Any) -> None:
    for x in tree_leaves(result):
        if isinstance(x, Tensor):
            x.is_there = True


def where() -> str:
    """The line of ours that called torch."""
    frame = sys._getframe(2)
    while "/mmdlm/" not in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    name = frame.f_code.co_filename.rpartition("/")[2]
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


@pytest.fixture
def there(toy, monkeypatch) -> Callable[..., tuple[Decoded, Pretend]]:
    """there(model, prompts, strategies): a decode of a model that lies on a pretended GPU."""

    class Anywhere(torch.Generator):
        def __new__(cls, device: object = None) -> torch.Generator:
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Anywhere)

    def run(model: MultimodalDLM, given: tuple, strategies: list, **more: Any) -> Any:
        model = deepcopy(model)
        with Pretend(model) as mode:
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
    # At the start; then as each of the two blocks is done. A cache of a shifted family also looks
    # whether the first position of its block is written; a table, after the step that made it.
    cached = shift and any(isinstance(s, PrefixCache | DualCache) for s in FIXED[name])
    table = any(isinstance(s, MaskGIT | TimeShift) for s in FIXED[name])
    assert len(looks) == 3 + 2 * cached + 2 * table, mode.looks
    # The layout at the start, its change by a strategy, tables; at the end, whether any was NaN.
    others = [look for look in mode.looks if look not in looks]
    layouts = 1 + (name == "prefix-LM")
    assert len(others) == 1 + 2 * layouts + 2 * table, others


def test_a_threshold_looks_once_a_step(toy, there, prompts) -> None:
    got, mode = there(toy(), prompts(6, 3), [DualCache(), Blocks(4), Threshold(0.2)])
    assert sum(look.endswith("in left") for look in mode.looks) == got.nfe + 1


@pytest.mark.parametrize("shift", [False, True])
def test_what_is_recorded_waits_for_nothing(shift, toy, there, prompts, monkeypatch) -> None:
    calls: list[int] = []

    def record(forward: Callable[[], Tensor], device: torch.device) -> tuple[Callable, Tensor]:
        assert device == THERE
        logits = forward()

        def replay() -> None:
            calls.append(1)
            logits.copy_(forward())

        return replay, logits

    monkeypatch.setattr(recorded, "record", record)
    model, given, strategies = toy(shift=shift), prompts(6, 3), [DualCache(), Blocks(4)]
    want = decode(model, given[0], LENGTH, strategies, mask=given[1])
    model = deepcopy(model)
    model.backbone.pool = recorded.Pool()
    got, mode = there(model, given, strategies)
    assert calls
    assert not mode.mixed
    assert got.tokens.equal(want.tokens)
    assert len([look for look in mode.looks if "state.py" not in look]) == 1, mode.looks
