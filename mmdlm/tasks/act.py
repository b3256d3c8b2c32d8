"""Robot policies: an observation in, a chunk of actions in robot units out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmdlm.decoding import preset
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.messages import Example, Media, Slot, assistant, user

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

# Our keys first; the others are those of openpi's robots (Physical-Intelligence/openpi:
# src/openpi/policies/libero_policy.py), so that its clients fit without renaming.
NAMES = {
    "image": ("image", "observation/image"),
    "state": ("state", "observation/state"),
    "prompt": ("prompt",),
}
KNOWN = tuple(name for names in NAMES.values() for name in names)


class Policy:
    """Turns observations into chunks of actions, decoded in parallel.

    Args:
        model: a model with action statistics, see `load_policy`.
        execute: actions of a chunk to play before asking again; None for the checkpoint's advice,
            else the whole chunk. `infer` always returns whole chunks.
        strategies: how to decode, see `mmdlm.decoding.preset.strategies`; None for the
            checkpoint's way, else everything in one forward.
    Raises:
        ValueError: the model holds no statistics, or `execute` is outside the chunk.
    """

    def __init__(
        self,
        model: MultimodalDLM,
        execute: int | None = None,
        strategies: preset.Choice = None,
    ) -> None:
        if model.robot is None:
            raise ValueError(
                "this checkpoint holds no statistics.json (action ids and normalisation), so its "
                "tokens cannot become actions; use the folder of a policy, such as 'tiny'"
            )
        saved: Mapping[str, Any] = model.preset.get("act") or {}
        self.model, self.robot = model, model.robot
        self.tasks: tuple[str, ...] = tuple(saved.get("tasks", ()))
        """Simulator tasks the policy was trained on, as the checkpoint says."""
        if strategies is None:
            self.strategies = preset.strategies(saved.get("strategies") or [TopK(steps=1)])
        else:
            self.strategies = preset.effective(strategies, self.robot.length)
        self.prompt: str = saved.get("prompt") or "{instruction}"
        """The text around an instruction."""
        chunk = self.robot.chunk
        self.execute = saved.get("execute", chunk) if execute is None else execute
        if not 1 <= self.execute <= chunk:
            raise ValueError(f"execute is {self.execute}, expected 1 to {chunk}, the chunk")

    @property
    def metadata(self) -> dict[str, Any]:
        """Plain facts for clients: sizes, keys it reads, and the words an instruction may use."""
        tokenizer = self.model.tokenizer
        words = (tokenizer.words if tokenizer is not None else None) or {}
        return {
            "chunk": self.robot.chunk,
            "action_size": self.robot.action_size,
            "state_size": self.robot.state.size,
            "execute": self.execute,
            "keys": self._needs(),
            "tasks": list(self.tasks),
            "words": sorted(word for word in words if not word.startswith("<")),
        }

    def reset(self) -> None:
        """Starts a new episode. Nothing is kept between queries, so there is nothing to forget."""

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The next actions for one observation.

        Args:
            obs: "image" uint8 [Y X 3] RGB, "state" float [S] in robot units, "prompt" str; openpi's
                "observation/image" and "observation/state" mean the same.
        Returns:
            "actions" float32 [K A] in robot units; "timing" with "infer_ms" (wall time of the query
            in milliseconds) and "forwards" (of the backbone).
        Raises:
            ValueError: a key is missing or unknown, or a value is not as described.
        """
        return self.infer_batch([obs])[0]

    @torch.inference_mode()
    def infer_batch(self, observations: Items[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The next actions for several robots at once, each as `infer` gives it alone.

        Args:
            observations: at least one, see `infer`.
        Returns:
            One result per observation; the timing is that of the whole batch.
        Raises:
            ValueError: there are none, or one is not as `infer` describes.
        """
        if not observations:
            raise ValueError("infer_batch: no observations; give at least one")
        begin = time.perf_counter()
        model, robot = self.model, self.robot
        examples = [self._example(self._checked(obs)) for obs in observations]
        packed = model.processor.pack(examples)
        decoded = decode(
            model,
            model.embed(packed.prompts),
            robot.length,
            self.strategies,
            columns=slice(robot.ids.start, robot.ids.stop),
            canvas=packed.canvas,
        )
        actions = [robot.decode(ids) for ids in decoded.tokens[:, -robot.length :].cpu()]
        timing = {
            "infer_ms": 1e3 * (time.perf_counter() - begin),
            "forwards": decoded.nfe,
        }
        return [{"actions": chunk, "timing": dict(timing)} for chunk in actions]

    def _example(self, obs: Mapping[str, Any]) -> Example:
        """The media and the instruction of an observation, and a slot for the actions."""
        media = [Media(kind, obs[kind]) for kind in ("image", "state") if kind in obs]
        text = self.prompt.replace("{instruction}", obs["prompt"])
        return Example((user(*media, text), assistant(Slot("actions"))))

    def _needs(self) -> list[str]:
        """Keys an observation must hold."""
        return [k for k in ("image", "state") if k in self.model.encoders] + ["prompt"]

    def _checked(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The observation under our own names, every value looked at."""
        if not isinstance(obs, Mapping):
            raise TypeError(f"obs is a {type(obs).__name__}, expected a dict with {self._needs()}")
        unknown = sorted(str(key) for key in obs if key not in KNOWN)
        found: dict[str, Any] = {}
        for name, aliases in NAMES.items():
            given = [alias for alias in aliases if alias in obs]
            if len(given) > 1:
                raise ValueError(f"obs holds both {given[0]!r} and {given[1]!r}; keep one")
            if given:
                found[name] = obs[given[0]]
        missing = [name for name in self._needs() if name not in found]
        if missing or unknown:
            raise ValueError(
                f"obs has keys {sorted(map(str, obs))}: "
                + (f"{missing} missing" if missing else f"{unknown} unknown")
                + f"; expected {self._needs()} (or {KNOWN[1]!r}, {KNOWN[3]!r})"
            )
        if "image" in found:
            found["image"] = _image(found["image"])
        if "state" in found:
            found["state"] = self._state(found["state"])
        prompt = found["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"obs['prompt'] is {prompt!r}, expected an instruction in words")
        return found

    def _state(self, state: Any) -> np.ndarray:
        values = np.asarray(state)
        size = self.robot.state.size
        if values.dtype.kind not in "fiu" or values.ndim != 1 or size not in (None, len(values)):
            raise ValueError(
                f"obs['state'] is {values.dtype} {list(values.shape)}, expected {size} numbers in "
                "robot units, as in the data the policy was trained on"
            )
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        if bad:
            raise ValueError(
                f"obs['state'] holds NaN or infinity at {bad}: {values.tolist()}; check the sensors"
            )
        return values.astype(np.float32)


def _image(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(
            f"obs['image'] is {pixels.dtype} {list(pixels.shape)}, expected uint8 [Y X 3] RGB of "
            "one camera"
        )
    return pixels


def load_policy(source: str | Path, execute: int | None = None, **options: Any) -> Policy:
    """The policy of a checkpoint, ready for `infer`.

    Args:
        source: name of a bundled model ("tiny"), folder, or hub id.
        execute: actions of a chunk to play before asking again; None for the checkpoint's advice.
        **options: device, dtype, family and compile, see `mmdlm.checkpoint.load`.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it holds no statistics, so it is no policy.
    """
    from mmdlm.checkpoint import load

    model = load(source, **options)
    try:
        return Policy(model, execute)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
