"""A model as plain data: everything but its weights and its tokenizer. The only serialiser.

Our config.json, the `.ckpt` files of training and every published layout become a `Blueprint`
(`mmdlm.loading`, `mmdlm.systems`); `build` makes the model, `describe` goes back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from encoders.arguments import Recorded
from encoders.checks import AtLeast, AtMost, Checked, Count
from mmdlm import recipe
from mmdlm.backbones.config import GemmaConfig, TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.moe import MoEConfig
from mmdlm.backbones.rotary import RopeScaling
from mmdlm.chat import PLAIN, TEMPLATES, Template
from mmdlm.files import blaming
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.text import Tokenizer

FORMAT = "mmdlm-2"
# Packages a checkpoint may name classes of: a checkpoint must not name arbitrary code.
PARTS = ("encoders", "adapters")
STRATEGIES = ("mmdlm.decoding",)
TEMPLATE_FIELDS = {"chat", "media", "system", "first", "last"}
OUTPUTS = {"actions", "image"}
# Functions of torch that make tensors from sizes.
FACTORIES = frozenset(
    ("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones")
    + ("rand", "randint", "randn", "randperm", "range", "zeros")
)
# Parts may make tensors that no file holds: tables of positions, weights that are dropped again.
TIMES, TENSORS, NUMBERS = 4, 1000, 2**22


@dataclass(frozen=True)
class Task(Checked):
    """What an entry of `Blueprint.tasks` may hold, see there."""

    prompt: str | None = None
    length: Annotated[int, AtLeast(1), AtMost(2**20)] | None = None
    strategies: Any = None
    tasks: tuple[str, ...] | None = None
    execute: Count | None = None
    cameras: tuple[str, ...] | None = None
    placeholder: Literal["mask", "zero"] | None = None


TASK_FIELDS = {field.name for field in dataclasses.fields(Task)}


@dataclass(frozen=True)
class Blueprint(Checked):
    """What a checkpoint says about a model, in plain types that JSON and YAML can hold.

    Args:
        spec: sizes, special ids and conventions of the language model.
        encoders: recipe of each encoder by modality, "image", "audio", "state".
        adapters: recipes under the same names.
        outputs: codecs of values that are not text, by name; "actions" is `Robot.to_dict()`,
            "image" is `ImageCodes.to_dict()`.
        template: what goes beyond `spec.template`: "chat" (name or Jinja text), "media" (text
            around the embeddings of each medium, "{}" marks their place), "system" (default
            system message), "first" (modalities that stand before the prompt), "last" (modalities
            that stand after the text of their message).
        tasks: per task "prompt", "length" (tokens of the canvas), "strategies" (recipes), and for
            acting "tasks" (simulators it knows), "execute" (actions per query), "cameras" (their
            names, the first one is required) and "placeholder" (what the model sees where an
            answer is open: "mask" token or "zero" embeddings, all decided in one forward).
        system: name of the published multimodal system it was read from, None for others.

    Raises:
        ValueError: an entry is unknown or not plain data, or a recipe names a class outside of
            encoders, adapters and mmdlm.decoding.
    """

    spec: Spec
    encoders: dict[str, Recipe] = field(default_factory=dict)
    adapters: dict[str, Recipe] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    system: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec.template not in (*TEMPLATES, PLAIN):
            raise ValueError(
                f"spec.template is {self.spec.template!r}, expected one of "
                f"{', '.join((*TEMPLATES, PLAIN))}"
            )
        for name in ("encoders", "adapters", "outputs", "template", "tasks"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a table")
        for each in (*self.encoders.values(), *self.adapters.values()):
            recipe.check(each, PARTS)
        if unknown := set(self.outputs) - OUTPUTS:
            raise ValueError(f"outputs has {sorted(unknown)}; expected {sorted(OUTPUTS)}")
        if unknown := set(self.template) - TEMPLATE_FIELDS:
            raise ValueError(f"template has {sorted(unknown)}; expected {sorted(TEMPLATE_FIELDS)}")
        check_tasks(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with the format's name; `from_dict` takes them back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], source: Path | str) -> Self:
        """The blueprint that `to_dict` described.

        Args:
            given: what a file holds.
            source: that file, for errors.

        Raises:
            ValueError: an entry is unknown, missing or wrong.
        """
        if given.get("format") != FORMAT:
            raise ValueError(
                f"{source}: format is {given.get('format')!r}, expected {FORMAT!r}; a newer mmdlm "
                "may have written it"
            )
        fields = {name: value for name, value in given.items() if name != "format"}
        missing = sorted({f.name for f in dataclasses.fields(cls)} - set(fields))
        if missing:
            raise ValueError(f"{source} lacks {missing}; export it again")
        try:
            return _dataclass(cls, {**fields, "spec": _spec(fields["spec"])})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def check_tasks(tasks: Mapping[str, Any]) -> None:
    """Raises unless each entry has known fields and its strategies have the form of recipes.

    Args:
        tasks: see `Blueprint`.

    Raises:
        ValueError: the first entry that is wrong.
    """
    for task, entry in tasks.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"task {task!r} is {type(entry).__name__}, expected a table")
        if unknown := set(entry) - TASK_FIELDS:
            raise ValueError(
                f"task {task!r} has {sorted(unknown)}; expected some of {sorted(TASK_FIELDS)}"
            )
        with blaming(f"task {task!r}"):
            Task(**entry)
            strategies = entry.get("strategies")
            if not isinstance(strategies, list | tuple | None):
                raise ValueError(f"strategies is {strategies!r}, expected a list of recipes")
            for each in strategies or ():
                recipe.check(each, STRATEGIES)


class Budget(TorchFunctionMode):
    """Raises as soon as modules are larger than the tensors they will be filled from.

    Sizes in a config.json of 500 bytes may ask for a billion layers. On the meta device these need
    no memory for their weights, but time and memory for the modules; tables are computed for real.

    Args:
        tensors: number of tensors in the files.
        numbers: their elements together.
    Raises:
        ValueError: inside the context, more is built.
    """

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        self.held = (tensors, numbers)
        self.tensors, self.numbers = TIMES * tensors + TENSORS, TIMES * numbers + NUMBERS

    @classmethod
    def of(cls, shapes: Iterable[Iterable[int]]) -> Self:
        """The budget of weight files whose tensors have these shapes."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return cls(len(sizes), sum(sizes))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The result of a function of torch, counted where it makes a tensor."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and getattr(func, "__name__", "") in FACTORIES:
            self.tensors -= 1
            self.numbers -= made.numel()
            if self.tensors < 0 or self.numbers < 0:
                count, size = self.held
                raise ValueError(
                    f"the sizes describe a much larger model than the weights, which are {count:,} "
                    f"tensors of {size:,} numbers. Do config.json and the weights belong together?"
                )
        return made


def build(
    blueprint: Blueprint, tokenizer: Tokenizer | None = None, budget: Budget | None = None
) -> MultimodalDLM:
    """The model of a blueprint, its weights on the meta device. Nothing is downloaded.

    An encoder or adapter that computes tensors which are not among its weights (non-persistent
    buffers) is built on the CPU, as no file could fill them.

    Args:
        blueprint: what to build.
        tokenizer: None for token methods only.
        budget: what the model may be built of, for a blueprint from a file; None for no limit.

    Raises:
        ValueError: a recipe does not fit its class, an encoder has no adapter, or the budget is
            exceeded.
        KeyError: an output lacks an entry.
    """
    limit = nullcontext() if budget is None else budget
    robot = drawing = None
    if "actions" in blueprint.outputs:
        from adapters.robot import Robot

        robot = Robot.from_dict(blueprint.outputs["actions"])
    if "image" in blueprint.outputs:
        from adapters.image_codes import ImageCodes

        drawing = ImageCodes.from_dict(blueprint.outputs["image"])
    with limit:
        made = {kind: {n: _part(r) for n, r in getattr(blueprint, kind).items()} for kind in PARTS}
    with torch.device("meta"), limit:
        model = MultimodalDLM(
            blueprint.spec,
            made["encoders"],
            made["adapters"],
            tokenizer,
            robot,
            Template(**blueprint.template) if blueprint.template else None,
            drawing,
        )
    rows = blueprint.spec.transformer.vocab
    if drawing is not None and drawing.ids.stop > rows:
        raise ValueError(
            f"image codes use ids up to {drawing.ids.stop - 1}, but the embedding has {rows} rows; "
            "the files are of different checkpoints"
        )
    if robot is not None and max(robot.bins.ids.stop - 1, *robot.tail, 0) >= rows:
        raise ValueError(
            f"statistics.json: actions use ids up to {max(robot.bins.ids.stop - 1, *robot.tail)}, "
            f"but the embedding has {rows} rows; the files are of different checkpoints"
        )
    model.preset = copy.deepcopy(dict(blueprint.tasks))
    model.system = blueprint.system
    return model


def describe(model: MultimodalDLM) -> Blueprint:
    """The blueprint of a model; `build` makes a model of the same shapes from it.

    Raises:
        TypeError: a part was built with arguments that are not plain data.
    """
    tasks = {
        task: {
            name: [recipe.recipe(each) for each in value]
            if name == "strategies" and value
            else value
            for name, value in entry.items()
        }
        for task, entry in model.preset.items()
    }
    return Blueprint(
        spec=model.spec,
        encoders={name: _without_download(part) for name, part in model.encoders.items()},
        adapters={name: _without_download(part) for name, part in model.adapters.items()},
        outputs={
            name: codec.to_dict()
            for name, codec in (("actions", model.robot), ("image", model.drawing))
            if codec is not None
        },
        template={} if model.template is None else model.template.to_dict(),
        tasks=tasks,
        system=model.system,
    )


def _without_download(part: Recorded) -> Recipe:
    """The recipe of a part; its weights are in the checkpoint, not on the hub."""
    found = recipe.recipe(part)
    return {**found, "init_args": _offline(found["init_args"])}


def _offline(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments that download nothing, in nested recipes too."""
    nested = {
        name: {**value, "init_args": _offline(value.get("init_args") or {})}
        for name, value in arguments.items()
        if isinstance(value, Mapping) and "class_path" in value
    }
    return arguments | nested | ({"pretrained": False} if "pretrained" in arguments else {})


def _part(given: Recipe) -> nn.Module:
    """An encoder or adapter, on the meta device unless it computes more than its weights."""
    with torch.device("meta"):
        made = recipe.build(given, PARTS, Recorded, _offline)
    if _fillable(made):
        return made
    # Random weights that a file overwrites must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return recipe.build(given, PARTS, Recorded, _offline)


def _fillable(part: nn.Module) -> bool:
    """Whether the state dict holds every tensor that lies on the meta device."""
    stored = part.state_dict(keep_vars=True).values()
    known = {id(tensor) for tensor in stored}
    held = [tensor for module in part.modules() for tensor in module._buffers.values()]
    held += [v for module in part.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    return all(tensor is None or not tensor.is_meta or id(tensor) in known for tensor in held)


def _spec(given: Any) -> Spec:
    """A spec from plain types, see `_dataclass` for the errors."""
    if not isinstance(given, Mapping):
        raise ValueError(f"spec is {given!r}, expected a table")
    sizes = dict(given.get("transformer", {}))
    if sizes.get("moe") is not None:
        sizes["moe"] = _dataclass(MoEConfig, sizes["moe"])
    if sizes.get("gemma") is not None:
        sizes["gemma"] = _dataclass(GemmaConfig, sizes["gemma"])
    if sizes.get("rope") is not None:
        sizes["rope"] = _dataclass(RopeScaling, sizes["rope"])
    return _dataclass(Spec, {**given, "transformer": _dataclass(TransformerConfig, sizes)})


def _dataclass(kind: type, given: Mapping[str, Any]) -> Any:
    """A dataclass from its dictionary.

    Raises:
        ValueError: an entry is unknown or missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(given) - set(known))
    missing = [
        name
        for name, f in known.items()
        if f.default is f.default_factory is dataclasses.MISSING and name not in given
    ]
    if unknown or missing:
        raise ValueError(
            f"{kind.__name__} has unknown {unknown} and lacks {missing}; a newer mmdlm may have "
            "written it"
        )
    # JSON has no tuples, and these dataclasses have no lists.
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
