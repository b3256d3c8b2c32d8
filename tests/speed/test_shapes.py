import pytest
import torch

from mmdlm.backbones.family import Spec
from mmdlm.model import MultimodalDLM
from tests.speed.plain import Plain
from tests.speed.shapes import (
    LLADA_8B,
    SHAPES,
    Shape,
    find,
    padded,
    prompts,
    synthetic,
)

TINY = SHAPES["tiny"].transformer


@pytest.fixture(scope="module")
def model():
    return synthetic(TINY)


@pytest.mark.parametrize(
    ("name", "sizes", "rows", "length", "block", "steps"),
    [
        ("tiny", (128, 2, 4, 352, 1024), (32,), 32, 16, 8),
        ("cap256", (512, 8, 8, 1408, 32_768), (256,), 64, 32, 16),
        ("cap768", (512, 8, 8, 1408, 32_768), (768,), 64, 32, 8),
        ("cap256v126", (512, 8, 8, 1408, 126_464), (256,), 64, 32, 8),
        ("bat4", (512, 8, 8, 1408, 32_768), (128, 128, 128, 128), 64, 32, 8),
        ("bat4r", (512, 8, 8, 1408, 32_768), (64, 96, 160, 192), 64, 32, 8),
        ("act562-4", (512, 8, 8, 1408, 32_768), (562,), 56, 56, 4),
        ("llada8b-3709-keep25", (4096, 32, 32, 12_288, 126_464), (975,), 64, 32, 16),
        ("dream7b-178-1-b16", (3584, 28, 28, 18_944, 152_064), (178,) * 16, 58, 58, 1),
    ],
)
def test_table_of_shapes(name, sizes, rows, length, block, steps):
    shape = SHAPES[name]
    config = shape.transformer
    assert (config.width, config.layers, config.heads, config.inner, config.vocab) == sizes
    assert (shape.prompts, shape.length, shape.block, shape.steps) == (rows, length, block, steps)


def test_every_shape_has_an_even_schedule():
    for name, shape in SHAPES.items():
        assert shape.name == name
        assert shape.schedule.blocks >= 1
        assert (shape.columns is not None) == shape.limited
    assert SHAPES["thr256"].threshold == 0.2
    assert SHAPES["act178-1-ids256"].columns == slice(16_384, 16_640)


def test_name_selects_its_variants():
    assert [s.name for s in find(["cap256"])] == ["cap256"]
    assert [s.name for s in find(["llada8b-3709"])] == ["llada8b-3709"]
    variants = [s.name for s in find(["act178"])]
    assert variants == ["act178-1", "act178-1-ids256", "act178-4", "act178-4-ids256"]
    assert [s.name for s in find(["act178-4", "tiny", "act178-4"])] == ["act178-4", "tiny"]


def test_error_for_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no shape 'cap25'; did you mean cap256.* known: tiny, "):
        find(["cap25"])
    with pytest.raises(ValueError, match="no shape is named"):
        find([])


def test_weights_have_the_stated_scales(model):
    weights = dict(model.backbone.named_parameters())
    assert weights["embed.weight"].std().item() == pytest.approx(1, rel=0.02)
    assert weights["out.weight"].std().item() == pytest.approx(4 / 128**0.5, rel=0.02)
    assert not weights["out.weight"][model.spec.mask_id].any()
    q, k, v = weights["blocks.0.attn.qkv.weight"].chunk(3)
    for part, scale in ((q, 1.6), (k, 1.6), (v, 1.0)):
        assert part.std().item() == pytest.approx(scale / 128**0.5, rel=0.03)
    assert weights["blocks.1.attn.o.weight"].std().item() == pytest.approx(0.5 / 128**0.5, rel=0.03)
    assert weights["blocks.1.mlp.down.weight"].std().item() == pytest.approx(
        0.5 / 352**0.5, rel=0.03
    )
    assert weights["blocks.1.mlp.gate_up.weight"].std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert weights["norm.weight"].eq(1).all()


def test_weights_depend_only_on_the_seed(model):
    again, other = synthetic(TINY), synthetic(TINY, seed=1)
    for name, weight in model.backbone.named_parameters():
        assert torch.equal(weight, again.backbone.get_parameter(name))
        if weight.ndim == 2:
            assert not torch.equal(weight, other.backbone.get_parameter(name))
    half = synthetic(TINY, dtype=torch.bfloat16)
    assert torch.equal(half.backbone.out.weight, model.backbone.out.weight.bfloat16())


def test_decisions_are_not_ties_and_never_the_mask(model):
    """Best probabilities are mostly below 0.5 and far from the second; masks differ."""
    tokens = torch.cat([prompts(SHAPES["tiny"])[0], torch.full((1, 32), model.spec.mask_id)], 1)
    logits = model.logits(tokens)[0, 32:]
    best = logits.softmax(-1).topk(2, -1).values
    assert (best[:, 0] < 0.5).float().mean() > 0.5
    assert (best[:, 0] - best[:, 1]).median() > 0.01
    assert len(logits.argmax(-1).unique()) >= 8
    assert not (logits.argmax(-1) == model.spec.mask_id).any()


def test_prompts_are_drawn_and_padded_on_the_left(model):
    shape = Shape("x", TINY, (3, 7, 5), 4, 4, 1)
    rows = prompts(shape, seed=3)
    assert [tuple(row.shape) for row in rows] == [(1, 3), (1, 7), (1, 5)]
    assert all(int(row.max()) < model.spec.mask_id for row in rows)
    assert torch.equal(rows[1], prompts(shape, seed=3)[1])
    tokens, mask = padded(rows, pad=1)
    assert tokens.shape == mask.shape == (3, 7)
    assert mask.sum(1).tolist() == [3, 7, 5]
    assert torch.equal(tokens[2, 2:], rows[2][0])
    assert padded(rows[1:2], pad=1)[1] is None


def test_plain_sampler_accepts_the_sizes_of_large_models():
    """Both systems support the GQA and biases of Dream and the widths of LLaDA."""
    assert LLADA_8B.head_width == SHAPES["dream7b-178-1"].transformer.head_width == 128
    with torch.device("meta"):
        for shape in SHAPES.values():
            spec = Spec("llada", shape.transformer, mask_id=9, eos_id=0, pad_id=1)
            assert len(Plain(MultimodalDLM(spec)).layers) == shape.transformer.layers
