import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdlm.backbones.llada import LLaDA
from mmdlm.backbones.mmada import MMaDA
from mmdlm.checkpoint import load

SMALL = {
    "architectures": ["MMadaModelLM"],
    "model_type": "mmada",
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "d_model": 16,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "embedding_size": 40,
    "vocab_size": 40,
    "weight_tying": False,
    "eos_token_id": 31,
}
RELEASED = {
    "embedding_size": 134656,
    "vocab_size": 134656,
    "new_vocab_size": 134656,
    "llm_vocab_size": 126464,
    "codebook_size": 8192,
    "num_new_special_tokens": 0,
    "num_vq_tokens": 1024,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "mask_token_id": 126336,
}


def test_mmada_is_llada_but_for_vocabulary_and_template() -> None:
    spec = MMaDA.read(SMALL | RELEASED, set())
    assert spec.transformer == LLaDA.read(SMALL | RELEASED, set()).transformer
    assert (spec.family, spec.template, spec.shift) == ("mmada", "mmada", False)
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (126336, 126081, 126081)
    assert spec.stop_ids == (126348,)
    assert (spec.transformer.vocab, spec.transformer.rotary_float32) == (134656, True)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"embedding_size": 40, "new_vocab_size": 48, "vocab_size": 44}, 40),
        ({"embedding_size": None, "new_vocab_size": 48, "vocab_size": 44}, 48),
        ({"embedding_size": None, "vocab_size": 44}, 44),
    ],
)
def test_mmada_rows_include_the_image_codes(given: dict[str, Any], rows: int) -> None:
    assert MMaDA.read(SMALL | given, set()).transformer.vocab == rows


def test_mmada_without_any_vocabulary_is_rejected() -> None:
    config = {k: v for k, v in SMALL.items() if k not in ("embedding_size", "vocab_size")}
    with pytest.raises(ValueError, match="MMaDA: config.json has none of embedding_size"):
        MMaDA.read(config, set())


def test_mmada_absent_ids_are_the_published_ones() -> None:
    published = {"embedding_size": 134656, "eos_token_id": None}
    spec = MMaDA.read(SMALL | published, set())
    assert (spec.mask_id, spec.eos_id, spec.pad_id) == (126336, 126081, 126081)
    spec = MMaDA.read(SMALL, set())
    assert (spec.mask_id, spec.eos_id, spec.pad_id, spec.stop_ids) == (None, 31, 31, ())
    with pytest.raises(ValueError, match=r"eos_id is None, .* or give load\(eos_id=...\)"):
        MMaDA.read(SMALL | {"eos_token_id": None}, set())


@pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2, "include_bias": True}, RELEASED])
def test_mmada_written_config_reads_back(variant: dict[str, Any]) -> None:
    spec = MMaDA.read(SMALL | variant, set())
    config = json.loads(json.dumps(MMaDA.write(spec)))
    assert MMaDA.read(config, set()) == spec
    published = RELEASED if variant is RELEASED else {"new_vocab_size": 40}
    assert {key: config[key] for key in published} == published


def test_mmada_is_distinguished_from_llada() -> None:
    names = {"model.transformer.wte.weight"}
    assert MMaDA.matches(SMALL, names)
    assert MMaDA.matches({"architectures": ["MMaDAModelLM"]}, names)
    assert not LLaDA.matches({"architectures": ["MMadaModelLM"], "model_type": "mmada"}, names)
    assert not MMaDA.matches({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, names)


def test_mmada_model_type_has_priority_over_lladas_architecture(
    golden: Path, tmp_path: Path
) -> None:
    folder = golden / "backbones" / "mmada"
    for file in folder.glob("model*"):
        (tmp_path / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LLaDAModelLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).spec.family == "mmada"


@torch.inference_mode()
def test_mmada_query_without_keys_is_finite(golden: Path) -> None:
    model = load(golden / "backbones" / "mmada")
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    mask[:, 2] = False
    assert model.logits(torch.arange(6)[None], mask=mask).isfinite().all()
