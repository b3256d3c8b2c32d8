"""MMaDA: LLaDA that reads and draws images as codes of MAGVIT-v2.

Checkpoints: Gen-Verse/MMaDA-8B-Base, -MixCoT; the image tokenizer is showlab/magvitv2.

Source: Gen-Verse/MMaDA: models/modeling_mmada.py, training/prompting_utils.py, inference_mmu.py,
inference_t2i.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from mmdlm.backbones.family import Keys, architecture, filled
from mmdlm.backbones.mmada import MMaDA as Family
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import Beside, System, backbone, strategy, table
from mmdlm.text import Tokenizer

TOKENIZER = "magvitv2"
SIZES = f"{TOKENIZER}/config.json"
VQ = "vq."
# Length of the text tokenizer: the id of image code 0.
FIRST_CODE = 126349
# training/prompting_utils.py (reserved_token_mapping), and the start of a text.
IDS = {"<|soi|>": 126084, "<|eoi|>": 126085, "<|t2i|>": 126088, "<|mmu|>": 126089, "bos": 126080}
# The published tokenizer's config.json does not repeat the sizes.
MAGVIT: dict[str, Any] = {
    "ch": 128,
    "z_channels": 13,
    "ch_mult": [1, 2, 2, 4, 4],
    "num_res_blocks": [4, 3, 4, 3, 4],
    "decoder_ch_mult": [1, 1, 2, 2, 4],
    "decoder_num_res_blocks": [4, 4, 3, 4, 3],
}
ARGUMENTS = {
    "width": "ch",
    "bits": "z_channels",
    "down": "ch_mult",
    "down_blocks": "num_res_blocks",
    "up": "decoder_ch_mult",
    "up_blocks": "decoder_num_res_blocks",
}


# mmu_generate takes one token per step by default. README: images in 15 steps, guidance 3.5.
ANSWER = [strategy("plans.blocks.Blocks", size=128), strategy("commits.top_k.TopK", steps=None)]
TASKS: dict[str, dict[str, Any]] = {
    "answer": {"length": 128, "strategies": ANSWER},
    "caption": {
        "prompt": "Please describe this image in detail.",
        "length": 128,
        "strategies": ANSWER,
    },
    "draw": {
        "strategies": [
            strategy("guidance.cfg.CFG", scale=3.5),
            strategy("commits.random_top_k.RandomTopK", steps=15),
        ]
    },
}


class MMaDA(System):
    """The language model in the folder itself, MAGVIT-v2 in its sub-folder "magvitv2".

    Without the sub-folder the model reads and writes text only. What the published files leave to
    the source may stand in config.json: "reserved_tokens" (ids by name, see `IDS`) and
    "image_token_offset" (id of image code 0; else the length of the tokenizer). "resolution" is
    the side in pixels of images that are read and drawn, 512 as published; "image_transform":
    "squash" reads documents and charts whole. The sub-folder's config.json may hold the sizes of
    another MAGVIT-v2, see `MAGVIT`.
    """

    TYPES: ClassVar[tuple[str, ...]] = Family.TYPES
    FILES: ClassVar[tuple[str, ...]] = (SIZES,)
    WEIGHTS: ClassVar[tuple[Beside, ...]] = (Beside(TOKENIZER, VQ),)

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether config.json names it, and nothing stands before the names of its tensors."""
        named = {architecture(config).lower(), config.get("model_type")}
        return bool(named & set(cls.TYPES)) and "model.transformer.wte.weight" in names

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint.

        Raises:
            ValueError: there are more image codes than the vocabulary has room for.
        """
        config = filled("MMaDA", {"resolution": 512, "image_transform": "square"}, config)
        spec = Family.read(config, names)
        if not any(name.startswith(VQ) for name in names):
            return Blueprint(spec)
        sizes = filled("MMaDA image tokenizer", MAGVIT, _sizes(config))
        rows, count = spec.transformer.vocab, 2 ** sizes["z_channels"]
        published = FIRST_CODE if FIRST_CODE + count <= rows else rows - count
        first = config.get("image_token_offset", published)
        if config.get("codebook_size", count) != count or first + count > rows or first < 0:
            raise ValueError(
                f"MMaDA: {config.get('codebook_size', count)} image codes from id {first} on, but "
                f"MAGVIT-v2 has {count} and the embedding {rows} rows; the files are of different "
                "checkpoints"
            )
        side, transform = config["resolution"], config["image_transform"]
        encoder = {ours: sizes[theirs] for ours, theirs in ARGUMENTS.items()}
        encoder |= {"size": side, "crop": transform}
        ids = _ids(config)
        end, start = [ids["<|eoi|>"]], ids["<|soi|>"]
        adapter = {"first": first, "begin": [ids["<|mmu|>"], start], "end": end}
        drawing = {
            "first": first,
            "count": count,
            "stride": 2 ** (len(sizes["ch_mult"]) - 1),
            "size": [side, side],
            "begin": [start],
            "end": end,
            "newline": None,
            "before": [ids["<|t2i|>"], ids["bos"]],
            "after": [spec.eos_id],
            "system": None,
            "edit_system": None,
            "edit_size": None,
        }
        return Blueprint(
            spec=spec,
            encoders={"image": {"class_path": "encoders.magvit_v2.MagvitV2", "init_args": encoder}},
            adapters={
                "image": {"class_path": "adapters.image_codes.CodeTokens", "init_args": adapter}
            },
            outputs={"image": drawing},
            template={"first": ["image"]},
            tasks=TASKS,
        )

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint with image codes after the tokenizer's ids, and its start of a text."""
        if not blueprint.outputs:
            return blueprint
        drawing, adapter = dict(blueprint.outputs["image"]), blueprint.adapters["image"]
        start = tokenizer.names.get("bos_token")
        bos = None if start is None else tokenizer.id(start)
        if bos is not None:
            drawing["before"] = [drawing["before"][0], bos]
        if len(tokenizer) + drawing["count"] <= blueprint.spec.transformer.vocab:
            drawing["first"] = len(tokenizer)
        adapter = adapter | {"init_args": adapter["init_args"] | {"first": drawing["first"]}}
        return replace(blueprint, outputs={"image": drawing}, adapters={"image": adapter})

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part; the quantizer has tables only."""
        found: dict[str, tuple[str, Keys]] = {"backbone": ("", backbone(Family))}
        if blueprint.encoders:
            unused: Keys = {"quantize.*": None}
            found["encoders.image"] = (VQ, table(blueprint.encoders["image"]) | unused)
            found["adapters.image"] = ("", {})
        return found

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json, and the sizes of the image tokenizer."""
        config = Family.write(model.spec)
        if model.drawing is None:
            return config
        drawing, encoder = model.drawing, describe(model).encoders["image"]["init_args"]
        reserved = {
            "<|soi|>": drawing.begin[0],
            "<|eoi|>": drawing.end[0],
            "<|t2i|>": drawing.before[0],
            "<|mmu|>": model.adapters["image"].begin[0],
            "bos": drawing.before[1],
        }
        was = model.published.get(SIZES) or {"_class_name": "MAGVITv2"}
        return config | {
            "codebook_size": drawing.count,
            "image_token_offset": drawing.first,
            "reserved_tokens": reserved,
            "resolution": encoder["size"],
            "image_transform": encoder["crop"],
            SIZES: was | {theirs: encoder[ours] for ours, theirs in ARGUMENTS.items()},
        }


def _ids(config: dict[str, Any]) -> dict[str, int]:
    """The reserved ids."""
    return IDS | (config.get("reserved_tokens") or {})


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes in the sub-folder's config.json; those of the decoder are the encoder's if absent."""
    given = config.get(SIZES) or {}
    sizes = {name: given[name] for name in MAGVIT if name in given}
    for name in ("ch_mult", "num_res_blocks"):
        if name in sizes:
            sizes.setdefault(f"decoder_{name}", sizes[name])
    return sizes
