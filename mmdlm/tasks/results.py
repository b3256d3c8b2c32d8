"""Results file of a job over many inputs: locked, resumable, with the failures beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout

from mmdlm.lines import as_line, read_records


class Results:
    """A JSON Lines file of results, written by one process at a time.

    Each line is a record with what identifies its input ("input") and the settings it was made
    with ("settings"). Records of several jobs, such as two tasks, can share a file. Failures are
    in a file beside it, see `failures_file`.

    ```
    with Results(out, {"task": "caption"}, settings, key) as results:
        finished = results.finished(keys)
        results.add(record, source)  # or results.fail(record, source)
    ```

    Args:
        out: the file, appended to. An empty file `.<name>.lock` stays beside it.
        job: fields and values of the records of this job, "task" among them; records of other jobs
            are left as they are. None stands for a missing field.
        settings: what else determines a result, such as the model and the prompt; plain values.
        key: identity of the input of a record of this job. Records of the first edition have
            neither "input" nor "settings".
        redo: inputs whose results were made with other settings are not finished.
        keep: they are finished.
    Raises:
        ValueError: both `redo` and `keep`.
    """

    def __init__(
        self,
        out: str | Path,
        job: Mapping[str, Any],
        settings: Mapping[str, Any],
        key: Callable[[dict[str, Any]], Hashable],
        *,
        redo: bool = False,
        keep: bool = False,
    ) -> None:
        if redo and keep:
            raise ValueError("redo and keep exclude each other; pass one of them")
        self.shown = Path(out)
        self.out = Path(os.path.realpath(out))  # a link is kept when the file is replaced
        self.failures = failures_file(self.shown)
        self.job, self.key = dict(job), key
        self.fields = {name: value for name, value in self.job.items() if value is not None}
        self.settings = json.loads(json.dumps(settings))  # as it is read back
        self.redo, self.keep = redo, keep
        self._lock = FileLock(self.out.with_name(f".{self.out.name}.lock"))
        self._file: BinaryIO | None = None
        self._count = 0  # lines in the file
        self._last: dict[Hashable, tuple[int, Any, Any]] = {}  # line number, input, settings
        self._replaced: set[int] = set()  # numbers of lines with a newer line for their input

    def __enter__(self) -> Self:
        """Locks and reads the file.

        Raises:
            BlockingIOError: another process writes to the file.
            ValueError: the file holds something else; it is unchanged.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise BlockingIOError(
                f"another job writes to {self.shown}; wait until it ends, or pass another output "
                "file"
            ) from error
        try:
            self._read()
            self._file = self.out.open("ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Closes the file and, unless the job was stopped, removes replaced lines."""
        try:
            if self._file is not None:
                self._file.close()
            if kind is None and self._replaced:
                self._remove_replaced()
        finally:
            self._lock.release()

    def finished(
        self, keys: Iterable[Hashable], is_gone: Callable[[Any], bool] = lambda key: False
    ) -> dict[Hashable, Any]:
        """Those of `keys` that have a result, with its "input" (None: first edition).

        The failures of `keys` in earlier runs are removed from the failures file.

        Args:
            keys: the inputs of this run.
            is_gone: whether an input of another run does not exist any more; its failure is
                removed too.
        Raises:
            ValueError: results were made with other settings, without `redo` or `keep`.
        """
        keys = set(keys)
        there = {key: self._last[key][1:] for key in keys & self._last.keys()}
        differ = {key: made for key, (_, made) in there.items() if self._differs(made)}
        if differ and not (self.redo or self.keep):
            raise ValueError(self._difference(list(differ.values())))
        self._forget_failures(lambda key: key in keys or is_gone(key))
        skip = differ if self.redo else {}
        return {key: source for key, (source, _) in there.items() if key not in skip}

    def add(self, record: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> None:
        """Appends a result.

        Args:
            record: the result, with the fields of `job`.
            source: what identifies the input, which is written as "input"; None: `record` does.
        """
        if self._file is None:
            raise RuntimeError("Results.add outside of a with statement")
        line = {**record, **_input(source), "settings": self.settings}
        self._file.write(as_line(line))
        self._file.flush()
        self._count += 1
        self._note(self._count, line)

    def fail(self, record: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> None:
        """Appends a failure to the failures file; arguments as in `add`, with an "error"."""
        with self.failures.open("ab") as file:
            file.write(as_line({**record, **_input(source)}))

    def _read(self) -> None:
        for number, record in read_records(self.out):
            self._count = number
            try:
                if record["task"] and self.is_own(record):
                    self._note(number, record)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"{self.shown}, line {number} is not a result of mmdlm; pass another output "
                    "file"
                ) from error

    def is_own(self, record: dict[str, Any]) -> bool:
        """Whether a record belongs to this job."""
        return all(record.get(name) == value for name, value in self.job.items())

    def _note(self, number: int, record: dict[str, Any]) -> None:
        key, source = self.key(record), record.get("input")
        if key in self._last and "settings" in record:
            self._replaced.add(self._last[key][0])
        made = record.get("settings")
        # One dict for all equal settings: a file may have millions of lines.
        self._last[key] = (number, source, self.settings if made == self.settings else made)

    def _differs(self, made: Mapping[str, Any] | None) -> bool:
        """Whether settings are not those of this job; unknown ones only count with `redo`."""
        return self.redo if made is None else made != self.settings

    def _difference(self, made: list[Mapping[str, Any]]) -> str:
        """Error about results made with other settings."""
        first = made[0]
        names = [n for n in {**first, **self.settings} if first.get(n) != self.settings.get(n)]
        changes = ", ".join(
            f"{name} was {first.get(name)!r} and is {self.settings.get(name)!r}" for name in names
        )
        return (
            f"{self.shown} has {len(made)} results made with other settings: {changes}. Pass "
            "--redo (redo=True) to process their inputs again, --keep (keep=True) to leave them "
            "as they are, or another output file"
        )

    def _forget_failures(self, is_old: Callable[[Any], bool]) -> None:
        lines = [record for _, record in read_records(self.failures)]
        kept = [r for r in lines if not (self.is_own(r) and is_old(self.key(r)))]
        if len(kept) < len(lines):
            _replace(self.failures, map(as_line, kept)) if kept else self.failures.unlink()

    def _remove_replaced(self) -> None:
        with self.out.open("rb") as file:
            lines = (line for n, line in enumerate(file, 1) if n not in self._replaced)
            _replace(self.out, lines)


def failures_file(out: Path) -> Path:
    """File of the failures of a job: `<name>.failed<ending>` beside its results file."""
    return out.with_name(f"{out.stem}.failed{out.suffix}")


def _input(source: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if source is None else {"input": dict(source)}


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Replaces a file at once: a killed process leaves the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, new)
    os.replace(new, path)
