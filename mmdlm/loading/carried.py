"""What a published checkpoint says beside the model, carried into the folder that is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mmdlm.loading.contents import CONFIG, GENERATION
from mmdlm.model import MultimodalDLM

END = "eos_token_id"
SPECIAL = ("mask_token_id", "pad_token_id", END)
Config = dict[str, Any]


def merged(source: Config, written: Config, reread: Callable[[Config], Config]) -> Config:
    """The config.json of the source with what is no longer so replaced.

    Entries that no part of the model repeats stay, and so does the way the others are written:
    LLaDA's `vocab_size` beside `embedding_size`, `rope_parameters` in place of `rope_theta`.

    Args:
        source: config.json that the model was read from.
        written: config.json that describes the model; it wins.
        reread: reads a config.json and writes it again, in the terms of `written`.
    """
    ids = {key: written[key] for key in SPECIAL if written.get(key) is not None}
    try:
        before = reread(source | ids)
        kept = _replaced(source, before, written) | ids
        first, *more = listed(written.get(END)) or [None]
        ends = listed(source.get(END))
        if ends and ends[0] == first and {*ends} <= {first, *more}:
            kept[END] = source[END]
        if reread(kept | ids) == reread(written):
            return kept
        reason = "it would be read as another model"
    except ValueError as error:
        reason = str(error)
    warnings.warn(
        f"the config.json this model comes from is not kept ({reason}); only what mmdlm reads is "
        "written",
        stacklevel=2,
    )
    return written


def _replaced(source: Config, before: Config, written: Config) -> Config:
    """`source` with the entries of `written` that differ from `before`, also in inner tables."""
    changed = {key: value for key, value in written.items() if before.get(key, ...) != value}
    if any(key.startswith("rope") for key in changed):  # one setting under several names
        source = {key: value for key, value in source.items() if not key.startswith("rope")}
        changed |= {key: value for key, value in written.items() if key.startswith("rope")}
    for key, value in changed.items():
        inner = (source.get(key), before.get(key), value)
        if all(isinstance(each, dict) for each in inner):
            changed[key] = _replaced(*inner)
    return source | changed


def beside(model: MultimodalDLM, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON files to write for other programs, by name; together they name every end of an answer.

    Args:
        model: the model.
        config: the published config.json that is written; None for that of `model.published`, and
            no files where the model comes from no published checkpoint.
    """
    files = dict(model.published)
    if config is None:
        config = files.get(CONFIG, {})
    if not files and not config:
        return {}
    ends = [model.spec.eos_id, *model.spec.stop_ids]
    generation = files.get(GENERATION, {})
    inner = [table for table in config.values() if isinstance(table, dict)]  # of a language model
    said = {i for table in (generation, config, *inner) for i in listed(table.get(END))}
    if not said.issuperset(ends):
        # A new file takes the place of all that transformers would read from config.json.
        others = {key: config[key] for key in ("bos_token_id",) if key in config}
        others["pad_token_id"] = model.spec.pad_id
        files[GENERATION] = (generation or others) | {END: ends}
    return files


def listed(ids: int | list[int] | None) -> list[int]:
    """Token ids of a config, which may be one, several or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
