"""Robot episodes: recording a scripted expert, and the dataset for training a policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from PIL import Image

from mmdlm.data.dataset import Dataset, example
from mmdlm.data.lerobot import LeRobot
from mmdlm.data.lerobot_writer import Writer
from mmdlm.messages import Example, Turn
from mmdlm.word_list import pieces

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_SEED = 1000  # evaluation uses seeds from 0
IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
AFTER_SUCCESS = 5  # frames kept after the goal; without them a policy stops early


class World(Protocol):
    """Protocol of a simulator; `mmdlm.simulators.simulator.Simulator` implements it."""

    instruction: str
    horizon: int
    fps: int

    def reset(self, seed: int) -> dict[str, Any]:
        """The first observation."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool]:
        """Observation, reward, success so far, done."""

    def expert(self) -> np.ndarray:
        """The expert's action in the current state."""


@dataclass(frozen=True)
class Collected:
    """Result of `collect`: episodes kept and failed, frames written, first unused seed."""

    episodes: int
    failed: int
    frames: int
    next_seed: int


def collect(
    simulator: World,
    out: str | Path,
    episodes: int,
    seed: int = FIRST_SEED,
    noise: float = 0.3,
    scale: float = 0.7,
    on_episode: Callable[[int, int, int], None] | None = None,
) -> Collected:
    """Records a scripted expert as a LeRobot data set.

    A share `noise` of the executed actions is disturbed, in bursts of one to seven steps with a
    fixed direction, while the recorded actions are those of the expert: the data contains
    recoveries (DART, arXiv 1703.09327, with independent noise per step; bursts deviate further).
    Episodes without success are skipped. Run one process per task to use more cores.

    Args:
        simulator: an open simulator with an expert.
        out: folder to write; must not hold a data set.
        episodes: number of successful episodes to record.
        seed: seed of the first attempt; each attempt uses the next one. Evaluation uses seeds from
            0, so stay at 1000 or above.
        noise: share of the executed actions that are disturbed, in [0, 1).
        scale: standard deviation of a disturbance in units of half the action range.
        on_episode: called after each attempt with (kept, failed, length).
    Raises:
        ValueError: the arguments are out of range, or three of four attempts fail.
    """
    if not 0 <= noise < 1 or episodes < 1:
        raise ValueError(
            f"collect: noise is {noise} and episodes {episodes}, expected [0, 1) and at least 1"
        )
    kept = failed = frames = 0
    writer: Writer | None = None
    while kept < episodes:
        episode = record(simulator, seed, noise, scale)
        seed += 1
        if episode is None:
            failed += 1
            if failed >= 20 and failed > 3 * kept:
                raise ValueError(
                    f"collect: the expert failed {failed} of {kept + failed} attempts; give a "
                    f"longer horizon (now {simulator.horizon}) or less noise (now {noise})"
                )
        else:
            if writer is None:
                shapes = {key: values.shape[1:] or (1,) for key, values in episode.items()}
                writer = Writer(out, shapes, simulator.fps, type(simulator).__name__.lower())
            writer.add_episode(simulator.instruction, episode)
            kept, frames = kept + 1, frames + len(episode[ACTION])
        if on_episode is not None:
            on_episode(kept, failed, 0 if episode is None else len(episode[ACTION]))
    writer.close()
    return Collected(kept, failed, frames, seed)


def record(simulator: World, seed: int, noise: float, scale: float) -> dict[str, np.ndarray] | None:
    """Frames of one expert episode; None if the goal was not reached.

    Args:
        simulator: an open simulator with an expert.
        seed: seed of the episode and of its disturbances.
        noise: share of disturbed actions, in [0, 1).
        scale: standard deviation of a disturbance in units of half the action range.
    Returns:
        image uint8 [T Y X 3], state float32 [T S], action float32 [T A] under their LeRobot names.
    """
    rng = np.random.default_rng(
        [seed, 7919]
    )  # differs from the simulator's stream of the same seed
    begin = noise / (4 * (1 - noise) + noise)  # bursts last 4 steps on average: share = noise
    obs, success, left, offset = simulator.reset(seed), False, 0, None
    frames: dict[str, list[np.ndarray]] = {IMAGE: [], STATE: [], ACTION: []}
    remaining = simulator.horizon
    while remaining > 0:
        action = simulator.expert()
        for key, value in ((IMAGE, obs["image"]), (STATE, obs["state"]), (ACTION, action)):
            frames[key].append(value)
        if left == 0 and rng.random() < begin:
            left = int(rng.integers(1, 8))
            offset = rng.normal(0.0, scale, action.shape) * (simulator.high - simulator.low) / 2
        executed = action if left == 0 else action + offset
        left = max(left - 1, 0)
        obs, _, success, _ = simulator.step(
            np.clip(executed, simulator.low, simulator.high).astype(np.float32)
        )
        remaining = min(remaining - 1, AFTER_SUCCESS) if success else remaining - 1
    return {key: np.stack(values) for key, values in frames.items()} if success else None


class Episodes(Dataset):
    """Frames of robot episodes, each with the chunk of actions that follows.

    The answer of a sample is the next `chunk` actions, float32 [K A] in robot units; beyond the end
    of an episode its last action is repeated. `group` is the instruction. All images are decoded
    once and kept in memory (12 kB each at 64 pixels).

    Args:
        root: a LeRobot data set, or a folder of data sets.
        chunk: K, actions per answer.
        size: rows and columns of the image in pixels; images of another size are resized.
        augment: change the brightness of images by up to 10 %, and add noise of 2 % of its standard
            deviation to the state. Images are not shifted, since state and actions are absolute
            positions.
        tasks: names of the folders to use; None: all.
        part: "train" excludes the last tenth of the episodes of each folder, "val" is that tenth.
        camera: image feature to use, or several, whose images are laid out in this order; None:
            the only one, if any.
        state: feature of the robot's state; "" for a policy without one.
        action: feature of the actions.
        tolerance_s: largest difference in seconds between the time stamps of a frame and its video
            frame.
    Raises:
        FileNotFoundError: there is no data set at `root`, or no folder of a task.
        KeyError: there is no such camera or feature.
        ValueError: the data sets have different sizes, or the camera is ambiguous.
    """

    EXAMPLE: ClassVar[str] = (
        "pusht/meta/info.json, pusht/data/chunk-000/file-000.parquet,\n"
        "pusht/videos/observation.image/chunk-000/file-000.mp4"
    )
    """How the files look, for `mmdlm data formats`."""

    def __init__(
        self,
        root: str | Path,
        chunk: int = 8,
        size: int = 64,
        augment: bool = False,
        tasks: list[str] | None = None,
        part: Literal["all", "train", "val"] = "all",
        camera: str | list[str] | None = None,
        state: str = STATE,
        action: str = ACTION,
        tolerance_s: float = 1e-4,
    ) -> None:
        if chunk < 1 or size < 1:
            raise ValueError(f"Episodes: chunk is {chunk} and size {size}, expected at least 1")
        if part not in ("all", "train", "val"):
            raise ValueError(f"Episodes: part is {part!r}, expected 'all', 'train' or 'val'")
        self.chunk, self.size, self.augment = chunk, size, augment
        self.folders, self.keys = folders(Path(root), tasks), (state, action)
        sources = [LeRobot(path, tolerance_s) for path in self.folders]
        loaded = [_load(source, size, part, camera, self.keys) for source in sources]
        kinds = sorted({(one.states.shape[1], one.actions.shape[1]) for one in loaded})
        if len(kinds) != 1:
            raise ValueError(
                f"{root} mixes (state, action) sizes {kinds}; name the folders to use in tasks"
            )
        images = np.concatenate([one.images for one in loaded])
        self.images = images[:, 0] if images.shape[1] == 1 else images
        """uint8 [frames Y X 3]; of several cameras [frames cameras Y X 3]."""
        self.states = np.concatenate([one.states for one in loaded])
        self.actions = np.concatenate([one.actions for one in loaded])
        lengths = np.concatenate([one.lengths for one in loaded])
        self.ends = np.repeat(
            np.cumsum(lengths), lengths
        )  # [frames], end of the episode of each frame
        self.instructions = [text for one in loaded for text in one.instructions]
        self._spread = self.states.std(0)

    def __len__(self) -> int:
        return len(self.actions)

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The frame at `index` with the next actions; `rng` is used only for augmentation."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} is outside the {len(self)} frames")
        ahead = np.minimum(np.arange(index, index + self.chunk), self.ends[index] - 1)
        answer, instruction = self.actions[ahead], self.instructions[index]
        images, state = self.images[index].copy(), self.states[index].copy()
        images = [images] if images.ndim == 3 else list(images)
        if self.augment:
            images = [jitter(image, rng) for image in images]
            state += 0.02 * self._spread * rng.standard_normal(state.shape, np.float32)
        turn = Turn(prompt=instruction, answer=answer, length=answer.size)
        media = {"image": images} | ({"state": state} if state.size else {})
        return example((turn,), group=instruction, **media)

    def vocabulary(self) -> list[str]:
        """Every word of the instructions, sorted."""
        return sorted({word for text in set(self.instructions) for word in pieces(text)})

    def texts(self, index: int) -> list[str]:
        """The instruction of a frame."""
        return [self.instructions[index]]

    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """Mean, std, min, max, q01 and q99 of "action" and "state", as lists over dimensions.

        The lists of a state are empty if there is none.
        The format of `adapters.normalize.Normalizer` and statistics.json.
        """
        return {"action": describe(self.actions), "state": describe(self.states)}


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, std, min, max, q01 and q99 of each column of [frames S], as lists."""
    values = values.astype(np.float64)
    found = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    return {name: value.tolist() for name, value in found.items()}


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes the brightness of an image, uint8 [Y X 3], by up to 10 %."""
    return np.clip(image * np.float32(rng.uniform(0.9, 1.1)) + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Loaded:
    images: np.ndarray  # [frames cameras Y X 3]
    states: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    instructions: list[str]


def is_robot(path: Path) -> bool:
    """Whether a folder is a LeRobot data set or holds some."""
    return any(next(path.glob(f"{at}meta/info.json"), None) for at in ("", "*/"))


def folders(root: Path, tasks: list[str] | None = None) -> list[Path]:
    """The LeRobot data sets of a folder, or the folder itself if it is one.

    Args:
        root: the folder.
        tasks: names of the folders to use; None: all.

    Raises:
        FileNotFoundError: there is none.
    """
    if tasks is None and (root / "meta" / "info.json").is_file():
        return [root]
    found = sorted(path.parent.parent for path in root.glob("*/meta/info.json"))
    if tasks is not None:
        names = {path.name: path for path in found}
        missing = [task for task in tasks if task not in names]
        if missing:
            raise FileNotFoundError(f"{root} has no data set {missing}; it has {sorted(names)}")
        found = [names[task] for task in tasks]
    if not found:
        raise FileNotFoundError(
            f"{root} holds no LeRobot data set (meta/info.json); record one with "
            "mmdlm.data.episodes.collect"
        )
    return found


def _load(
    source: LeRobot,
    size: int,
    part: str,
    camera: str | list[str] | None,
    keys: tuple[str, str],
) -> _Loaded:
    if not camera and len(source.cameras) > 1:
        raise ValueError(f"{source.root} has cameras {source.cameras}; select one with camera=...")
    cameras = [camera] if isinstance(camera, str) else camera or source.cameras
    first = len(source.episodes) - max(1, len(source.episodes) // 10)
    kept = {"all": source.episodes, "train": source.episodes[:first]}.get(
        part, source.episodes[first:]
    )
    if not kept:
        raise ValueError(f"{source.root} has only one episode, so part={part!r} is empty")
    start, stop = kept[0].start, kept[-1].stop
    numbers = source.column("task_index")[start:stop]
    images = np.zeros((stop - start, len(cameras), size, size, 3), np.uint8)
    for i, name in enumerate(cameras):
        for j, image in enumerate(source.images(name, start, stop)):
            images[j, i] = _resized(image, size)
    states, actions = (_vectors(source, key, start, stop) for key in keys)
    return _Loaded(
        images,
        states,
        actions,
        np.array([episode.stop - episode.start for episode in kept]),
        [source.tasks[int(number)] for number in numbers],
    )


def _vectors(source: LeRobot, key: str, start: int, stop: int) -> np.ndarray:
    """A feature of some frames, float32 [frames S]; no columns if it has no name."""
    if not key:
        return np.zeros((stop - start, 0), np.float32)
    try:
        values = source.column(key)[start:stop]
    except KeyError as error:
        raise KeyError(
            f"{error.args[0]}; name the feature with state= or action=, or give state='' for none"
        ) from error
    return values.reshape(stop - start, -1).astype(np.float32, copy=False)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
