"""The base of published multimodal systems: their parts, settings and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from encoders.arguments import Recorded
from mmdlm import recipe
from mmdlm.backbones.family import Family, Keys
from mmdlm.blueprint import PARTS, Blueprint
from mmdlm.model import MultimodalDLM
from mmdlm.recipe import Recipe
from mmdlm.text import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Beside:
    """Weights beside those of the folder itself, under names of their own.

    Args:
        path: sub-folder (with a single file, or shards and index) or safetensors file, from the
            checkpoint's folder.
        prefix: what is put in front of the names there.
        instead: what it takes the place of. Names that do not begin so (a Whisper decoder beside
            the encoder) are known as "path/name" instead.
    """

    path: str
    prefix: str
    instead: str = ""

    def name(self, inside: str) -> str:
        """What a tensor of that file or sub-folder is called in `System.keys`."""
        if inside.startswith(self.instead):
            return self.prefix + inside.removeprefix(self.instead)
        return f"{self.path}/{inside}"

    def inside(self, name: str) -> str | None:
        """The opposite of `name`; None for the tensors that are elsewhere."""
        if name.startswith(self.prefix):
            return self.instead + name.removeprefix(self.prefix)
        foreign = f"{self.path}/"
        return name.removeprefix(foreign) if name.startswith(foreign) else None


@dataclass(frozen=True)
class Part:
    """A part of a system that is also published as a checkpoint of its own.

    Args:
        prefix: what its tensors begin with in a checkpoint of the system.
        own: what they begin with in its own checkpoint.
        config: entry of the system's config.json that describes it.
    """

    prefix: str
    own: str
    config: str


class System:
    """One published layout with encoders. Subclasses are the system files of this folder.

    A file here translates config.json into a `Blueprint` and gives the names under which the
    weights of each part are published; `mmdlm.loading.published` and `publish` do the rest. It
    holds data only: no tensors, and no import of encoders or adapters, which `table` finds by
    recipe. The smallest one:

        class LaViDa(System):
            TYPES = ("llava_llada",)

            @classmethod
            def matches(cls, config, names):
                return config.get("model_type") == "llava_llada"

            @classmethod
            def read(cls, config, names):
                spec = LLaDA.read(config, names)
                tower = {"class_path": "encoders.vit.ViT", "init_args": {...}}
                adapter = {"class_path": "adapters.lavida.LaViDaAdapter", "init_args": {...}}
                return Blueprint(spec, {"image": tower}, {"image": adapter})

            @classmethod
            def keys(cls, blueprint):
                tower = table(blueprint.encoders["image"])
                unused = {"vision_model.post_layernorm.*": None}
                return {
                    "backbone": ("", backbone(LLaDA)),
                    "encoders.image": ("model.vision_tower.vision_tower.", tower | unused),
                    "adapters.image": ("", table(blueprint.adapters["image"])),
                }

            @classmethod
            def write(cls, model):
                return LLaDA.write(model.spec) | {"model_type": "llava_llada", ...}

    Attributes:
        TYPES: lower-case architectures and model types by which config.json names the system, see
            `Family.TYPES`.
        SIGNS: entries of config.json and beginnings of tensor names; a checkpoint with none of them
            is not of this system, and `matches` is not called. Without any, it always is.
        SPELLINGS: beginnings of tensor names to other ones under which the same tensors are
            published; of those that a checkpoint has, the first counts. `matches`, `read` and
            `keys` see and give the former; a model is written under the names it was read from.
        FILES: JSON files beside config.json (or in sub-folders) that `read` needs, where they are
            there. `read` finds the contents in `config[file]`; what `write` returns under such a
            key becomes that file.
        WEIGHTS: weights beside those of the folder itself. Read where they are there, so a system
            may be published in one file as well; written where they belong.
        PARTS: parts that may be checkpoints of their own, in sub-folders or files of any name or
            where config.json says. They are read from there, see `mmdlm.loading.merged`, and
            written into the checkpoint of the system.
    """

    TYPES: ClassVar[tuple[str, ...]] = ()
    SIGNS: ClassVar[tuple[str, ...]] = ()
    SPELLINGS: ClassVar[dict[str, tuple[str, ...]]] = {}
    FILES: ClassVar[tuple[str, ...]] = ()
    WEIGHTS: ClassVar[tuple[Beside, ...]] = ()
    PARTS: ClassVar[tuple[Part, ...]] = ()

    @classmethod
    def spelling(cls, names: set[str]) -> dict[str, str]:
        """Those of `SPELLINGS` in which a checkpoint's names begin otherwise, and how they do."""
        found = {
            ours: next((to for to in others if any(n.startswith(to) for n in names)), ours)
            for ours, others in cls.SPELLINGS.items()
        }
        return {ours: to for ours, to in found.items() if to != ours}

    @classmethod
    def matches(cls, config: dict[str, Any], names: set[str]) -> bool:
        """Whether a checkpoint is of this system.

        Args:
            config: its config.json.
            names: its tensors, without those of `WEIGHTS`.
        """
        raise TypeError(f"{cls.__name__} does not define matches(config, names)")

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> Blueprint:
        """The blueprint of a checkpoint; its `system` is filled in by the caller.

        Args:
            config: its config.json, and the contents of `FILES` under their names.
            names: its tensors, with those of `WEIGHTS`.

        Raises:
            ValueError: the config asks for something this system never published.
        """
        raise TypeError(f"{cls.__name__} does not define read(config, names)")

    @classmethod
    def with_tokenizer(cls, blueprint: Blueprint, tokenizer: Tokenizer) -> Blueprint:
        """The blueprint with what only the tokenizer says, such as the ids of action tokens.

        Called after `read` where the folder has a tokenizer.

        Raises:
            ValueError: config.json and the tokenizer contradict each other.
        """
        return blueprint

    @classmethod
    def keys(cls, blueprint: Blueprint) -> dict[str, tuple[str, Keys]]:
        """By part, what stands in front of its published names, and its table of names.

        Parts are "backbone", "encoders.image", "adapters.image" and so on; every tensor of the
        model must be in one of them. Tables of encoders and adapters are the `KEYS` of their
        classes, see `table`; that of a backbone is its family's, see `backbone`. Published names
        that have no counterpart are keys with the value None (those of no part in a table under
        ""). They are written back from the folder the model was loaded from.
        """
        raise TypeError(f"{cls.__name__} does not define keys(blueprint)")

    @classmethod
    def apart(cls, model: MultimodalDLM) -> tuple[Beside, ...]:
        """Which of `WEIGHTS` a model is written with; the others go into the folder itself.

        For systems that are published in several layouts.
        """
        return cls.WEIGHTS

    @classmethod
    def write(cls, model: MultimodalDLM) -> dict[str, Any]:
        """The published config.json of a model, and `FILES` under their names.

        `read` must take it back: the caller compares. Keys that are not given keep the value they
        have in the folder the model was loaded from (`model.published`).

        Raises:
            ValueError: the published config cannot express the model.
        """
        raise ValueError(f"{cls.__name__} checkpoints are read only; save in our own layout")


def table(given: Recipe) -> Keys:
    """The table of published names of the class in a recipe.

    Args:
        given: an entry of `Blueprint.encoders` or `Blueprint.adapters`.

    Raises:
        ValueError: the class has none.
    """
    found = recipe.find(given["class_path"], PARTS, Recorded)
    keys = getattr(found, "KEYS", {})
    if not keys:
        raise ValueError(f"{given['class_path']} has no KEYS; give System.keys a table of your own")
    return dict(keys)


def backbone(family: type[Family]) -> Keys:
    """The table of a family without what it leaves aside of multimodal checkpoints."""
    return {ours: published for ours, published in family.KEYS.items() if published is not None}


def respelled(named: Mapping[str, T], beginnings: Mapping[str, str]) -> dict[str, T]:
    """A table whose names begin otherwise, where they begin with one of the keys."""

    def change(name: str) -> str:
        old = next((old for old in beginnings if name.startswith(old)), "")
        return beginnings[old] + name.removeprefix(old) if old else name

    return {change(name): value for name, value in named.items()}


def strategy(path: str, **arguments: Any) -> Recipe:
    """Recipe of a decoding strategy.

    Args:
        path: its class, from `mmdlm.decoding` on, such as "plans.blocks.Blocks".
        **arguments: see there.
    """
    return {"class_path": f"mmdlm.decoding.{path}", "init_args": arguments}


def renamed(keys: Keys, old: str, new: str = "") -> Keys:
    """A table whose published names begin otherwise.

    Args:
        keys: a table, such as that of Whisper under "model.encoder.".
        old: how all its published names begin.
        new: how they begin in this system.

    Raises:
        ValueError: one of them begins otherwise.
    """

    def change(name: str) -> str:
        if not name.startswith(old):
            raise ValueError(f"published name {name!r} does not begin with {old!r}")
        return new + name.removeprefix(old)

    return {
        ours: tuple(map(change, to)) if isinstance(to, tuple) else to and change(to)
        for ours, to in keys.items()
    }
