"""Dream-VLA with discrete actions: Dream, the Qwen2-VL tower and 256 action tokens.

Source: DreamLM/Dream-VLX: vla/dreamvla (model, preprocessing, decoding), vla/prismatic (action
tokens, statistics), vla/experiments/robot/libero/run_libero_eval_dream.py (settings).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from adapters.normalize import choose, find_dataset
from mmdlm.backbones.dream import Dream
from mmdlm.backbones.family import Keys, Spec, require
from mmdlm.blueprint import Blueprint, describe
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.systems import qwen_tower
from mmdlm.systems.dream_vl import LANGUAGE, TENSORS, DreamVL
from mmdlm.systems.qwen_tower import PIXELS, mlp, part, projector
from mmdlm.systems.system import Beside, System, backbone, table
from mmdlm.text import Tokenizer

STATISTICS = "dataset_statistics.json"
BINS = 256
IM_END, NEWLINE = 151645, 198
# Actions per answer by what the name of the data set contains (vla/prismatic/vla/constants.py,
# where it is looked for in the command line). The one published evaluation is LIBERO's.
CHUNKS = {"libero": 8, "aloha": 25, "bridge": 5, "rt_1": 5, "fractal": 5}
# Keys of ours, for ids that the published code has as constants.
FIRST_ACTION, ENDS = "action_token_begin_id", "answer_end_ids"
CAMERAS = ["image", "wrist_image"]
CHUNK_KEYS = ("num_actions_chunk", "action_chunk", "chunk")
PROMPT = "What action should the robot take to {instruction}?"


class DreamVLA(System):
    """Reads camera images, an instruction and maybe the robot's state; answers action tokens.

    What the published folder does not say may stand in config.json: "unnorm_key" (data set whose
    statistics apply, needed where there are several), "num_actions_chunk" (actions per answer),
    "proprio_dim" (size of a state that comes normalised, without statistics) and
    "use_discrete_diffusion" (false: trained on zero embeddings in place of mask tokens, so that
    one forward decides the chunk; the flag is that of the published trainer). Action ids and those
    that close an answer are the tokenizer's where there is one.

    The proprio projector is published apart, as a pickle. Saved as `proprio_projector.safetensors`
    (names "fc1.weight" and so on) in the folder it is read, and its token is the first of the
    sequence.
    """

    FILES: ClassVar[tuple[str, ...]] = (STATISTICS, PIXELS)
    WEIGHTS: ClassVar[tuple[Beside, ...]] = (
        Beside("proprio_projector.safetensors", "proprio_projector."),
    )

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether there are its tower and projector, and it is not called Dream-VL."""
        return names >= TENSORS and not DreamVL.matches(config, names)

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint; absent keys mean what the published classes make of them.

        Raises:
            ValueError: there are no statistics, they are of several data sets and none is chosen,
                or files contradict each other.
        """
        c = LANGUAGE | config
        require("Dream-VLA", c, {"projector_hidden_act": ("gelu", None)})
        spec = Dream.read(c, names)
        width = spec.transformer.width
        tower = qwen_tower.tower("Dream-VLA", c)
        encoders: dict[str, Recipe] = {"image": tower}
        adapters: dict[str, Recipe] = {"image": mlp(tower["init_args"]["dim"], width)}
        robot = _robot(c, spec, "proprio_projector.fc1.weight" in names)
        if "proprio_projector.fc1.weight" in names:
            size = _state_size(c, robot)
            encoders["state"] = part("encoders.state.StateEncoder", size=size, dim=None)
            adapters["state"] = mlp(size, width)
        act = {"prompt": PROMPT, "execute": robot["chunk"], "cameras": CAMERAS}
        if c.get("use_discrete_diffusion", True):
            act["strategies"] = [part("mmdlm.decoding.commits.timesteps.Timesteps", steps=1)]
        else:
            act["placeholder"] = "zero"
        return Blueprint(
            spec=spec,
            encoders=encoders,
            adapters=adapters,
            outputs={"actions": robot},
            template={"first": ["state"]} if "state" in encoders else {},
            tasks={"act": act},
        )

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint with the tokenizer's ids of actions and of the end of an answer."""
        robot = blueprint.outputs["actions"]
        bins, tail = robot["bins"], list(robot["tail"])
        first = tokenizer.id("<|action_0|>")
        if first is not None:
            bins = bins | {"last_id": first + bins["bins"] - 1}
        # Byte-level vocabularies spell a newline so.
        ends = [tokenizer.id("<|im_end|>"), tokenizer.id("\u010a")]
        if None not in ends:
            tail = ends
        return replace(blueprint, outputs={"actions": robot | {"bins": bins, "tail": tail}})

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """Prefix and names by part; the state's encoder has no weights."""
        found = {
            "backbone": ("", backbone(Dream)),
            "encoders.image": ("visual.", table(blueprint.encoders["image"])),
            "adapters.image": ("projector.", projector("linear_")),
        }
        if "state" in blueprint.adapters:
            found["adapters.state"] = ("proprio_projector.", projector("fc"))
        return found

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json, statistics and preprocessing; `read` takes them back."""
        made = describe(model)
        tower, robot = made.encoders["image"]["init_args"], made.outputs["actions"]
        features = {"action": robot["action"]["statistics"]}
        config = Dream.write(model.spec)
        if "state" in made.encoders:
            config["proprio_dim"] = made.encoders["state"]["init_args"]["size"]
            if robot["state"]["mode"] != "identity":
                features["proprio"] = robot["state"]["statistics"]
        key = robot["dataset"] or "robot"
        read = model.published.get("config.json", {}) | model.published
        known = {**(read.get("norm_stats") or {}), **(read.get(STATISTICS) or {})}
        statistics = {**known, key: {**known.get(key, {}), **features}}
        return config | {
            "architectures": ["DreamVLAForActionPrediction"],
            "model_type": "dream-vla",
            **qwen_tower.written(tower, read, model.spec.transformer.vocab),
            "n_action_bins": robot["bins"]["bins"],
            FIRST_ACTION: robot["bins"]["last_id"] + 1 - robot["bins"]["bins"],
            ENDS: robot["tail"],
            "num_actions_chunk": robot["chunk"],
            "unnorm_key": key,
            "norm_stats": statistics,
            STATISTICS: statistics,
        }


def _robot(config: dict[str, Any], spec: Spec, has_state: bool) -> dict[str, Any]:
    """The action codec as `Robot.to_dict` gives it.

    Raises:
        ValueError: there are no statistics, two files differ about them, or the data set is not
            among them or none of several is chosen.
    """
    statistics = _statistics(config)
    try:
        name = find_dataset(statistics, config.get("unnorm_key"))
        action = choose(statistics, "action", name)
    except KeyError as error:
        raise ValueError(
            f'Dream-VLA: {error.args[0]}; "unnorm_key" in config.json names it'
        ) from error
    proprio = statistics[name].get("proprio") if has_state else None
    first, tail = _ids(config, spec)
    bins = BINS if config.get("n_action_bins") is None else config["n_action_bins"]
    usual = [length for part, length in CHUNKS.items() if part in name.lower()]
    given = [config[key] for key in CHUNK_KEYS if config.get(key) is not None]
    chunks = [*given, *usual, CHUNKS["libero"]]
    return {
        "chunk": chunks[0],
        "dataset": name,
        "tail": tail,
        "bins": {
            "bins": bins,
            "low": -1.0,
            "high": 1.0,
            "last_id": first + bins - 1,
            "reverse": True,
        },
        "action": _normalizer(action, zero_constant=True),
        "state": _normalizer(proprio, zero_constant=False),
    }


def _statistics(config: dict[str, Any]) -> dict[str, Any]:
    """Statistics by data set, of both places they are published in."""
    inside, file = config.get("norm_stats") or {}, config.get(STATISTICS) or {}
    differ = sorted(name for name in inside.keys() & file if inside[name] != file[name])
    if differ:
        raise ValueError(
            f"Dream-VLA: norm_stats of config.json and {STATISTICS} differ about {differ}; remove "
            "the one that is not of these weights"
        )
    if not inside and not file:
        raise ValueError(
            f"Dream-VLA: neither {STATISTICS} nor norm_stats in config.json, without which tokens "
            "cannot become actions; add the statistics of the data the model was fine-tuned on"
        )
    return {**inside, **file}


def _normalizer(statistics: dict[str, Any] | None, zero_constant: bool) -> dict[str, Any]:
    """A normaliser as `Normalizer.to_dict` gives it; the identity without statistics."""
    return {
        "mode": "identity" if statistics is None else "quantile",
        "mask": None if statistics is None else statistics.get("mask"),
        "zero_constant": zero_constant,
        "statistics": statistics or {},
    }


def _ids(config: dict[str, Any], spec: Spec) -> tuple[int, list[int]]:
    """The lowest action id, and the ids that close an answer: end of the turn, newline."""
    if spec.mask_id is None:
        raise spec.unknown_mask()
    is_published = spec.mask_id == LANGUAGE["mask_token_id"]
    usual = [IM_END, NEWLINE] if is_published else [spec.eos_id] * 2
    return config.get(FIRST_ACTION) or spec.mask_id + 1, config.get(ENDS) or usual


def _state_size(config: dict[str, Any], robot: dict[str, Any]) -> int:
    """Numbers in a state.

    Raises:
        ValueError: nothing says how many.
    """
    statistics = robot["state"]["statistics"]
    size = config.get("proprio_dim") or len(statistics.get("q01", ()))
    if not size:
        raise ValueError(
            f"Dream-VLA: a proprio projector, but no 'proprio' statistics of {robot['dataset']!r}; "
            f'add them to {STATISTICS}, or "proprio_dim" to config.json for states that come '
            "normalised"
        )
    return size
