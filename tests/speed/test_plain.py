"""The plain sampler and our decode give equal tokens, ours in at most as many forwards."""

import pytest
import torch

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.moe import MoEConfig
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from tests.speed.plain import MODES, Plain, Schedule
from tests.speed.shapes import synthetic

OURS = {"none": [], "prefix": [PrefixCache()], "dual": [DualCache()], "prefix-lm": [PrefixLM()]}
CONFIGS = {
    "llada": TransformerConfig(32, 2, 4, 48, 61, rotary_float32=True, theta=5e5),
    "dream": TransformerConfig(48, 3, 6, 40, 97, kv_heads=2, qkv_bias=True),
    "tied": TransformerConfig(32, 1, 2, 64, 40, tied=True, embed_scale=2.0, logit_scale=0.5),
    "bias": TransformerConfig(32, 2, 2, 24, 33, head_dim=8, bias=True, theta_scale=3.0),
}
PROMPT = 11


def model_of(name, seed):
    """A model with stronger attention than the drawn weights."""
    model = synthetic(CONFIGS[name], seed)
    for block in model.backbone.blocks:
        block.attn.o.weight.mul_(3)
    stream = torch.Generator().manual_seed(seed)
    for key, weight in model.backbone.named_parameters():
        if key.endswith("bias"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=stream))
    return model


def prompt_of(model, seed):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.mask_id, (1, PROMPT), generator=stream)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_our_decode_gives_the_plain_tokens(mode, name, seed):
    model = model_of(name, seed)
    prompt, plain = prompt_of(model, seed), Plain(model)
    for block, steps in ((12, 3), (6, 4), (4, 12), (12, 5), (6, 12)):
        theirs = plain.decode(prompt, mode, Schedule(12, block, steps))
        ours = decode(model, prompt, 12, [*OURS[mode], Blocks(block), TopK(steps)])
        assert ours.tokens.tolist() == theirs.tokens.tolist(), (block, steps)
        assert ours.nfe <= theirs.forwards == steps + (mode == "prefix-lm")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_our_decode_gives_the_plain_tokens_with_a_threshold(mode, name, seed):
    model = model_of(name, seed)
    prompt, plain = prompt_of(model, seed), Plain(model)
    for block, tau in ((6, 0.2), (12, 0.5), (4, 0.0), (6, 1.0)):
        theirs = plain.decode(prompt, mode, Schedule(12, block, threshold=tau))
        ours = decode(model, prompt, 12, [*OURS[mode], Blocks(block), Threshold(tau)])
        assert ours.tokens.tolist() == theirs.tokens.tolist(), (block, tau)
        assert ours.nfe <= theirs.forwards
        assert 12 // block <= theirs.forwards <= 13


@pytest.mark.parametrize("mode", MODES)
def test_limited_ids(mode):
    model = model_of("dream", 3)
    prompt, columns = prompt_of(model, 3), slice(20, 36)
    theirs = Plain(model).decode(prompt, mode, Schedule(8, 8, 4, columns=columns))
    ours = decode(model, prompt, 8, [*OURS[mode], TopK(4)], columns=columns)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert set(theirs.tokens[0, PROMPT:].tolist()) <= set(range(20, 36))


def test_plain_logits_equal_those_of_the_model():
    for name in CONFIGS:
        model = model_of(name, 4)
        tokens, plain = prompt_of(model, 4), Plain(model)
        plain.cos, plain.sin = plain._angles(PROMPT, tokens.device)
        logits, kept = plain.forward(tokens, 0)
        torch.testing.assert_close(logits, model.logits(tokens), rtol=1e-4, atol=1e-4)
        # The second half with cached keys of the first half, and vice versa.
        for part, others in ((slice(6, PROMPT), slice(0, 6)), (slice(0, 6), slice(6, PROMPT))):
            past = [(k[:, :, others], v[:, :, others]) for k, v in kept]
            where = {"before": past} if part.start else {"after": past}
            again, _ = plain.forward(tokens[:, part], part.start, **where)
            torch.testing.assert_close(again, logits[:, part], rtol=1e-4, atol=1e-4)


def test_modes_differ_on_these_models():
    """Otherwise equal tokens in one mode would imply those in the others."""
    differ = dict.fromkeys((("none", "prefix"), ("prefix", "dual"), ("none", "prefix-lm")), 0)
    for name in CONFIGS:
        for seed in (0, 1, 2):
            model = model_of(name, seed)
            prompt, plain = prompt_of(model, seed), Plain(model)
            schedule = Schedule(12, 6, 12)
            found = {mode: plain.decode(prompt, mode, schedule).tokens.tolist() for mode in MODES}
            for a, b in differ:
                differ[a, b] += found[a] != found[b]
    assert min(differ.values()) >= 3, differ


def test_weights_are_shared_not_copied():
    model = model_of("dream", 0)
    layer, block = Plain(model).layers[1], model.backbone.blocks[1]
    assert layer["q"][0].data_ptr() == block.attn.qkv.weight.data_ptr()
    assert layer["up"][0].untyped_storage().data_ptr() == block.mlp.gate_up.weight.data_ptr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 10, "block": 4, "steps": 5}, "length 10 is not a multiple of block 4"),
        ({"length": 8, "block": 4, "steps": 5}, "steps 5 are not a multiple of the 2 blocks"),
        ({"length": 8, "block": 4}, "either steps or a threshold"),
        ({"length": 8, "block": 4, "steps": 2, "threshold": 0.5}, "either steps or a threshold"),
    ],
)
def test_uneven_schedules_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**given)


def test_other_models_rows_and_modes_are_rejected():
    model = model_of("llada", 0)
    with pytest.raises(ValueError, match="one row"):
        Plain(model).decode(torch.zeros(2, 4, dtype=torch.long), "none", Schedule(4, 4, 4))
    with pytest.raises(ValueError, match="'triple' is unknown; expected one of none, prefix"):
        Plain(model).decode(torch.zeros(1, 4, dtype=torch.long), "triple", Schedule(4, 4, 4))
    experts = TransformerConfig(32, 1, 2, 8, 20, moe=MoEConfig(2, 1, 8), qk_norm="head")
    with pytest.raises(ValueError, match="differs in moe, qk_norm"):
        Plain(synthetic(experts))
