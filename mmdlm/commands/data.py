"""Commands that make training data: `mmdlm data make scenes|speech|episodes|driving`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mmdlm.data.episodes import Collected

# The tasks the bundled model is trained on, see configs/train/tiny.yaml.
TASKS = (
    *("button-press-topdown-v3", "drawer-close-v3", "window-close-v3", "handle-press-v3"),
    *("door-close-v3", "coffee-button-v3", "window-open-v3", "plate-slide-v3"),
)


def make_scenes(
    out: Path,
    count: int = 1000,
    seed: int = 0,
    size: int = 64,
    asked: int = 4,
    format: Literal["imagefolder", "llava"] = "imagefolder",
) -> int:
    """Draws images with their captions and questions.

    mmdlm data make scenes data/scenes --count 5000
    mmdlm data make scenes data/scenes --format llava

    Args:
        out: folder to write; must be empty.
        count: number of images.
        seed: of the images.
        size: side of an image in pixels.
        asked: questions per image.
        format: imagefolder (metadata.jsonl), or llava (conversations.json, as the recipes of
            LaViDa, LLaDA-V and Dream-VL read it).
    """
    from mmdlm.data.scene_files import make

    print(make(out, count, seed, size, asked, format))
    return 0


def make_speech(
    out: Path,
    count: int = 12_000,
    held_out: int = 600,
    new_voice: int = 400,
    seed: int = 0,
) -> int:
    """Speaks phrases and keeps them with their words; run again to go on.

    mmdlm data make speech data/speech

    Args:
        out: folder to write; its folders are train, held_out and new_voice.
        count: clips to train on.
        held_out: clips of phrases that training never has.
        new_voice: such clips spoken by voices that training never has.
        seed: of all choices.
    """
    from mmdlm.data.speech import make

    for split, clips in {"train": count, "held_out": held_out, "new_voice": new_voice}.items():
        if clips:
            print(make(out / split, clips, split, seed))
    return 0


def make_episodes(
    out: Path,
    tasks: list[str] = TASKS,
    episodes: int = 50,
    seed: int = 1000,
    noise: float = 0.3,
    size: int = 64,
) -> int:
    """Records a scripted expert in simulation, one LeRobot data set per task.

    mmdlm data make episodes data/episodes --tasks drawer-close-v3,door-close-v3 --episodes 50

    Run again to record the tasks that are missing.

    Args:
        out: folder to write.
        tasks: Meta-World tasks, or "toy" and "pusht", separated by commas.
        episodes: successful episodes per task.
        seed: of the first episode; evaluation uses seeds from 0.
        noise: share of disturbed actions, in [0, 1).
        size: side of the pictures in pixels.
    """
    from mmdlm.data.lerobot import LeRobot
    from mmdlm.simulators.simulator import full_name

    for task in tasks:
        folder = out / task.rpartition("/")[2]
        if (folder / "meta" / "info.json").is_file():
            there = len(LeRobot(folder).episodes)
            if there < episodes:
                raise ValueError(
                    f"{folder} holds {there} episodes, not {episodes}; remove it or ask for fewer"
                )
            print(f"{folder}: {there} episodes, recorded before")
            continue
        made = _recorded(full_name(task), folder, episodes, seed, noise, size)
        print(
            f"{folder}: {made.episodes} episodes, {made.frames} frames, {made.failed} tries failed"
        )
    return 0


def _recorded(
    name: str, folder: Path, episodes: int, seed: int, noise: float, size: int
) -> Collected:
    """Records one task, with a progress bar in a terminal."""
    from tqdm import tqdm

    from mmdlm.data.episodes import collect
    from mmdlm.simulators.simulator import open_simulator

    with (
        open_simulator(name, size=size) as simulator,
        tqdm(total=episodes, desc=name, unit="episode", leave=False, disable=None) as bar,
    ):

        def show(kept: int, failed: int, _: int) -> None:
            bar.set_postfix_str(f"{failed} tries failed")
            bar.update(kept - bar.n)

        return collect(simulator, folder, episodes, seed, noise, on_episode=show)


def make_driving(out: Path, count: int = 3000, seed: int = 1000, size: int = 64) -> int:
    """Records highway-env's rule-based driver: three images, its history and its plan.

    mmdlm data make driving data/driving --count 3000

    Writes train.json and val.json in LLaVA's format, images and the schema of the plans.

    Args:
        out: folder to write; must be empty.
        count: rows; half of them are mirrored.
        seed: of the first episode; evaluation uses seeds from 0.
        size: side of the images in pixels.
    """
    from tqdm import tqdm

    from mmdlm.simulators.demonstrations import make

    with tqdm(total=count, desc="driving", unit="row", leave=False, disable=None) as bar:
        said = make(out, count, seed, size, on_rows=lambda rows: bar.update(rows - bar.n))
    print(said)
    return 0
