"""Lumina-DiMOO: LLaDA that reads, draws and edits images as codes of a VQModel.

Checkpoint: Alpha-VLLM/Lumina-DiMOO.

Source: Alpha-VLLM/Lumina-DiMOO: config.py, utils/prompt_utils.py, utils/image_utils.py,
inference/inference_{mmu,t2i,i2i}.py, train/train.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from mmdlm.backbones.family import Keys, Spec, architecture, filled, require
from mmdlm.backbones.llada import LLaDA, published_ids
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import Beside, System, backbone, strategy, table
from mmdlm.text import Tokenizer

TOKENIZER = "vqvae"
SIZES = f"{TOKENIZER}/config.json"
VQ = "vqvae."
NAMED = "LLaDAForMultiModalGeneration"
# config.py (SPECIAL_TOKENS).
IDS = {
    "newline_token": 126084,
    "image_token_offset": 126356,
    "answer_start": 126354,
    "answer_end": 126355,
    "boi": 126349,
    "eoi": 126350,
    "uncondition": 126351,
    "padding": 126339,  # train/train.py: what follows an answer
}
# Of the published vqvae/config.json, for keys that it leaves out.
MODEL: dict[str, Any] = {
    "block_out_channels": [128, 256, 256, 512, 768],
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": None,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "lookup_from_codebook": (True,),
    "norm_type": ("group",),
}
ARGUMENTS = {
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "latent": "latent_channels",
    "count": "num_vq_embeddings",
    "code_dim": "vq_embed_dim",
    "groups": "norm_num_groups",
    "attention": "mid_block_add_attention",
}
CONTEXT = 8192
"""Tokens for which it is used at least: README has images of 1536 x 768, which are 4656."""
READ, DRAWN, EDITED = 1024, 1024, 512
"""Sides in pixels of images that are read, drawn and edited."""
SYSTEM = (
    "You are a multimodal model that can process both text and images. Answer the following "
    "question based on the provided images. Analyze each image and combine relevant details to "
    "answer."
)
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<user>' + ('<uncondition>' if m.unconditional else '') + m.content + '</user>' }}"
    "{% elif m.role == 'assistant' %}{{ '<answer>' + m.content + '</answer>' }}"
    "{% else %}{{ '<system>' + m.content + '</system>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)
ANSWER_END = "</answer>"
DRAW = "Generate an image according to the text prompt."
EDIT = "Generate an image applying the following editing instruction based on the original image."
# README: blocks of 256, 128 steps; 64 steps, guidance 4; editing with 2.5 by text and 4 by image.
ANSWER = [
    strategy("plans.blocks.Blocks", size=256),
    strategy("commits.top_k.TopK", steps=128),
]
SAMPLER = strategy("commits.random_top_k.RandomTopK", steps=64, sampler="lumina")
TASKS: dict[str, dict[str, Any]] = {
    "answer": {"length": 256, "strategies": ANSWER},
    "caption": {"prompt": "Please describe this image.", "length": 256, "strategies": ANSWER},
    "draw": {"strategies": [strategy("guidance.cfg.CFG", scale=4.0), SAMPLER]},
    "edit": {"strategies": [strategy("guidance.cfg.CFG", scale=2.5, image=4.0), SAMPLER]},
}


class LuminaDiMOO(System):
    """The language model in the folder itself, diffusers' VQModel in its sub-folder "vqvae".

    Ids that the published code has as constants may stand in config.json under "special_tokens",
    by the names of `IDS`.
    """

    TYPES: ClassVar[tuple[str, ...]] = (NAMED.lower(),)
    FILES: ClassVar[tuple[str, ...]] = (SIZES,)
    WEIGHTS: ClassVar[tuple[Beside, ...]] = (Beside(TOKENIZER, VQ),)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether config.json names its class."""
        return architecture(config) == NAMED

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; without the sub-folder it is a text model.

        Raises:
            ValueError: a setting of the VQModel is not supported, or there are more codes than the
                vocabulary has room for.
        """
        ids = IDS | (config.get("special_tokens") or {})
        spec = _spec(config, names, ids)
        template = {"chat": CHAT, "system": SYSTEM, "last": ["image"]}
        if not any(name.startswith(VQ) for name in names):
            return Blueprint(spec, template=template, tasks={"answer": TASKS["answer"]})
        given = {k: v for k, v in (config.get(SIZES) or {}).items() if v is not None}
        require("Lumina-DiMOO vqvae", {k: v[0] for k, v in SUPPORTED.items()} | given, SUPPORTED)
        sizes = filled("Lumina-DiMOO vqvae", MODEL, given)
        first, rows = ids["image_token_offset"], spec.transformer.vocab
        if first + sizes["num_vq_embeddings"] > rows:
            raise ValueError(
                f"Lumina-DiMOO: {sizes['num_vq_embeddings']} image codes from id {first} on, but "
                f"the embedding has {rows} rows; the files are of different checkpoints"
            )
        encoder = {ours: sizes[theirs] for ours, theirs in ARGUMENTS.items()}
        encoder |= {"size": config.get("read_size", READ), "crop": "best"}
        codes = {"first": first, "newline": ids["newline_token"], "end": [ids["eoi"]]}
        drawing = {
            "first": first,
            "count": sizes["num_vq_embeddings"],
            "stride": 2 ** (len(sizes["block_out_channels"]) - 1),
            "size": [config.get("draw_size", DRAWN)] * 2,
            "begin": [ids["boi"]],
            "end": [ids["eoi"], ids["answer_end"]],
            "newline": ids["newline_token"],
            "before": [],
            "after": [],
            "system": DRAW,
            "edit_system": EDIT,
            "edit_size": config.get("edit_size", EDITED),
        }
        vq = {"class_path": "encoders.vq_model.VQModel", "init_args": encoder}
        adapter = codes | {"begin": [ids["boi"]]}
        return Blueprint(
            spec=spec,
            encoders={"image": vq},
            adapters={
                "image": {"class_path": "adapters.image_codes.CodeTokens", "init_args": adapter}
            },
            outputs={"image": drawing},
            template=template,
            tasks=TASKS,
        )

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint, if the tokenizer is that of the ids.

        Raises:
            ValueError: the end of an answer has another id in the tokenizer.
        """
        if not blueprint.outputs:
            return blueprint
        end, found = blueprint.outputs["image"]["end"][-1], tokenizer.id(ANSWER_END)
        if found != end:
            raise ValueError(
                f"Lumina-DiMOO: {ANSWER_END} has id {found} in the tokenizer, expected {end}; the "
                'files are of different checkpoints, or "special_tokens" in config.json is wrong'
            )
        return blueprint

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part."""
        found: dict[str, tuple[str, Keys]] = {"backbone": ("", backbone(LLaDA))}
        if blueprint.encoders:
            found["encoders.image"] = (VQ, table(blueprint.encoders["image"]))
            found["adapters.image"] = ("", {})
        return found

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json, and that of the VQModel."""
        config = LLaDA.write(model.spec) | {"architectures": [NAMED]}
        longest = (model.published.get("config.json") or {}).get("max_sequence_length")
        if longest is not None and max(longest, CONTEXT) == model.spec.context:
            config["max_sequence_length"] = longest
        if model.drawing is None:
            return config
        drawing, encoder = model.drawing, describe(model).encoders["image"]["init_args"]
        was = model.published.get(SIZES) or {"_class_name": "VQModel"} | {
            name: allowed[0] for name, allowed in SUPPORTED.items()
        }
        ids = (model.published.get("config.json") or {}).get("special_tokens") or {}
        return config | {
            "special_tokens": IDS
            | ids
            | {
                "newline_token": drawing.newline,
                "image_token_offset": drawing.first,
                "answer_end": drawing.end[1],
                "boi": drawing.begin[0],
                "eoi": drawing.end[0],
            },
            "read_size": encoder["size"],
            "draw_size": drawing.size[0],
            "edit_size": drawing.edit_size,
            SIZES: was | {theirs: encoder[ours] for ours, theirs in ARGUMENTS.items()},
        }


def _spec(config: dict[str, Any], names: set[str], ids: dict[str, int]) -> Spec:
    """LLaDA's spec; the end of its part ends an answer too, and images are longer than texts."""
    rows = config.get("embedding_size") or config.get("vocab_size") or 0
    spec = LLaDA.read(config | published_ids(config, rows), names)
    end = (ids["answer_end"],) if ids["answer_end"] < rows else ()
    return replace(
        spec,
        pad_id=ids["padding"] if ids["padding"] < rows else spec.pad_id,
        stop_ids=tuple(dict.fromkeys((*spec.stop_ids, *end))),
        context=max(spec.context or 0, CONTEXT),
    )
