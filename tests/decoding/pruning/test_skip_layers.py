"""Media tokens that skip layers: a slow reference, caches, batches."""

import pytest
import torch

from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.pruning.skip_layers import SkipLayers
from mmdlm.layout import Row, append_answer
from tests.decoding.pruning.test_prune_media import LENGTH, row


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)])
def test_logits_equal_a_slow_reference(toy, watch, layers):
    model = toy(attention="full")
    prompt = model.arrange([row(0), row(1)])
    seen = watch(model)
    decode(model, prompt, LENGTH, [SkipLayers(layers), TopK(steps=1)])
    mask = torch.full((2, LENGTH), model.spec.mask_id)
    sequence = append_answer(model.spec, prompt, mask)
    x = model.backbone.tokens(sequence.tokens)
    x = x.masked_scatter(sequence.is_medium[..., None], sequence.media)
    text = ~sequence.is_medium[0]
    for i, block in enumerate(model.backbone.blocks):
        at = text if i in layers else torch.ones_like(text)
        turn = model.backbone.rotary(sequence.positions[:, at])
        x[:, at] = block(x[:, at], (turn, turn), None, None, None)
    wanted = model.backbone.head(model.backbone.norm(x))[:, -LENGTH:]
    assert torch.allclose(seen[0].logits[..., 3:], wanted[..., 3:], atol=1e-4)


@pytest.mark.parametrize("attention", ["full", "prefix", "cascade"])
def test_rows_of_a_batch_equal_rows_alone(toy, attention):
    model = toy(attention=attention)
    rows = [row(1), row(2, media=4, after=6), Row((torch.tensor([5, 6]),))]
    strategies = [SkipLayers((1,))]
    together = decode(model, model.arrange(rows), LENGTH, strategies)
    for i, one in enumerate(rows):
        alone = decode(model, model.arrange([one]), LENGTH, strategies)
        assert together.tokens[i, -LENGTH:].tolist() == alone.tokens[0, -LENGTH:].tolist()
    plain = decode(model, model.arrange(rows), LENGTH)
    assert not torch.equal(plain.tokens, together.tokens)


def test_layers_that_do_not_exist_are_refused(toy):
    model = toy(attention="full")
    with pytest.raises(ValueError, match=r"layers is \[3\], expected layers from 0 to 2"):
        decode(model, model.arrange([row(0)]), LENGTH, [SkipLayers((3,))])
