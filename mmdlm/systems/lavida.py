"""LaViDa with a LLaDA backbone: SigLIP views, MLP projector with pooling, prefix-DLM decoding.

Checkpoints: jacklishufan/lavida-llada-v1.0-instruct, lavida-llada-1.0-fim, lavida-llada-1.0-lowres,
hbXNov/lavida-llada-reason.

Source: jacklishufan/LaViDa: llava/model/llava_arch.py, llava/model/language_model/llava_llada.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mmdlm.backbones.family import Family, Spec
from mmdlm.backbones.llada import LLaDA, published_ids
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems.llava import LlavaLayout
from mmdlm.systems.system import System

# eval/run_coco_lowres.sh and eval/lmms_eval/tasks/coco_cap: the prompt is computed once, one step
# commits two tokens on average, many early. Answers of more than 128 tokens also take Blocks(128).
STRATEGIES: list[Recipe] = [
    {"class_path": "mmdlm.decoding.caches.prefix_lm.PrefixLM", "init_args": {}},
    {"class_path": "mmdlm.decoding.commits.time_shift.TimeShift", "init_args": {"shift": 0.33}},
]


def tasks(strategies: list[Recipe]) -> dict[str, dict[str, Any]]:
    """Prompt and length of the evaluation, and of the demonstration, with these strategies."""
    return {
        "caption": {
            "prompt": "Provide a one-sentence caption for the provided image.",
            "length": 32,
            "strategies": strategies,
        },
        "answer": {"length": 32, "strategies": strategies},
        "generate": {"length": 128, "strategies": strategies},
    }


class Pooled(LlavaLayout):
    r"""LaViDa's pooling and its context, with either language model.

    Pooling (27x27 tokens of a view to 14x14) is not a key of the published config.json but an
    environment variable of the source. It is on for tiles ("anyres") and off for single views, as
    the published checkpoints were trained; "pooling_on": true or false in config.json decides
    otherwise.
    """

    @classmethod
    def pool(cls, config: dict[str, Any], is_tiled: bool) -> str | None:
        """See `LlavaLayout.pool`."""
        return config["mm_spatial_pool_mode"] if config.get("pooling_on", is_tiled) else None

    @classmethod
    def spec(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """The language model's spec, with the longer of the two contexts in config.json."""
        spec = super().spec(config, names)
        longest = config.get("tokenizer_model_max_length") or 0
        return dataclasses.replace(spec, context=max(spec.context, longest))

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """See `LlavaLayout.write`."""
        config = super().write(model)
        mode = config.get("mm_spatial_pool_mode")
        return config | {
            "mm_spatial_pool_mode": mode or "bilinear",
            "pooling_on": mode is not None,
        }


class LaViDa(Pooled, System):
    r"""LLaDA, a SigLIP tower without its last layer, and a learnt end of each row of an image.

    A question follows its image directly, as in the released inference, which drops the first token
    after every image, the newline of training (llava/mm_utils.py: tokenizer_image_token).
    "image_template": "{}\n" in config.json puts it between them (`mmdlm.chat.Template.media`).
    """

    NAME: ClassVar[str] = "LaViDa"
    FAMILY: ClassVar[type[Family]] = LLaDA
    NAMED: ClassVar[dict[str, Any]] = {
        "architectures": ["LlavaLladaForMaskedDiffusion"],
        "model_type": "llava_llada",
    }
    IMAGE: ClassVar[str] = "{}"
    TASKS: ClassVar[dict[str, dict[str, Any]]] = tasks(STRATEGIES)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether LLaDA is under its own tensor names (that of LLaDA-V is under LLaMA's)."""
        return "model.transformer.wte.weight" in names

    @classmethod
    def spec(cls, config: dict[str, Any], names: set[str]) -> Spec:
        """LLaDA's spec, with the ids that the source has as constants where config.json has none.

        Raises:
            ValueError: the size of the vocabulary is missing.
        """
        vocab = config.get("embedding_size") or config.get("vocab_size")
        if not vocab:
            raise ValueError(
                "LaViDa: config.json has no vocab_size; it must say the vocabulary's size"
            )
        return super().spec(config | published_ids(config, vocab), names)
