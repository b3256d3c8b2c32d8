"""LLaDA-V: LLaDA under LLaMA's tensor names, a SigLIP 2 tower, tiles of up to 6x6, no pooling.

Checkpoint: GSAI-ML/LLaDA-V.

Source: ML-GSAI/LLaDA-V: train/llava/model (llava_arch.py, language_model/llava_llada.py,
language_model/modeling_llada.py), train/generate_demo.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from mmdlm.backbones.family import Family, architecture
from mmdlm.backbones.llada_v import LLaDAV as Language
from mmdlm.blueprint import Blueprint
from mmdlm.systems.llava import LlavaLayout
from mmdlm.systems.system import System
from mmdlm.text import Tokenizer

# Never written in an answer, which only <|eot_id|> ends: generate_with_embeds.
BANNED = {
    "<|endoftext|>": 126081,
    "<|startoftext|>": 126080,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
}


class LLaDAV(LlavaLayout, System):
    r"""LLaDA-V: images are cut into up to 36 tiles and shrunk to about 4 ("anyres_max_4").

    A question follows its image directly, as in the released inference, which drops the first token
    after every image, the newline of training (llava/mm_utils.py: tokenizer_image_token).
    "image_template": "{}\n" in config.json puts it between them (`mmdlm.chat.Template.media`).

    The default decoding is that of the demonstration without its cache: one token per step, no
    blocks, and no end but <|eot_id|>. The demonstration's cache is `DLLMCache`.
    """

    NAME: ClassVar[str] = "LLaDA-V"
    FAMILY: ClassVar[type[Family]] = Language
    NAMED: ClassVar[dict[str, Any]] = {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
    }
    IMAGE: ClassVar[str] = "{}"
    TOWER_NAME: ClassVar[str] = "google/siglip2-so400m-patch14-384"

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether config.json names LLaDA, whose tensors have LLaMA's names."""
        named = f"{architecture(config)} {config.get('model_type')}".lower()
        return "llada" in named and "model.embed_tokens.weight" in names

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """See `LlavaLayout.read`."""
        blueprint = super().read(config, names)
        vocab = blueprint.spec.transformer.vocab
        return replace(blueprint, tasks=tasks([i for i in BANNED.values() if i < vocab]))

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint whose default decoding bans the control tokens of this tokenizer."""
        found = [tokenizer.id(text) for text in BANNED]
        return replace(blueprint, tasks=tasks([i for i in found if i is not None]))


def tasks(banned: list[int]) -> dict[str, dict[str, Any]]:
    """Prompt, length and strategies of the demonstration.

    Args:
        banned: ids that are never written.
    """
    ban = {"class_path": "mmdlm.decoding.guidance.suppress.Suppress", "init_args": {"ids": banned}}
    strategies = [
        *([ban] if banned else []),
        {"class_path": "mmdlm.decoding.lengths.end_of_text.EndOfText", "init_args": {}},
    ]
    return {
        "caption": {
            "prompt": "Please describe the image in detail.",
            "length": 128,
            "strategies": strategies,
        },
        "answer": {"length": 128, "strategies": strategies},
        "generate": {"length": 128, "strategies": strategies},
    }
