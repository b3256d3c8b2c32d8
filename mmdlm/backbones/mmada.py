"""MMaDA-8B-Base and MixCoT: LLaDA with image codes after its vocabulary.

An image code c of the MAGVIT-v2 codebook (8192 codes, 1024 per image) is the token 126349 + c: the
offset is the length of the text tokenizer, not `llm_vocab_size` (126464), the rows of LLaDA.
Text and images share one mask token.

Source: Gen-Verse/MMaDA: models/modeling_mmada.py, models/modeling_llada.py, configs/*.yaml.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mmdlm.backbones.family import Spec, architecture
from mmdlm.backbones.llada import LLaDA, published_ids

# Vocabulary keys in the config.json of MMaDA-8B besides the number of rows.
VOCABULARY = {
    "codebook_size": 8192,
    "llm_vocab_size": 126464,
    "new_vocab_size": 134656,
    "num_new_special_tokens": 0,
    "num_vq_tokens": 1024,
}


class MMaDA(LLaDA):
    """LLaDA's keys and settings; the template has one newline after a header instead of two."""

    TYPES: ClassVar[tuple[str, ...]] = ("mmadamodellm", "mmada")

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether it is MMaDA; its architecture name occurs in two spellings."""
        named = architecture(config).lower()
        return named == "mmadamodellm" or config.get("model_type") == "mmada"

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The spec; the vocabulary size is `embedding_size` or else `new_vocab_size`."""
        keys = ("embedding_size", "new_vocab_size", "vocab_size")
        rows = next((config[key] for key in keys if config.get(key)), None)
        if rows is None:
            raise ValueError(f"MMaDA: config.json has none of {', '.join(keys)}; expected one")
        given = {"embedding_size": rows, **published_ids(config, rows)}
        spec = super().read(config | given, names)
        return dataclasses.replace(spec, family="mmada", template="mmada")

    @classmethod
    def write(cls, spec: Spec) -> dict[str, Any]:
        """The published config.json of a spec."""
        rows = spec.transformer.vocab
        released = rows == VOCABULARY["new_vocab_size"]
        return super().write(spec) | {
            "architectures": ["MMadaModelLM"],
            "model_type": "mmada",
            **(VOCABULARY if released else {"new_vocab_size": rows}),
        }
