"""Published folders that are changed on purpose, and a model with one part of each kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.action_bins import ActionBins
from adapters.mlp import MLP
from adapters.normalize import Normalizer
from adapters.pool import Pool
from adapters.robot import Robot
from encoders.state import StateEncoder
from encoders.vit import ViT
from encoders.whisper import WhisperEncoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.loading.shards import INDEX, SINGLE
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import recipe
from mmdlm.text import Tokenizer

STATISTICS = {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "min": [-2.0, -1.0], "max": [2.0, 3.0]}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for f in folder.glob("model*.safetensors") for k, v in load_file(f).items()}


@pytest.fixture
def published(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the golden folder of a family, to be changed."""

    def copy(family: str = "llada") -> Path:
        return Path(shutil.copytree(golden / "backbones" / family, tmp_path / family))

    return copy


@pytest.fixture
def weights_of() -> Callable[[Path], dict[str, Tensor]]:
    """A function that gives all tensors in a folder's files."""
    return _weights_of


@pytest.fixture
def rewrite() -> Callable[[Path, Change], Path]:
    """A function that makes one file of a folder's shards, with their tensors changed."""

    def write(folder: Path, change: Change = lambda weights: weights) -> Path:
        weights = change(_weights_of(folder))
        for file in [*folder.glob("model-*"), folder / INDEX]:
            file.unlink(missing_ok=True)
        save_file(weights, folder / SINGLE)
        return folder

    return write


@pytest.fixture
def configure() -> Callable[..., Path]:
    """A function that changes entries of a folder's config.json; `...` removes one."""

    def change(folder: Path, **changes: Any) -> Path:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {k: v for k, v in config.items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return change


@pytest.fixture
def same() -> Callable[[nn.Module, nn.Module], bool]:
    """A function that compares all tensors of two modules, bit by bit."""

    def compare(a: nn.Module, b: nn.Module) -> bool:
        first, second = a.state_dict(), b.state_dict()
        return first.keys() == second.keys() and all(
            torch.equal(first[k], second[k]) for k in first
        )

    return compare


@pytest.fixture(scope="session")
def multimodal() -> Callable[[], MultimodalDLM]:
    """A function that makes an untrained model that sees, hears and acts."""

    def make() -> MultimodalDLM:
        tokenizer = Tokenizer.from_words(["what", "is", "this", "?"], actions=8)
        spec = Spec(
            family="llada",
            transformer=TransformerConfig(
                vocab=len(tokenizer), width=16, layers=2, heads=2, inner=24, theta=123.25
            ),
            mask_id=2,
            eos_id=1,
            pad_id=0,
            stop_ids=(5,),
            attention="cascade",
            block_size=4,
        )
        normalizer = Normalizer(STATISTICS)
        robot = Robot(ActionBins(8, last_id=len(tokenizer) - 1), normalizer, normalizer, chunk=2)
        encoders = {
            "image": ViT.tiny(),
            "audio": WhisperEncoder.tiny(),
            "state": StateEncoder.tiny(),
        }
        adapters = {"image": Pool(32, 16), "audio": MLP(64, 16), "state": MLP(32, 16, layers=1)}
        model = MultimodalDLM(spec, encoders, adapters, tokenizer, robot)
        model.backbone.reset(torch.Generator().manual_seed(0))
        model.preset = {
            "caption": {
                "prompt": "a b",
                "length": 8,
                "strategies": [recipe(Blocks(4)), recipe(Threshold(0.75))],
            },
            "act": {"execute": 4},
        }
        return model.eval()

    return make
