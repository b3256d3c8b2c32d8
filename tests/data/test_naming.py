"""Names of the cells of an image, in samples and batches."""

import numpy as np
import pytest
import torch

from adapters.mlp import MLP
from encoders.vit import ViT
from encoders.whisper import WhisperEncoder
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data.collate import collate
from mmdlm.data.dataset import example
from mmdlm.data.naming import SHARE, cell_words
from mmdlm.data.scenes import Scene, Scenes, Shape, draw
from mmdlm.messages import Turn
from mmdlm.model import MultimodalDLM
from mmdlm.text import Tokenizer


def scenes_of(count):
    made = Scenes(seed=3)
    return [made.scene(i) for i in range(count)]


def phrase(shape):
    return (shape.size, shape.colour, shape.kind)


def of_cell(scene, row, column, side):
    """The words of one cell, pixel by pixel: the shape whose disc covers most pixel centres."""
    best, most = (), 0
    for shape in scene.shapes:
        held = 0
        for y in range(row * side, (row + 1) * side):
            for x in range(column * side, (column + 1) * side):
                held += (x + 0.5 - shape.x) ** 2 + (y + 0.5 - shape.y) ** 2 <= shape.radius**2
        if held > most and held >= SHARE * side**2:
            best, most = phrase(shape), held
    return best


def ink(scene, shape):
    """Pixels that a shape colours, bool [Y X]: where it differs from itself in another colour."""
    images = [
        draw(Scene((Shape(shape.kind, colour, shape.size, shape.x, shape.y, shape.radius),)))
        for colour in ("red", "green")
    ]
    return (images[0] != images[1]).any(-1)


@pytest.mark.parametrize("cells", [4, 8])
def test_cells_equal_counting_pixels(cells):
    for scene in scenes_of(12):
        side = 64 // cells
        want = [of_cell(scene, r, c, side) for r in range(cells) for c in range(cells)]
        assert list(cell_words(scene.shapes, cells, 64)) == want


def test_cells_agree_with_the_drawn_image():
    same = total = 0
    for scene in scenes_of(120):
        drawn = np.stack([ink(scene, shape) for shape in scene.shapes])
        shares = drawn.reshape(-1, 4, 16, 4, 16).mean((2, 4)).reshape(-1, 16)
        for words, share in zip(cell_words(scene.shapes, 4, 64), shares.T, strict=True):
            best = scene.shapes[share.argmax()]
            same += words == (phrase(best) if share.max() >= SHARE else ())
            total += 1
            if not words:  # thin tips extend beyond the disc of a shape
                assert share.max() < 0.2
    assert same / total > 0.9


def test_empty_cells_have_no_names():
    scene = Scene((Shape("circle", "red", "small", 8, 8, 5.0),))
    words = cell_words(scene.shapes, 4, 64)
    assert words == (("small", "red", "circle"), *[()] * 15)


@pytest.mark.parametrize("cells", [0, 5, -4])
def test_cells_that_do_not_divide_the_image_are_rejected(cells):
    with pytest.raises(ValueError, match=f"cells is {cells}, expected a divisor of 64"):
        cell_words(scenes_of(1)[0].shapes, cells, 64)


def test_samples_of_scenes_have_names_of_every_cell():
    scenes = Scenes(cells=4, size=32)
    sample = scenes.sample(5, np.random.default_rng(0))
    assert sample.names == cell_words(scenes.scene(5).shapes, 4, 64)
    assert len(sample.names) == 16
    assert {w for words in sample.names for w in words} <= set(scenes.vocabulary())
    assert Scenes().sample(5, np.random.default_rng(0)).names is None


def test_samples_of_digits_have_names_of_every_cell():
    pytest.importorskip("sklearn", reason='needs scikit-learn: pip install "mmdlm[data]"')
    from mmdlm.data.digits import Digits

    sample = Digits(cells=4).sample(2, np.random.default_rng(0))
    assert sample.names == ((sample.turns[0].answer,),) * 16
    assert Digits().sample(2, np.random.default_rng(0)).names is None


def build(words):
    tokenizer = Tokenizer.from_words(words)
    config = TransformerConfig(vocab=len(tokenizer), width=16, layers=1, heads=2, inner=16)
    encoders = {"image": ViT.tiny(), "audio": WhisperEncoder.tiny()}
    adapters = {name: MLP(encoder.dim, 16) for name, encoder in encoders.items()}
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0)
    return MultimodalDLM(spec, encoders, adapters, tokenizer)


def test_a_batch_holds_names_as_ids():
    scenes = Scenes(cells=4, size=32)
    model = build([*scenes.vocabulary(), "go", "left"])
    samples = [scenes.sample(i, np.random.default_rng(i)) for i in range(2)]
    batch = collate(model.processor, samples, torch.arange(2), torch.zeros(2).double())
    assert len(batch.names) == 2
    for sample, cells in zip(samples, batch.names, strict=True):
        assert all(ids.dtype == torch.int64 for ids in cells)
        back = [tuple(model.tokenizer.decode(ids.tolist()).split()) for ids in cells]
        assert tuple(back) == sample.names
        assert () in sample.names
    turns = [Turn("go", "left", 2)]
    spoken = example(turns, audio=WhisperEncoder.example(), names=("go", "left"))
    batch = collate(model.processor, [spoken], torch.arange(1), torch.zeros(1).double())
    assert batch.names[0].tolist() == [model.tokenizer.id("go"), model.tokenizer.id("left")]
    plain = example(turns, image=ViT.example())
    assert collate(model.processor, [plain], torch.arange(1), torch.zeros(1).double()).names == []
