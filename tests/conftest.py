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
