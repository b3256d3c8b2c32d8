from dataclasses import replace

import pytest

from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.llada import LLaDA

SIZES = TransformerConfig(vocab=8, width=256, layers=1, heads=2, inner=24)
SPEC = Spec("llada", SIZES, mask_id=2, eos_id=1, pad_id=0, context=4096)


def test_tokens_within_the_context_fit() -> None:
    SPEC.fits(4096)
    replace(SPEC, context=None).fits(10**9)
    assert SPEC.reach == 4096
    assert replace(SPEC, context=None).reach is None


@pytest.mark.parametrize("tokens", [4097, 8192, 100_000])
def test_scale_named_in_the_error_is_sufficient(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"{tokens} tokens .* context is 4096; .*NTK") as error:
        SPEC.fits(tokens)
    scale = float(str(error.value).partition("theta_scale=")[2].split()[0])
    replace(SPEC, transformer=replace(SIZES, theta_scale=scale)).fits(tokens)
    smaller = replace(SPEC, transformer=replace(SIZES, theta_scale=scale - 0.02))
    with pytest.raises(ValueError, match="theta_scale"):
        smaller.fits(tokens)


def test_doubling_the_context_takes_the_published_scale() -> None:
    # NTK-aware: 2 ** (128 / 126) for heads of width 128.
    spec = replace(SPEC, transformer=replace(SIZES, theta_scale=2 ** (128 / 126)))
    assert spec.reach in (8191, 8192)


def test_llada_context_survives_its_config() -> None:
    for context in (4096, None):
        spec = replace(LLaDA.read(LLaDA.write(SPEC), set()), context=context)
        assert LLaDA.read(LLaDA.write(spec), set()).context == context
    scaled = replace(SPEC, transformer=replace(SIZES, theta_scale=2 ** (128 / 126)))
    assert LLaDA.write(scaled)["max_sequence_length"] == scaled.reach
