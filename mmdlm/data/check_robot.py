"""Every problem of every episode of a robot data set, found before training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdlm.data.check import BAR, Checked, Problem
from mmdlm.data.lerobot import Episode, LeRobot

SHOWN = 5  # frames that are named in a message
EPISODES = 8  # decoded at a time


def check_robot(
    folders: Items[Path],
    keys: Items[str] = ("observation.state", "action"),
    cameras: Items[str] | None = None,
    media: bool = True,
    seconds: float | None = None,
) -> Checked:
    """Checks the numbers of all episodes, and their images as far as the time allows.

    Args:
        folders: LeRobot data sets.
        keys: features of state and action; "" for none.
        cameras: image features; None: all.
        media: also decode the images.
        seconds: time for the images; None: all are decoded.
    """
    found = Checked()
    for folder in folders:
        try:
            source = LeRobot(folder)
        except (ValueError, KeyError, OSError) as error:
            found.problems.append(Problem.of(str(folder), "not valid", error))
            continue
        found.rows += len(source)
        found.problems += _numbers(source, [key for key in keys if key])
        wanted = source.cameras if cameras is None else cameras
        found.media.update({"image": len(source) * len(wanted)})
        if media:
            _images(source, wanted, seconds, found)
    return found


def place(source: LeRobot, episode: Episode) -> str:
    """How an episode is named in messages."""
    return f"{source.root}, episode {episode.index}"


def _numbers(source: LeRobot, keys: Items[str]) -> Iterator[Problem]:
    """Problems of lengths, numbers, clocks and instructions."""
    columns: dict[str, np.ndarray] = {}
    for key in (*keys, "timestamp", "task_index"):
        try:
            columns[key] = source.column(key)
        except Exception as error:  # noqa: BLE001 - pyarrow has errors of many types
            yield Problem.of(str(source.root), "not readable", f"{key}: {_said(error)}")
    for episode in source.episodes:
        length, at = episode.stop - episode.start, place(source, episode)
        if length < 2:
            yield Problem(at, "episode too short", f"it has {length} frames; remove it")
        parts = {key: values[episode.start : episode.stop] for key, values in columns.items()}
        for key in keys:
            if key in parts and (wrong := _not_finite(parts[key])):
                yield Problem(at, "not a number", f"{key} is NaN or infinite at {wrong}")
        if "timestamp" in parts and (wrong := _jumps(parts["timestamp"], source)):
            yield Problem(at, "clock jump", wrong)
        for number in np.unique(parts.get("task_index", ())):
            if not str(source.tasks.get(int(number), "")).strip():
                yield Problem(at, "no instruction", f"task_index {number} has no text in meta/")


def _not_finite(values: np.ndarray) -> str:
    """Which frames hold NaN or infinity; empty if none does."""
    bad = ~np.isfinite(values.reshape(len(values), -1).astype(np.float64)).all(1)
    return _frames(np.flatnonzero(bad))


def _frames(numbers: np.ndarray) -> str:
    """Some frame numbers as text; empty without any."""
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    listed = ", ".join(map(str, numbers[:SHOWN]))
    return f"frame{'s' * (len(numbers) > 1)} {listed}{more}" if len(numbers) else ""


def _jumps(times: np.ndarray, source: LeRobot) -> str:
    """Where the time between two frames is not 1 / fps; empty if nowhere."""
    steps, period = np.diff(times.astype(np.float64)), 1 / source.fps
    # The time stamps are float32, whose rounding grows with them.
    rounding = 2 * np.spacing(np.abs(times[1:]).astype(np.float32)).astype(np.float64)
    wrong = np.flatnonzero(~(np.abs(steps - period) <= source.tolerance_s + rounding))
    if not len(wrong):
        return ""
    return (
        f"the time before {_frames(wrong + 1)} is {steps[wrong[0]]:.6g} s, expected "
        f"{period:.6g} s ({source.fps} frames per second)"
    )


def _images(source: LeRobot, cameras: Items[str], seconds: float | None, found: Checked) -> None:
    """Decodes images, several episodes at a time; adds problems and counts."""
    if not cameras:
        return

    def decoded(job: tuple[str, Episode]) -> tuple[int, Problem | None]:
        camera, episode = job
        count = 0
        try:
            for _ in source.images(camera, episode.start, episode.stop):
                count += 1
        except Exception as error:  # noqa: BLE001 - any error here would end the training
            text = f"{camera}, frame {count}: {_said(error)}"
            return count, Problem.of(place(source, episode), "unreadable image", text)
        expected = episode.stop - episode.start
        if count != expected:
            text = f"{camera} has {count} images for {expected} frames"
            return count, Problem(place(source, episode), "unreadable image", text)
        return count, None

    end = None if seconds is None else time.monotonic() + seconds
    jobs = iter([(camera, episode) for episode in source.episodes for camera in cameras])
    total, before = len(source) * len(cameras), found.opened
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc="images", **BAR) as bar:
        while (end is None or time.monotonic() < end) and (some := list(islice(jobs, EPISODES))):
            for count, problem in pool.map(decoded, some):
                found.opened += count
                found.problems += [problem] if problem else []
                bar.update(count)
    if next(jobs, None) is not None:
        found.notes.append(
            f"{source.root}: {found.opened - before} of {total} images were decoded in "
            f"{seconds:g} s; mmdlm data check, or --check all, decodes all of them"
        )


def _said(error: Exception) -> Any:
    """The message of an error; of a KeyError without the quotation marks."""
    return error.args[0] if isinstance(error, KeyError) and error.args else error
