"""Our own layout of a checkpoint folder.

config.json         format, and the blueprint without the two files below
model.safetensors   every weight, under backbone., encoders. and adapters.
tokenizer.json      when the model has a tokenizer
statistics.json     codecs of other outputs than text: action ids and normalisation of a robot
decoding.yaml       prompts, lengths and strategies by task, when it has some
published.json      by name, the JSON files of the published checkpoint it comes from, if it does
README.md           what it was trained on, and its scores

Those of them that other programs read (`mmdlm.loading.contents.BESIDE`) keep their names instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmdlm.blueprint import FORMAT, PARTS, Blueprint, check_tasks
from mmdlm.files import blaming, present, read_json, read_yaml
from mmdlm.loading.contents import BESIDE, CONFIG, Contents, beside, check_published
from mmdlm.loading.shards import index, write_json
from mmdlm.text import Tokenizer, remove

STATISTICS, DECODING, CARD = "statistics.json", "decoding.yaml", "README.md"
PUBLISHED = "published.json"
# The first edition's config.json had these entries, and statistics.json was the robot itself.
FIRST, FIRST_FIELDS = "mmdlm-1", ("spec", "encoders", "adapters")


def read(folder: Path, config: Mapping[str, Any], family: str | None) -> Contents:
    """What a folder in our layout holds.

    Args:
        folder: the checkpoint.
        config: its config.json.
        family: must be None: our layout needs no hint.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is damaged or of another edition, or `family` is given.
    """
    if family is not None:
        raise ValueError(
            f"family={family!r} has no effect on {folder}, which is in our own layout; leave it out"
        )
    published = beside(folder, (PUBLISHED,))
    published |= published.pop(PUBLISHED, {})
    with blaming(folder / PUBLISHED):
        check_published(published)
    blueprint = read_blueprint(folder, config)
    files = {"published": published}
    return Contents(blueprint, Tokenizer.from_folder(folder), index(folder), **files)


def read_blueprint(folder: Path, config: Mapping[str, Any]) -> Blueprint:
    """The blueprint in config.json, statistics.json and decoding.yaml.

    Raises:
        ValueError: an entry is unknown, missing or wrong, or a file is damaged.
    """
    config = dict(config)
    _check_offline({name: config.get(name) for name in PARTS}, folder / CONFIG)
    file = folder / STATISTICS
    outputs = read_json(file) if present(file) else {}
    if config["format"] == FIRST:
        config = first_edition(config)
        outputs = {"actions": outputs} if outputs else {}
    if "actions" in outputs:
        from adapters.robot import Robot

        with blaming(file):
            Robot.from_dict(outputs["actions"])
    tasks = read_tasks(folder / DECODING) if present(folder / DECODING) else {}
    return Blueprint.from_dict({**config, "outputs": outputs, "tasks": tasks}, folder / CONFIG)


def _check_offline(part: Any, file: Path) -> None:
    """Raises if a recipe, or one inside it, wants weights from the network.

    Raises:
        ValueError: an entry "pretrained" is true.
    """
    if isinstance(part, Mapping):
        if part.get("pretrained"):
            raise ValueError(
                f"{file}: pretrained is {part['pretrained']!r}, expected false: the weights are in "
                f"model.safetensors and nothing is downloaded; correct it"
            )
        part = part.values()
    if not isinstance(part, str) and isinstance(part, Iterable):
        for each in part:
            _check_offline(each, file)


def first_edition(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the first edition in today's terms."""
    return {**config, "format": FORMAT, "template": {}, "system": None}


def read_tasks(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a decoding.yaml by task, in plain types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid YAML, or an entry is wrong, see `mmdlm.blueprint.check_tasks`.
    """
    tasks = read_yaml(file)
    if not isinstance(tasks, dict):
        raise ValueError(f"{file}: expected an entry per task, found {type(tasks).__name__}")
    with blaming(file):
        check_tasks(tasks)
    return tasks


def write(
    folder: Path,
    blueprint: Blueprint,
    tokenizer: Tokenizer | None,
    published: Mapping[str, Any],
) -> None:
    """Writes all files but weights and card; those of an earlier model are removed.

    Args:
        folder: existing folder.
        blueprint: what `read_blueprint` gives back.
        tokenizer: None when the model has none.
        published: see `mmdlm.loading.publish.beside`.
    """
    plain = blueprint.to_dict()
    outputs, tasks = plain.pop("outputs"), plain.pop("tasks")
    write_json(folder / CONFIG, plain)
    for name in (STATISTICS, DECODING, PUBLISHED, *BESIDE):
        (folder / name).unlink(missing_ok=True)
    files = {name: each for name, each in published.items() if name in BESIDE}
    if rest := {name: each for name, each in published.items() if name not in BESIDE}:
        files[PUBLISHED] = rest
    for name, contents in files.items():
        write_json(folder / name, contents)
    if outputs:
        write_json(folder / STATISTICS, outputs)
    if tasks:
        text = yaml.safe_dump(tasks, sort_keys=False)
        (folder / DECODING).write_text(text, encoding="utf-8")
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Writes a tokenizer in place of any other that is in the folder."""
    remove(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
