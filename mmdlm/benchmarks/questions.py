"""Questions of a data set with their accepted answers, and a model's replies to them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Items
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from tqdm import tqdm

from mmdlm.data.dataset import Dataset
from mmdlm.data.formats import open_data
from mmdlm.files import read_yaml
from mmdlm.lines import escape, read_records
from mmdlm.messages import Example, Media, Message, Slot, assistant
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.generate import Settings, fill, finish
from mmdlm.tasks.results import Results

PARTS = ("test", "val", "train")
"""Data sets of a training config, of which the first that exists is scored."""
Failures = dict[str, str]
"""Errors by the place of a row."""


@dataclass(frozen=True)
class Asked:
    """One question of a data set.

    Args:
        dataset: where it is from.
        row: index of its example.
        branch: number of the answer within its example.
        question: text of the last user message.
        targets: accepted answers.
        group: see `mmdlm.messages.Example`.
        file: file of its first image or clip, if it has one.
    """

    dataset: Dataset = field(repr=False)
    row: int
    branch: int
    question: str
    targets: tuple[str, ...]
    group: str
    file: str | None

    @property
    def place(self) -> str:
        """Where its row stands, see `Dataset.place`."""
        return self.dataset.place(self.row)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the answer."""
        return draw(self.dataset, self.row).conversations[self.branch][:-1]

    @property
    def media(self) -> list[Media]:
        """Images and clips of the conversation."""
        return [part for m in self.messages for part in m.parts if isinstance(part, Media)]

    @property
    def digest(self) -> str:
        """Hex digits that change when the question does."""
        about = repr((self.question, self.targets, self.file)).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(about, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Reply:
    """A model's answer to one question, or the error.

    Args:
        text: the answer.
        forwards: backbone forwards.
        truncated: whether it filled its canvas without an end token.
        error: why there is no answer; empty if there is one.
    """

    text: str = ""
    forwards: int = 0
    truncated: bool = False
    error: str = ""


def open_sets(path: Path, **options: Any) -> dict[str, Dataset]:
    """Data sets of a file by name.

    Args:
        path: see `mmdlm.data.formats.of`; or a YAML file with one data set
            (`{class_path: ..., init_args: ...}`), several by name, or a training config, of which
            the data sets to test on, held out, or to train on are taken, in this order.
        **options: arguments of the format, such as the names of columns.

    Raises:
        ValueError: options are given for a YAML file, or it has another form.
    """
    given = read_yaml(path) if path.suffix in (".yaml", ".yml") else None
    if given is None or (isinstance(given, dict) and "datasets" in given):
        # The canvas of the data is not used. With a length they need not encode their answers.
        return {path.stem: open_data(path, **{"length": 1, **options})}
    if options:
        raise ValueError(f"{', '.join(options)} cannot be given for {path}; write it in there")
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}, expected data sets by name")
    if "class_path" in given:
        given = {path.stem: given}
    config = given.get("data", given)
    recipes = next((config[part] for part in PARTS if config.get(part)), config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=dict[str, Dataset])
    try:
        return dict(parser.instantiate(parser.parse_object({"data": recipes})).data)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def draw(dataset: Dataset, row: int) -> Example:
    """The example of a row, always the same one."""
    return dataset.sample(row, np.random.default_rng(row))


def questions(
    dataset: Dataset, rows: int | None = None, seed: int = 0
) -> tuple[list[Asked], Failures]:
    """Questions of a data set, and the errors of rows that cannot be read.

    Args:
        dataset: after `connect`.
        rows: number of rows, drawn at random; None: all.
        seed: of the draw; a larger number of rows holds the smaller one.

    Raises:
        ValueError: an answer is not a text, or no row can be read.
    """
    chosen = np.arange(len(dataset))
    if rows is not None:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:rows])
    asked: list[Asked] = []
    failures: Failures = {}
    for row in chosen.tolist():
        try:
            asked += _asked(dataset, row)
        except (ValueError, OSError) as error:
            failures[dataset.place(row)] = f"{type(error).__name__}: {error}"
    if not asked:
        first = next(iter(failures.items()), ("the data", "there are no rows"))
        raise ValueError(f"no question can be read; {first[0]}: {first[1]}")
    return asked, failures


def _asked(dataset: Dataset, row: int) -> Iterator[Asked]:
    sample = draw(dataset, row)
    accepted, turns = dataset.accepted(row), sample.turns
    for branch, (turn, messages) in enumerate(zip(turns, sample.conversations, strict=True)):
        if not isinstance(turn.answer, str):
            raise ValueError(
                "the answer is not a text; eval scores texts, policies are scored by mmdlm act"
            )
        is_last = branch == len(turns) - 1
        targets = tuple(accepted) if accepted and is_last else (turn.answer,)
        media = (p.item for m in messages for p in m.parts if isinstance(p, Media))
        file = next((escape(str(item)) for item in media if isinstance(item, str | Path)), None)
        yield Asked(dataset, row, branch, turn.prompt, targets, sample.group, file)


def task_of(dataset: Dataset, asked: Items[Asked]) -> str:
    """What a data set asks for: "caption", "transcribe", "describe", "answer" or "generate".

    Media that all have the same question, with targets of more than two words on average, are
    captions or transcripts.
    """
    task = next((task for task, _, _ in dataset.tasks()), "answer")
    if task != "answer":
        return task
    kinds = {part.kind for part in asked[0].media}
    words = np.mean([len(one.targets[0].split()) for one in asked])
    if len(kinds) == 1 and len({one.question for one in asked}) == 1 and words > 2:
        return {"image": "caption", "audio": "transcribe"}.get(kinds.pop(), "answer")
    return "answer" if kinds else "generate"


def replies(
    model: MultimodalDLM,
    asked: Items[Asked],
    settings: Settings,
    batch_size: int = 16,
    seed: int | None = None,
    results: Results | None = None,
    data: str = "",
    progress: bool | None = None,
) -> list[Reply]:
    """A model's reply to each question, in order; an error costs one reply.

    Args:
        model: model.
        asked: questions.
        settings: canvas length and strategies.
        batch_size: questions per batch.
        seed: see `mmdlm.answer`.
        results: file of replies, not entered yet; those it holds are used, new ones are added.
        data: name of the data in that file.
        progress: show a progress bar; None: on a terminal only.
    """
    keys = [(data, one.row, one.branch, one.digest) for one in asked]
    found: dict[Hashable, Reply] = {}
    with results or nullcontext():
        if results is not None:
            found = _earlier(results, keys)
        todo = [i for i, key in enumerate(keys) if key not in found]
        hidden = None if progress is None else not progress
        with tqdm(total=len(todo), desc="eval", unit="answer", disable=hidden) as bar:
            for start in range(0, len(todo), batch_size):
                numbers = todo[start : start + batch_size]
                made = _batch(model, [asked[i] for i in numbers], settings, seed)
                for i, reply in zip(numbers, made, strict=True):
                    found[keys[i]] = reply
                    if results is not None:
                        _keep(results, asked[i], keys[i], reply)
                bar.update(len(numbers))
    return [found[key] for key in keys]


def key_of(record: dict[str, Any]) -> Hashable:
    """Key of a record of `replies`."""
    source = record["input"]
    return source["data"], source["row"], source["branch"], source["digest"]


def _earlier(results: Results, keys: Items[Hashable]) -> dict[Hashable, Reply]:
    """Replies of an earlier run; the last one of each question counts."""
    finished = results.finished(keys)
    return {
        key_of(record): Reply(record["text"], record["forwards"], record["truncated"])
        for _, record in read_records(results.out)
        if results.is_own(record) and key_of(record) in finished
    }


def _keep(results: Results, asked: Asked, key: Any, reply: Reply) -> None:
    source = dict(zip(("data", "row", "branch", "digest"), key, strict=True))
    record = {**results.fields, "place": asked.place, "question": asked.question}
    if reply.error:
        results.fail({**record, "error": reply.error}, source)
        return
    record |= {"targets": asked.targets, "text": reply.text}
    record |= {"forwards": reply.forwards, "truncated": reply.truncated}
    results.add(record, source)


def _batch(
    model: MultimodalDLM, asked: Items[Asked], settings: Settings, seed: int | None
) -> list[Reply]:
    """Replies of a batch; if it fails, its questions are asked one by one."""
    slot = assistant(Slot(length=settings.length))
    try:
        examples = [Example((*one.messages, slot)) for one in asked]
        filled = fill(model, examples, settings.strategies, batch_size=len(asked), seed=seed)
    except ImportError:
        raise  # a missing library fails for every question
    except Exception as error:  # noqa: BLE001 - damaged media raise all kinds of exceptions
        if len(asked) == 1:
            return [Reply(error=escape(f"{type(error).__name__}: {error}"))]
        return [reply for one in asked for reply in _batch(model, [one], settings, seed)]
    done = [finish(model, each) for each in filled]
    return [Reply(one.text, one.forwards, one.truncated) for one in done]
