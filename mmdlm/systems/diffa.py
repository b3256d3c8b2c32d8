"""DIFFA (arXiv 2507.18452): LLaDA-8B-Instruct, Whisper's encoder and two audio connectors.

Source: NKU-HLT/DIFFA: src/modeling_DIFFA.py, src/configuration_DIFFA.py, src/llm_generate.py and
the inference scripts.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from mmdlm.backbones.family import Keys, architecture, filled, require
from mmdlm.backbones.llada import END_OF_TEXT, LLaDA
from mmdlm.blueprint import Blueprint
from mmdlm.model import MultimodalDLM
from mmdlm.systems.system import Part, System, backbone, renamed, table

ENCODER, ADAPTER = "encoders.whisper.WhisperEncoder", "adapters.dual_audio.DualAudio"
# QformerConnector.target_layer_ids, numbered as transformers' hidden_states.
LAYERS: dict[str, tuple[int, ...]] = {
    "openai/whisper-tiny": (0, 1, 2, 3),
    "openai/whisper-small": (2, 5, 8, 11),
    "openai/whisper-medium": (5, 11, 17, 23),
    "openai/whisper-large-v3": (3, 7, 11, 15, 19, 23, 27, 31),
}
# Encoder layers of these models.
DEPTHS = {
    4: "openai/whisper-tiny",
    12: "openai/whisper-small",
    24: "openai/whisper-medium",
    32: "openai/whisper-large-v3",
}
PROMPT_SIZE = 64
POSITIONS = 50  # of Whisper's encoder, per second
# transformers' WhisperConfig, for keys that whisper_config leaves out.
WHISPER: dict[str, Any] = {
    "activation_function": "gelu",
    "d_model": 384,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "encoder_layers": 4,
    "max_source_positions": 1500,
    "num_mel_bins": 80,
}
# LLaDA-8B-Instruct, for keys that llm_config leaves out. Sizes are never assumed.
LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "rope": True,
    "rope_theta": 500_000.0,
    "weight_tying": False,
}
SIZES = ("d_model", "n_heads", "n_layers", "vocab_size")
TEMPLATE: dict[str, Any] = {
    # build_chat_prompt: LLaDA's chat template, but contents are not stripped.
    "chat": (
        "{{ '<|startoftext|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    ),
    # The embeddings follow the colon; the text <audio> is not a special token and stays.
    "media": {"audio": "This is the audio:{} <audio>. "},
    "system": "You are a helpful voice assistant.",
}


def _sampling(block: int) -> list[dict[str, Any]]:
    """LLaDA's low-confidence sampling in blocks, one token per step."""
    return [
        {"class_path": "mmdlm.decoding.plans.blocks.Blocks", "init_args": {"size": block}},
        {"class_path": "mmdlm.decoding.commits.top_k.TopK", "init_args": {"steps": None}},
    ]


# The scripts for MMAU and VoiceBench generate 16 tokens in one block; the default of `generate` is
# 128 tokens in blocks of 32. One token per step in both. The prompt of transcribe is ours.
TASKS: dict[str, dict[str, Any]] = {
    "answer": {"length": 16, "strategies": _sampling(16)},
    "describe": {
        "prompt": "What can you hear from the audio?",
        "length": 128,
        "strategies": _sampling(32),
    },
    "transcribe": {
        "prompt": "Transcribe the speech.",
        "length": 128,
        "strategies": _sampling(32),
    },
}


class DIFFA(System):
    """A DIFFAModel: the connectors, Whisper under `whisper_model.`, LLaDA under `llm_model.`.

    Whisper and LLaDA may also be checkpoints of their own, as the published scripts load them. It
    is written as one checkpoint, which the published training code does.
    """

    TYPES: ClassVar[tuple[str, ...]] = ("diffamodel",)
    PARTS: ClassVar[tuple[Part, ...]] = (
        Part("whisper_model.", "model.encoder.", "whisper_config"),
        Part("llm_model.model.transformer.", "model.transformer.", "llm_config"),
    )

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether config.json names DIFFAModel, or holds both of its inner configurations."""
        return architecture(config) == "DIFFAModel" or {"whisper_config", "llm_config"} <= {*config}

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint.

        Raises:
            ValueError: a part of the model is missing, or its sizes are missing or not supported.
        """
        _check_parts(config, names)
        whisper = filled("DIFFA", WHISPER, config.get("whisper_config") or {})
        require("DIFFA whisper_config", whisper, {"activation_function": ("gelu",)})
        width, heads = whisper["d_model"], whisper["encoder_attention_heads"]
        spec = LLaDA.read(_llm_config(config), names)
        layers = _layers(config, whisper["encoder_layers"], names)
        encoder = {
            "dim": width,
            "layers": whisper["encoder_layers"],
            "heads": heads,
            "mels": whisper["num_mel_bins"],
            "seconds": whisper["max_source_positions"] / POSITIONS,
            "hidden": whisper["encoder_ffn_dim"],
            "positions": whisper["max_source_positions"],
            "hidden_layers": layers,
        }
        adapter = {
            "in_dim": width,
            "out_dim": spec.transformer.width,
            "layers": len(layers),
            "heads": heads,
            "prompt_size": config.get("prompt_size", PROMPT_SIZE),
            "stage": config.get("stage", 2 if layers else 1),
        }
        return Blueprint(
            spec=spec,
            encoders={"audio": {"class_path": ENCODER, "init_args": encoder}},
            adapters={"audio": {"class_path": ADAPTER, "init_args": adapter}},
            template=TEMPLATE,
            tasks=TASKS,
        )

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """The tables of Whisper, LLaDA and the connectors."""
        whisper = renamed(table(blueprint.encoders["audio"]), "model.encoder.")
        decoder = ("*/model.decoder.*", "*/proj_out.*")  # in Whisper's own checkpoint
        return {
            "backbone": ("llm_model.", backbone(LLaDA)),
            "encoders.audio": ("whisper_model.", whisper),
            "adapters.audio": ("", table(blueprint.adapters["audio"])),
            "": ("", dict.fromkeys(decoder)),
        }

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """config.json of a DIFFAModel."""
        encoder, adapter = model.encoders["audio"].arguments, model.adapters["audio"].arguments
        layers = tuple(encoder["hidden_layers"])
        name = DEPTHS.get(encoder["layers"])
        own = {} if not layers or LAYERS.get(name) == layers else {"target_layer_ids": [*layers]}
        return {
            "architectures": ["DIFFAModel"],
            "whisper_config": WHISPER
            | {
                "model_type": "whisper",
                "d_model": encoder["dim"],
                "encoder_attention_heads": encoder["heads"],
                "encoder_ffn_dim": encoder["hidden"],
                "encoder_layers": encoder["layers"],
                "max_source_positions": encoder["positions"],
                "num_mel_bins": encoder["mels"],
            },
            "llm_config": LLaDA.write(model.spec),
            "acoustic_connector_config": own,
            "adapter_inner_dim": 512,  # these two have no effect in the published model either
            "conv_kernel_sizes": "5,5,5",
            "prompt_size": adapter["prompt_size"],
            "stage": adapter["stage"],
            "whisper_model_id": name,
        }


def _check_parts(config: dict[str, Any], names: set[str]) -> None:
    """Raises unless there are tensors of all three parts."""
    put = "put its folder with *.safetensors into this one:"
    moves = {
        "semantic_connector.": "convert the connectors from pytorch_model.bin, which is a pickle "
        "and is not read, to model.safetensors",
        "whisper_model.": f"{put} {config.get('whisper_model_id') or 'openai/whisper-small'}",
        "llm_model.": f"{put} GSAI-ML/LLaDA-8B-Instruct",
    }
    for prefix, move in moves.items():
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"DIFFA: the checkpoint holds no tensors {prefix}*; {move}")


def _llm_config(config: dict[str, Any]) -> dict[str, Any]:
    """LLaDA's config.json."""
    given = config.get("llm_config") or {}
    if missing := [name for name in SIZES if given.get(name) is None]:
        raise ValueError(f"DIFFA: llm_config lacks {missing}; take them from LLaDA's config.json")
    # The mask_id of load() is put into config.json itself.
    given = LLADA | given | {k: config[k] for k in ("mask_token_id",) if k in config}
    vocab = given.get("embedding_size") or given["vocab_size"]
    eos = given.get("eos_token_id")
    if eos is None:
        eos = END_OF_TEXT
        if vocab <= END_OF_TEXT:
            eos = vocab - 2 if given["mask_token_id"] == vocab - 1 else vocab - 1
            warnings.warn(
                f"DIFFA: llm_config has no eos_token_id, and LLaDA's {END_OF_TEXT} is not below "
                f"its {vocab} embeddings; using {eos}, pass eos_id= to change it",
                stacklevel=2,
            )
    pad = given.get("pad_token_id")
    first = eos[0] if isinstance(eos, list) else eos
    ids = {"eos_token_id": eos, "pad_token_id": first if pad is None else pad}
    return given | ids | {"embedding_size": vocab}


def _layers(config: dict[str, Any], depth: int, names: set[str]) -> list[int]:
    """The encoder layers that the acoustic connector reads; none without a connector."""
    own = dict(config.get("acoustic_connector_config") or {})
    layers = own.pop("target_layer_ids", None)
    if own:
        raise ValueError(
            f"DIFFA: acoustic_connector_config has {sorted(own)}; expected {{}} as published, or "
            "target_layer_ids"
        )
    banks = len({name for name in names if name.startswith("acoustic_connector.layer_prompts.")})
    if not banks:
        return []
    if layers is None:
        size = str(config.get("whisper_model_id", "")).rstrip("/").rpartition("/")[2]
        named = LAYERS.get(f"openai/{size}")
        layers = named or LAYERS.get(DEPTHS.get(depth, ""))
    if layers is None or len(layers) != banks or max(layers) > depth:
        raise ValueError(
            f"DIFFA: no {banks} of Whisper's {depth} layers are known for the acoustic connector "
            f"of {config.get('whisper_model_id')!r}; expected one of {', '.join(LAYERS)}, or give "
            "target_layer_ids in acoustic_connector_config"
        )
    return list(layers)
