"""Users' own data: `mmdlm data formats` and `mmdlm data check`, and the check before training."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from mmdlm.data.check import Checked, Problem
    from mmdlm.data.conversations import Conversations
    from mmdlm.data.dataset import Dataset
    from mmdlm.model import MultimodalDLM

BARS, WIDTH = 8, 24  # bars of the histogram, and characters of the longest
LISTED = 50  # problems that are listed before training
SECONDS = 30.0  # of opening media before training
How = Literal["auto", "all", "texts", "none"]


def formats(name: str | None = None) -> int:
    """Lists the formats of data that training reads, a line each, or explains one.

    mmdlm data formats
    mmdlm data formats Chat

    The format of a file or folder is recognised; no option names it. Columns and folders that are
    not found can be named: --option answer=label in mmdlm data check, `init_args` in YAML.

    Args:
        name: a format of the list: what it reads, its arguments and an example.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mmdlm.commands.arguments import documented
    from mmdlm.data.conversations import Conversations

    known = _formats()
    console = Console(highlight=False)
    if name is None:
        table = Table("name", "what it reads")
        for each, kind in known.items():
            table.add_row(each, escape(documented(kind)[0].partition("\n")[0]))
        console.print(table)
        console.print("Arguments and an example: mmdlm data formats NAME")
        return 0
    kind = known.get(name) or {key.lower(): one for key, one in known.items()}.get(name.lower())
    if kind is None:
        raise ValueError(f"there is no format {name!r}; known: {', '.join(known)}")
    about, texts = documented(kind)
    shared = documented(Conversations)[1]
    console.print(f"{kind.__module__}.{kind.__name__}\n\n{about}\n", markup=False)
    table = Table("argument", "default", "what it is")
    for key, one in inspect.signature(kind).parameters.items():
        default = "needed" if one.default is one.empty else repr(one.default)
        is_shared = texts[key] == "see `Conversations`."
        table.add_row(key, default, escape(shared[key] if is_shared else texts[key]))
    console.print(table)
    console.print(f"\nExample:\n{kind.EXAMPLE.strip()}", markup=False)
    return 0


def check(
    file: Path,
    model: str = "tiny",
    length: int | None = None,
    option: list[str] | None = None,
    media: bool = True,
) -> int:
    """Checks a data set as training would read it, and lists every problem with file and line.

    mmdlm data check my.jsonl --model tiny

    Looks for missing and damaged media, empty answers, answers longer than the canvas, prompts
    longer than the model's context, marks of media left in a text, mask tokens in a text and roles
    out of order; in robot data for NaN, short episodes, clock jumps and damaged images. Exit
    status 1 if there is a problem.

    Args:
        file: your file or folder; see mmdlm data formats.
        model: the model that is to be trained: bundled name, folder, or hub id (owner/name).
        length: canvas of the answers in tokens; by default that of the longest answer.
        option: NAME=VALUE, an argument of the format, such as answer=label; may be repeated.
        media: open every image, clip and video.
    """
    from rich.console import Console

    from mmdlm.checkpoint import load

    found = _checked(file, load(model, device="meta"), length, options(option or ()), media)
    console = Console(highlight=False, soft_wrap=True)
    for problem in found.problems:
        console.print(str(problem), markup=False)
    console.print(summary(found, str(file)))
    for note in found.notes:
        console.print(f"Note: {note}", markup=False)
    return 1 if found.problems else 0


def options(given: Iterable[str]) -> dict[str, Any]:
    """Arguments of a data set from NAME=VALUE, with values as in YAML.

    Raises:
        ValueError: one has another form.
    """
    import yaml

    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"--option is {one!r}, expected NAME=VALUE, such as answer=label")
        found[name.strip()] = yaml.safe_load(value)
    return found


def _formats() -> dict[str, Any]:
    """Every data set of users' files by class name, that of robots included."""
    from mmdlm.data.episodes import Episodes
    from mmdlm.data.formats import formats

    known = {**formats(), "Episodes": Episodes}
    return {name: known[name] for name in sorted(known)}


def _checked(
    file: Path, model: MultimodalDLM, length: int | None, given: dict[str, Any], media: bool
) -> Checked:
    """Result of the check of a file or folder."""
    from mmdlm.data.check import Checked, not_valid
    from mmdlm.data.conversations import collecting, local
    from mmdlm.data.episodes import folders, is_robot
    from mmdlm.data.formats import open_data

    if is_robot(local(file)):
        return _robot(folders(file), given, media)
    given = given if length is None else {**given, "length": length}
    with collecting() as rejected:
        try:
            data = open_data(file, **given)
        except (ValueError, OSError) as error:
            rejected.append((str(file), error))
            data = None
    broken = not_valid(rejected)
    if data is None:
        return Checked(len(broken) - 1, broken)
    return merged(broken, [_conversations(data, model, media, None)])


def opened(
    file: Path, model: MultimodalDLM, given: dict[str, Any], length: int | None = None
) -> Dataset:
    """The data set of a file or folder, connected to a model whose vocabulary has its words.

    Args:
        file: your data.
        model: it grows.
        given: arguments of the data set.
        length: canvas of the answers in tokens; None: that of the longest answer.
    """
    from mmdlm.data.conversations import local
    from mmdlm.data.episodes import Episodes, is_robot
    from mmdlm.data.formats import open_data

    if is_robot(local(file)):
        chunk = {} if model.robot is None else {"chunk": model.robot.chunk}
        data: Dataset = Episodes(file, **chunk | given)
    else:
        data = open_data(file, **given | ({} if length is None else {"length": length}))
    _grown(model, data)
    return data.connect(model.processor, model.preset)


def _grown(model: MultimodalDLM, data: Dataset) -> list[str]:
    """The words of the data that a model lacked; a word that cannot be one stays unknown."""
    from mmdlm.training.vocabulary import grow

    with suppress(ValueError):
        return grow(model, data.vocabulary())
    return []


def _robot(paths: Items[Path], given: dict[str, Any], media: bool) -> Checked:
    from mmdlm.data.check_robot import check_robot
    from mmdlm.data.episodes import ACTION, STATE

    keys = (given.get("state", STATE), given.get("action", ACTION))
    camera = given.get("camera")
    cameras = [camera] if isinstance(camera, str) else camera
    return check_robot(paths, keys, cameras, media)


def _conversations(
    data: Conversations, model: MultimodalDLM, media: bool, seconds: float | None
) -> Checked:
    """Result of the check of a data set, with a vocabulary that has its words."""
    from mmdlm.data.check import check

    new = _grown(model, data)
    found = check(data, model.processor, model.preset, media, seconds, counter(model))
    if new:
        some = ", ".join(new[:8]) + (", ..." if len(new) > 8 else "")
        found.notes.append(f"the vocabulary of the model grows by {len(new)} words: {some}")
    return found


def counter(model: MultimodalDLM) -> Any:
    """A function that counts the tokens of a preprocessed item; None if they do not matter."""
    from functools import cache

    import torch
    from torch.fx.experimental import _config

    from encoders.features import Prepared

    if model.spec.reach is None:
        return None

    @cache
    @torch.no_grad()
    def count(signature: tuple[Any, ...]) -> int:
        kind, shape, size, grid = signature
        if kind not in model.encoders:
            return 0
        item = Prepared(kind, torch.zeros(shape), size, grid)
        # On the meta device a mask has no values; that of a single item has no padding.
        with _config.patch(meta_nonzero_assume_all_nonzero=True):
            return len(model.encode(kind, [item])[0])

    return count


def merged(broken: list[Problem], parts: Iterable[Checked]) -> Checked:
    """One result of several data sets and of the rows that are not valid, in order of place."""
    from mmdlm.data.check import Checked

    whole = Checked(len(broken), list(broken))
    for part in parts:
        whole.add(part)
    whole.problems.sort(key=lambda problem: _natural(problem.place))
    return whole


def _natural(text: str) -> list[str | int]:
    """Sorting key by which line 9 comes before line 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def summary(found: Checked, title: str) -> Table:
    """A table of what a check found."""
    from rich.table import Table

    table = Table("", "", title=title, title_justify="left", show_header=False)
    table.add_row("rows", f"{found.rows:,}")
    for kind, count in sorted(found.media.items()):
        table.add_row(f"{kind} items", f"{count:,}")
    if found.media:
        table.add_row("media opened", f"{found.opened:,}")
    if found.canvas:
        table.add_row("canvas", f"{found.canvas} tokens")
    if found.lengths:
        table.add_row("answers, tokens", "\n".join(histogram(found.lengths)))
    kinds = Counter(problem.kind for problem in found.problems)
    listed = "\n".join(f"{count:>6,}  {kind}" for kind, count in kinds.most_common())
    table.add_row("problems", listed or "none")
    return table


def histogram(lengths: Items[int]) -> list[str]:
    """Lines of a histogram, `from-to  bar  count`."""
    import numpy as np

    values = np.asarray(lengths)
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low + 1) // BARS)
    starts = range(low, high + 1, step)
    counts = [int(((values >= at) & (values < at + step)).sum()) for at in starts]
    names = [str(at) if step == 1 else f"{at}-{at + step - 1}" for at in starts]
    wide = max(map(len, names))
    return [
        f"{name:>{wide}}  {'█' * -(-count * WIDTH // max(counts)):<{WIDTH}}  {count:,}"
        for name, count in zip(names, counts, strict=True)
    ]


# -- before training


def check_first(
    datasets: Iterable[Dataset],
    model: MultimodalDLM,
    rejected: Items[tuple[str, Exception]],
    how: How = "auto",
) -> None:
    """Checks the data sets of a training, and stops it if there is a problem.

    Only data sets of users' files and of robots are checked; others make their own rows.

    Args:
        datasets: training and held-out data; shares of one data set are checked once.
        model: it is trained on them.
        rejected: rows that could not be read.
        how: "all" opens all media, "auto" as many as half a minute per data set allows, "texts"
            none; "none" checks nothing else than `rejected`.

    Raises:
        SystemExit: with status 1; the problems are on stderr.
    """
    from mmdlm.data.check import not_valid
    from mmdlm.data.check_robot import check_robot
    from mmdlm.data.conversations import Conversations
    from mmdlm.data.episodes import Episodes

    parts, seconds = [], {"auto": SECONDS}.get(how)
    for data in different(datasets) if how != "none" else ():
        if isinstance(data, Conversations):
            parts.append(_conversations(data, model, how != "texts", seconds))
        elif isinstance(data, Episodes):
            # Its images were decoded when it was made.
            parts.append(check_robot(data.folders, data.keys, media=False))
    found = merged(not_valid(rejected), parts)
    for note in found.notes:
        print(f"Note: {note}", file=sys.stderr)
    if not found.problems:
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for problem in found.problems[:LISTED]:
        console.print(str(problem), markup=False)
    left = len(found.problems) - LISTED
    if left > 0:
        console.print(f"... and {left} more; mmdlm data check FILE lists all of them")
    console.print(summary(found, "the data of this run"))
    console.print("mmdlm: nothing was trained; correct these rows (--check none skips the check)")
    raise SystemExit(1)


def different(datasets: Iterable[Dataset]) -> list[Dataset]:
    """The data sets inside splits and other wrappers, without repetitions of the same files."""
    from mmdlm.commands.finetune import base

    found: list[Dataset] = []
    for data in map(base, datasets):
        if not any(_same(data, other) for other in found):
            found.append(data)
    return found


def _same(one: Dataset, other: Dataset) -> bool:
    names = ("places", "root", "length", "prompt", "folders", "keys", "chunk")
    return type(one) is type(other) and all(
        getattr(one, name, None) == getattr(other, name, None) for name in names
    )
