"""LaViDa with a Dream backbone: next-token logits, prefix-DLM decoding with a given first token.

Checkpoints: jacklishufan/lavida-dream-v1.0-instruct, lavida-dream-1.0-stage1.

Source: jacklishufan/LaViDa: llava/model/language_model/llava_dream.py,
llava/model/language_model/dream/generation_utils.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdlm.backbones.dream import Dream
from mmdlm.backbones.family import Family, architecture
from mmdlm.recipe import Recipe
from mmdlm.systems.lavida import STRATEGIES, Pooled, tasks
from mmdlm.systems.system import System

# eval/*.sh: alg=topk_margin. `FirstToken` is what the released prefix cache does.
DREAM_STRATEGIES: list[Recipe] = [
    {"class_path": "mmdlm.decoding.plans.first_token.FirstToken", "init_args": {}},
    *STRATEGIES,
    {"class_path": "mmdlm.decoding.scores.margin.Margin", "init_args": {}},
]


class LaViDaDream(Pooled, System):
    r"""Dream (Qwen2.5 with shifted logits) with the tower, projector and grid of LaViDa.

    With its prefix cache on, the released decoding fills the first token of an answer from the
    prompt alone, before the schedule begins (`FirstToken`, part of the defaults here). Without
    `FirstToken`, that token competes with the others like in a decode without the cache. The
    newline after an image is kept, as in training: the chat template of Dream has no start token,
    so the released inference does not lose a token there.
    """

    NAME: ClassVar[str] = "LaViDa-Dream"
    FAMILY: ClassVar[type[Family]] = Dream
    NAMED: ClassVar[dict[str, Any]] = {
        "architectures": ["LlavaDreamForMaskedDiffusion"],
        "model_type": "llava_dream",
    }
    TASKS: ClassVar[dict[str, dict[str, Any]]] = tasks(DREAM_STRATEGIES)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether config.json names Dream and its queries have biases."""
        named = f"{architecture(config)} {config.get('model_type')}".lower()
        biases = any(name.endswith("self_attn.q_proj.bias") for name in names)
        return "dream" in named and biases and "model.embed_tokens.weight" in names
