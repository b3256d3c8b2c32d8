"""Tiny-A2D: Qwen2.5, Qwen3 and Llama checkpoints fine-tuned to diffusion models.

Keys and config of the autoregressive base model, no causal mask, position i scores token i.

Source: ZHZisZZ/dllm: dllm/pipelines/a2d (models, convert.py), dllm/utils/models.py (mask token).
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Keys, Spec, architecture
from mmdlm.backbones.llama_config import LLAMA, QWEN2, QWEN3, Ids, read_config, write_config
from mmdlm.backbones.llama_keys import LLAMA_KEYS

# Ids of the base tokenizers; the mask token is added and gets the first free id.
QWEN = {"eos": 151645, "pad": 151643, "stops": (151643,)}
IDS = {
    "qwen2": Ids(mask=151665, **QWEN),
    "qwen3": Ids(mask=151669, **QWEN),
    "llama": Ids(mask=128256, eos=128009, pad=128001, stops=(128001,)),
}
DEFAULTS = {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA}
SWITCHES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "llama": {},
}
ARCHITECTURES = {
    "qwen2": "A2DQwen2LMHeadModel",
    "qwen3": "A2DQwen3LMHeadModel",
    "llama": "A2DLlamaLMHeadModel",
}


class A2D(Family):
    """A diffusion model in the layout of its base model; block-causal with `block_size` (BD3LM)."""

    TYPES: ClassVar[tuple[str, ...]] = (
        *(name.lower() for name in ARCHITECTURES.values()),
        *(f"a2d-{kind}" for kind in IDS),
    )
    KEYS: ClassVar[Keys] = LLAMA_KEYS
    ON_REQUEST: ClassVar[tuple[str, ...]] = tuple(IDS)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether `architectures` or `model_type` names A2D, not the base model."""
        typed = config.get("model_type")
        return architecture(config) in ARCHITECTURES.values() or typed in [f"a2d-{k}" for k in IDS]

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; absent keys have the defaults of the base model's class.

        Raises:
            ValueError: the base model is none of the three.
        """
        kind = _base_model(config)
        block_size = config.get("block_size")
        return read_config(
            cls,
            config,
            DEFAULTS[kind],
            IDS[kind],
            SWITCHES[kind],
            attention="block_causal" if block_size else "full",
            block_size=block_size,
            template="plain" if kind == "llama" else "chatml",
        )

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        t = spec.transformer
        kind = "qwen3" if t.qk_norm == "head" else "qwen2" if _qwen2(spec) else "llama"
        blocks = {} if spec.attention == "full" else {"block_size": spec.block_size}
        return write_config(
            cls,
            spec,
            DEFAULTS[kind],
            IDS[kind],
            architectures=[ARCHITECTURES[kind]],
            model_type=f"a2d-{kind}",
            **blocks,
        )


def _qwen2(spec: Spec) -> bool:
    """Whether the biases are those of Qwen2; Llama also has one on the output projection."""
    return spec.transformer.qkv_bias and not spec.transformer.o_bias


def _base_model(config: dict[str, Any]) -> str:
    """Base model of a checkpoint: "qwen2", "qwen3" or "llama"."""
    typed = str(config.get("model_type")).removeprefix("a2d-")
    if typed in IDS:
        return typed
    named = {name: kind for kind, name in ARCHITECTURES.items()}.get(architecture(config))
    if named is None:
        raise ValueError(
            f"A2D: config.json has model_type {config.get('model_type')!r}, expected one of "
            f"{', '.join(f'a2d-{kind}' for kind in IDS)}"
        )
    return named
