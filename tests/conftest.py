"""Setup of every test: no network, one thread, fixed seeds, global torch state restored."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Timings on shared machines vary too much for deadlines; the same examples each run.
hypothesis.settings.register_profile("mmdlm", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mmdlm")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("sim") and not all(map(find_spec, ("gymnasium", "metaworld"))):
        pytest.skip('needs the simulators: pip install "mmdlm[sim]"')


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seeds every generator, and restores the global state of torch afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, threads, grad = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden values recorded from reference code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def build():
    """build(...): an untrained policy for the toy, with a vocabulary for all bundled data."""
    from adapters.action_bins import ActionBins
    from adapters.mlp import MLP
    from adapters.normalize import Normalizer
    from adapters.robot import Robot
    from encoders.state import StateEncoder
    from encoders.vit import ViT
    from encoders.whisper import WhisperEncoder
    from mmdlm.backbones.config import TransformerConfig
    from mmdlm.backbones.family import Spec
    from mmdlm.data import digits, scenes, speech
    from mmdlm.model import MultimodalDLM
    from mmdlm.text import Tokenizer

    known = {*scenes.Scenes().vocabulary(), *digits.WORDS, *digits.QUESTION.split()}
    known |= {
        *speech.words(),
        *["go", "to", "the", "red", "green", "blue", "disc", "close", "drawer"],
    }

    def make(seed=0, size=2, audio=False, **spec):
        tokenizer = Tokenizer.from_words(sorted(known), actions=16)
        config = TransformerConfig(
            vocab=len(tokenizer), width=32, layers=1, heads=2, inner=64, qk_norm="head"
        )
        ends = {"mask_id": 2, "eos_id": 1, "pad_id": 0, "attention": "cascade"}
        unit = Normalizer({"q01": [-1.0] * size, "q99": [1.0] * size})
        robot = Robot(
            ActionBins(16, last_id=len(tokenizer) - 1, reverse=False), unit, unit, chunk=3
        )
        torch.manual_seed(seed)
        encoders = {
            "image": ViT(size=32, patch=8, dim=32, depth=1, heads=2),
            "state": StateEncoder(size, dim=32),
        }
        if audio:
            encoders["audio"] = WhisperEncoder(32, 1, 2, seconds=None, positions=200)
        adapters = {name: MLP(32, 32, layers=1) for name in encoders}
        model = MultimodalDLM(
            Spec("mmdlm", config, **ends | spec), encoders, adapters, tokenizer, robot
        )
        model.backbone.reset(torch.Generator().manual_seed(seed))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def speller():
    """speller(...): a model with a byte-level vocabulary and markers as tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from mmdlm.backbones.config import TransformerConfig
    from mmdlm.backbones.family import Spec
    from mmdlm.model import MultimodalDLM
    from mmdlm.text import Tokenizer

    def make(special=(), added=(), own=None, names=None, **spec):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        first = [AddedToken(text, special=True) for text in ("<|pad|>", "<|end|>", "<|mask|>")]
        backend.add_tokens([*first, *(AddedToken(text, special=True) for text in special)])
        backend.add_tokens([AddedToken(text, special=False) for text in added])
        tokenizer = Tokenizer(backend, own, names)
        config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=24)
        ids = {"pad_id": 256, "eos_id": 257, "mask_id": 258}
        model = MultimodalDLM(Spec("mmdlm", config, **ids | spec), tokenizer=tokenizer)
        model.backbone.reset(torch.Generator().manual_seed(0))
        return model.eval()

    return make


THERE, HERE = torch.device("cuda", 0), torch.device("cpu")
# Functions whose result or output size depends on values (host syncs).
LOOKS = {
    *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal"),
    *("nonzero", "masked_select", "unique", "allclose"),
}
# Functions that accept tensors of both devices: indexing and copies.
BETWEEN = {"__getitem__", "__setitem__", "copy_", "to", "device", "__get__"}


class Pretend(TorchFunctionMode):
    """Tracks which tensors are on the fake device."""

    def __init__(self, model: torch.nn.Module) -> None:
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
        drawn = kwargs.get("generator") is not None  # a generator is on the device of its output
        if any(there) or drawn or (asked is not None and torch.device(asked).type == "cuda"):
            mark(result)
        return result

    def _moved(self, name: str, args: tuple, kwargs: dict) -> Tensor:
        """Copy on the requested device."""
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
    """Line of our code that called torch."""
    frame = sys._getframe(2)
    while "/mmdlm/" not in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    name = frame.f_code.co_filename.rpartition("/")[2]
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> type[Pretend]:
    """Pretend(model): within it, the weights of a model lie on a GPU that is not there.

    Every call of torch is watched. A tensor that comes from the weights, or was moved to them, is
    "there", and so is what is computed from it; the rest is on the host. Noted are calls that mix
    both, which a GPU refuses (`mixed`), and calls that bring a value to the host, which wait for
    it (`looks`).
    """

    class Anywhere(torch.Generator):
        def __new__(cls, device: object = None) -> torch.Generator:
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Anywhere)
    return Pretend
