import pytest
import torch

import mmdlm
from mmdlm.tasks.fingerprint import fingerprint


def test_fingerprint_is_the_same_when_loaded_again_and_after_use(images):
    model = mmdlm.load("tiny")
    before = fingerprint(model)
    assert before.startswith("mmdlm ")
    mmdlm.caption(model, images[0])
    model.compile()
    assert fingerprint(model) == before
    assert fingerprint(mmdlm.load("tiny")) == before


def test_fingerprint_changes_with_each_weight(make_model):
    model = make_model()
    seen = {fingerprint(model), fingerprint(make_model(seed=1))}
    for weight in model.parameters():
        with torch.no_grad():
            weight.mul_(1.5).add_(1e-3)
        seen.add(fingerprint(model))
    assert len(seen) == len(list(model.parameters())) + 2


def test_fingerprint_changes_with_dtype_and_attention_but_not_with_default_prompts(make_model):
    model = make_model()
    before = fingerprint(model)
    model.preset["caption"]["prompt"] = "say the picture"
    assert fingerprint(model) == before
    assert fingerprint(make_model(attention="full")) != before
    assert fingerprint(model.to(torch.bfloat16)) != before


def test_quantized_weights_have_a_fingerprint():
    pytest.importorskip("torchao", reason='needs torchao: pip install "mmdlm[quant]"')
    model = mmdlm.load("tiny", quantize="int8")
    assert fingerprint(model) == fingerprint(mmdlm.load("tiny", quantize="int8"))
    assert fingerprint(model) != fingerprint(mmdlm.load("tiny"))
