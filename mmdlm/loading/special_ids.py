"""Special ids of a published folder: what all its files say about them, merged.

config.json, generation_config.json, the files of the tokenizer and the chat template each name some
of them. Ends of an answer add up. Two mask tokens are a contradiction, which only the user can
settle.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdlm.backbones.family import Spec, is_id
from mmdlm.backbones.rotary import with_theta
from mmdlm.chat import turn_end
from mmdlm.files import read_json
from mmdlm.text import SIDECAR_FILES, Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
LANGUAGE = ("llm_config", "text_config")  # config.json of a language model in that of a system
# Fields of `Spec`, and the names of their tokens in the files of a tokenizer; with "_id" those in
# config.json and generation_config.json.
TOKENS = {"mask_id": "mask_token", "eos_id": "eos_token", "pad_id": "pad_token"}
# Letters of mask tokens in published tokenizers, most of which declare none: <|mask|>, |<MASK>|,
# [MASK], <|mdm_mask|>; but [gMASK] is another token.
MASKS = ("mask", "mdmmask")
TEMPLATE = "the chat template"

Sources = dict[tuple[str, int], str]
"""Field of `Spec` and id to the files that give it; further ends are under "eos_id" too."""


@dataclass(frozen=True)
class SpecialIds:
    """What the files of a folder say.

    Args:
        folder: the checkpoint.
        found: by field of `Spec`, ids in the order in which the files take precedence, and the
            files that give each.
        given: overrides of `mmdlm.load`; what they replace is not looked at.
        tokenizer: None when the folder has none.
    """

    folder: Path
    found: dict[str, dict[int, list[str]]]
    given: Mapping[str, Any]
    tokenizer: Tokenizer | None

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with the overrides, and with the ids that only other files give.

        Where there is a tokenizer, ids that no file gives are null: a default of the published
        code need not be a token of it.
        """
        told: dict[str, Any] = {}
        is_text = self.tokenizer is not None
        for name, token in TOKENS.items():
            if name in self.given:
                told[f"{token}_id"] = self.given[name]
            elif config.get(f"{token}_id") in (None, []) and (is_text or self.found[name]):
                told[f"{token}_id"] = next(iter(self.found[name]), None)
        changed = {**config, **told}
        over = {f"{token}_id": self.given[n] for n, token in TOKENS.items() if n in self.given}
        for inner in _language(config):
            changed[inner] = {**config[inner], **over}
        return with_theta(changed, self.given["theta"]) if "theta" in self.given else changed

    def settle(self, spec: Spec, jinja: str | None) -> tuple[Spec, Sources]:
        """The spec with the ends of all files, and the files that give each id.

        Args:
            spec: read from what `complete` returned.
            jinja: chat template in use; None for none.

        Raises:
            ValueError: the mask token is unknown or contradicts the others.
        """
        sources = {
            (name, number): ", ".join(dict.fromkeys(files))
            for name, ids in self.found.items()
            for number, files in ids.items()
        }
        sources |= {(name, self.given[name]): "load" for name in TOKENS if name in self.given}
        if "stop_ids" not in self.given:
            end = None if self.tokenizer is None else turn_end(self.tokenizer, jinja, spec.family)
            if end is not None:
                said = sources.get(("eos_id", end))
                sources["eos_id", end] = f"{said}, {TEMPLATE}" if said else TEMPLATE
            spec = replace(spec, stop_ids=self._stops(spec, sources))
        if self.tokenizer is not None and not self._holds(spec.pad_id, "pad_id", sources):
            spec = replace(spec, pad_id=spec.eos_id)
        self._check(spec, sources)
        return spec, sources

    def _stops(self, spec: Spec, sources: Sources) -> tuple[int, ...]:
        """Ends besides `eos_id`: those of the spec that apply, then those of the files."""
        stops = [i for i in spec.stop_ids if self._holds(i, "eos_id", sources)]
        files = [number for name, number in sources if name == "eos_id"]
        vocab = spec.transformer.vocab
        if absent := [i for i in files if not is_id(i, vocab)]:
            warnings.warn(
                f"{self.folder}: {sources['eos_id', absent[0]]} gives {absent} as ends, which are "
                f"not among the {vocab} rows of the embedding; they are left out",
                stacklevel=2,
            )
        ends = dict.fromkeys((*stops, *files))
        return tuple(i for i in ends if i != spec.eos_id and i not in absent)

    def _holds(self, number: int | None, name: str, sources: Sources) -> bool:
        """Whether an id is given by a file, or is published and one of the tokenizer's tokens."""
        if self.tokenizer is None or (name, number) in sources:
            return True
        if name == "eos_id" and ("pad_id", number) in sources:  # Dream's class has no end token
            return True
        text = None if number is None else self.tokenizer.backend.id_to_token(number)
        return text in self.tokenizer.added

    def _check(self, spec: Spec, sources: Sources) -> None:
        """Raises unless the ids are known and can be told apart."""
        for name, number in (("mask_id", spec.mask_id), ("eos_id", spec.eos_id)):
            if not self._holds(number, name, sources):
                token = TOKENS[name]
                raise ValueError(
                    f"{self.folder}: no file gives the id of the {token.replace('_', ' ')}: "
                    f"{CONFIG} and {GENERATION} have no {token}_id, and the tokenizer has no "
                    f"{token}; give load({name}=...)"
                )
        for name, number in (("eos_id", spec.eos_id), ("pad_id", spec.pad_id)):
            if number == spec.mask_id:
                raise ValueError(
                    f"{self.folder}: mask_id is {number} ({_source(sources, 'mask_id', number)}), "
                    f"and so is {name} ({_source(sources, name, number)}); expected different "
                    f"tokens, give load(mask_id=...) or load({name}=...)"
                )
        if spec.mask_id in spec.stop_ids:
            raise ValueError(
                f"{self.folder}: {spec.mask_id} is the mask token "
                f"({_source(sources, 'mask_id', spec.mask_id)}) and ends an answer "
                f"({_source(sources, 'eos_id', spec.mask_id)}); give load(mask_id=...) or "
                "load(stop_ids=...)"
            )


def gather(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    given: Mapping[str, Any] | None = None,
) -> SpecialIds:
    """What the files of a folder say about special ids.

    Args:
        folder: the checkpoint.
        config: its config.json.
        tokenizer: its tokenizer, None when it has none.
        given: overrides of `mmdlm.load`. `eos_id` takes the place of the ends in config.json and
            generation_config.json; tokens that the tokenizer names stay ends.

    Raises:
        ValueError: an id is not a token id, or files give different mask tokens.
    """
    given = given or {}
    files = {CONFIG: dict(config)}
    for inner in _language(config):
        told = {k: v for k, v in config.items() if v is not None or k not in config[inner]}
        files[CONFIG] = {**config[inner], **told}
    if (folder / GENERATION).is_file():
        files[GENERATION] = read_json(folder / GENERATION)
    found: dict[str, dict[int, list[str]]] = {name: {} for name in TOKENS}
    for name, token in TOKENS.items():
        if name in given and name != "eos_id":
            continue
        for file, contents in files.items() if name not in given else ():
            for number in _ids(folder / file, name, contents.get(f"{token}_id")):
                found[name].setdefault(number, []).append(file)
        if tokenizer is not None:
            for file, number in _named(folder, tokenizer, name):
                found[name].setdefault(number, []).append(file)
    masks = found["mask_id"]
    if tokenizer is not None and "mask_id" not in given and not masks:
        texts = [text for text in tokenizer.added if re.sub("[^a-z]", "", text.lower()) in MASKS]
        masks |= {tokenizer.id(text): ["tokenizer.json"] for text in texts}
    if len(masks) > 1:
        told = " and ".join(f"{', '.join(files)} {number}" for number, files in masks.items())
        raise ValueError(
            f"{folder}: files contradict each other about the id of the mask token: {told}; "
            "correct one, or give load(mask_id=...)"
        )
    return SpecialIds(folder, found, given, tokenizer)


def _ids(file: Path, name: str, value: Any) -> list[int]:
    """The ids in an entry of config.json or generation_config.json; only ends may be several."""
    numbers = value if isinstance(value, list) and name == "eos_id" else [value]
    numbers = [number for number in numbers if number is not None]
    if any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise ValueError(
            f"{file}: {TOKENS[name]}_id is {value!r}, expected a token id; correct it, or give "
            f"load({name}=...)"
        )
    return numbers


def _named(folder: Path, tokenizer: Tokenizer, name: str) -> Iterable[tuple[str, int]]:
    """The files that name a token for a purpose, and its id.

    Raises:
        ValueError: the token has different ids in the files of the tokenizer.
    """
    sidecars = {f: read_json(folder / f) for f in SIDECAR_FILES if (folder / f).is_file()}
    config, names, added = (sidecars.get(file, {}) for file in SIDECAR_FILES)
    files = {SIDECAR_FILES[0]: config, SIDECAR_FILES[1]: names}
    if not sidecars:
        files = {"the tokenizer": tokenizer.names}
    for file, contents in files.items():
        token = contents.get(TOKENS[name])
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str) or tokenizer.id(text) is None:
            continue  # without an id, no text and no model uses it
        ids = {"tokenizer.json": tokenizer.id(text), SIDECAR_FILES[2]: added.get(text)}
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            if entry.get("content") == text:
                ids[SIDECAR_FILES[0]] = int(number)
        told = {source: number for source, number in ids.items() if number is not None}
        if len(set(told.values())) > 1:
            listed = " and ".join(f"{source} {number}" for source, number in told.items())
            raise ValueError(
                f"{folder}: {file} names {text!r} as {TOKENS[name]}, whose id is in {listed}; "
                f"correct one, or give load({name}=...)"
            )
        yield file, tokenizer.id(text)


def _language(config: Mapping[str, Any]) -> list[str]:
    """Entries of config.json that describe a language model."""
    return [name for name in LANGUAGE if isinstance(config.get(name), Mapping)]


def _source(sources: Sources, name: str, number: int) -> str:
    return sources.get((name, number), "published")
