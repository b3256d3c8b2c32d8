"""What holds for every test: no network, one thread, fixed seeds, global torch state put back."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

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
    """Seeds every generator, and puts the global switches of torch back afterwards."""
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
    """The folder of numbers recorded from reference code."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def build():
    """A function that makes an untrained policy for the toy, with words for all bundled data."""
    from adapters.action_bins import ActionBins
    from adapters.mlp import MLP
    from adapters.normalize import Normalizer
    from adapters.robot import Robot
    from encoders.state import StateEncoder
    from encoders.vit import ViT
    from encoders.whisper import WhisperEncoder
    from mmdlm.backbones.family import Spec
    from mmdlm.backbones.transformer import TransformerConfig
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
    """A function that makes a model which spells text byte by byte, with markers as tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from mmdlm.backbones.family import Spec
    from mmdlm.backbones.transformer import TransformerConfig
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
