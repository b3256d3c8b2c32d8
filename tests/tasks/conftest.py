import numpy as np
import pytest
import torch
from PIL import Image

from adapters.mlp import MLP
from encoders.vit import ViT
from encoders.whisper import WhisperEncoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer

WORDS = "a and blue circle describe is it left of picture red say square the what yes no ? ,"
STEPS = [{"class_path": "mmdlm.decoding.commits.top_k.TopK", "init_args": {"steps": 3}}]


def build(seed: int = 0, attention: str = "cascade", shift: bool = False) -> MultimodalDLM:
    """An untrained model with image and audio encoders and task defaults."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_words(WORDS.split())
    config = TransformerConfig(vocab=len(tokenizer), width=32, layers=2, heads=2, inner=64)
    ends = {"mask_id": 2, "eos_id": 1, "pad_id": 0}
    encoders = {"image": ViT.tiny(), "audio": WhisperEncoder.tiny()}
    adapters = {name: MLP(encoder.dim, 32) for name, encoder in encoders.items()}
    spec = Spec("mmdlm", config, **ends, attention=attention, shift=shift)
    model = MultimodalDLM(spec, encoders, adapters, tokenizer)
    model.backbone.reset(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # large enough that media change the output
        for weight in model.backbone.blocks.parameters():
            weight *= 8 if weight.ndim > 1 else 1
        for weight in model.adapters.parameters():
            weight *= 20
    model.preset = {
        "caption": {"prompt": "describe the picture", "length": 6, "strategies": STEPS},
        "answer": {"prompt": None, "length": 4, "strategies": STEPS},
        "transcribe": {"prompt": "say it", "length": 5, "strategies": STEPS},
        "infill": {"prompt": "describe the picture", "length": 8, "strategies": []},
    }
    return model.eval()


@pytest.fixture(scope="session")
def make_model():
    return build


@pytest.fixture
def model() -> MultimodalDLM:
    return build()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> list[str]:
    """Five different PNG files."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """Number of items of every call of the image encoder."""
    sizes: list[int] = []
    forward = model.encoders["image"].forward

    def counted(items):
        sizes.append(len(items))
        return forward(items)

    monkeypatch.setattr(model.encoders["image"], "forward", counted)
    return sizes
