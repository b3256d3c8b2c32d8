"""Robot policies: map an observation to a chunk of actions in robot units."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmdlm.decoding import preset
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.layout import Row
from mmdlm.messages import Example, Media, Slot, assistant, user
from mmdlm.model import require_model

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM
    from mmdlm.processor import Packed

# Prefix of observation keys in Physical-Intelligence/openpi
# (src/openpi/policies/libero_policy.py), which are accepted as aliases.
OPENPI = "observation/"
MASK, ZERO = "mask", "zero"


class Policy:
    """Policy that maps observations to chunks of actions, decoded in parallel.

    Args:
        model: model with action statistics, see `load_policy`.
        execute: actions of a chunk to execute before the next query; None: the checkpoint's
            default, else the whole chunk. `infer` always returns whole chunks.
        strategies: see `mmdlm.decoding.preset.strategies`; None: the checkpoint's default, else
            one forward per chunk.
    Raises:
        ValueError: the model has no statistics, `execute` is not in 1..chunk, or strategies are
            given for a model that predicts a whole chunk in one forward.
    """

    def __init__(
        self,
        model: MultimodalDLM,
        execute: int | None = None,
        strategies: preset.Choice = None,
    ) -> None:
        require_model(model, "Policy")
        if model.robot is None:
            raise ValueError(
                "this checkpoint has no statistics.json (action ids and normalization), which is "
                "needed to decode actions; use a policy checkpoint, such as 'tiny'"
            )
        defaults: Mapping[str, Any] = model.preset.get("act") or {}
        self.model, self.robot = model, model.robot
        self.tasks: tuple[str, ...] = tuple(defaults.get("tasks", ()))
        """Simulator tasks the policy was trained on, from the checkpoint."""
        if strategies is None:
            self.strategies = preset.strategies(defaults.get("strategies") or [TopK(steps=1)])
        else:
            self.strategies = preset.effective(strategies, self.robot.length)
        self.cameras: tuple[str, ...] = tuple(defaults.get("cameras") or ("image",))
        """Keys of the camera images, in the model's order; the first one is required."""
        self.placeholder: str = defaults.get("placeholder") or MASK
        """Model input at answer positions: "mask" (mask token) or "zero" (zero embeddings)."""
        if self.placeholder not in (MASK, ZERO):
            raise ValueError(f"placeholder is {self.placeholder!r}, expected {MASK!r} or {ZERO!r}")
        if self.placeholder == ZERO and strategies is not None:
            raise ValueError(
                "this policy was trained to predict a whole chunk in one forward, so strategies "
                "have no effect; remove them"
            )
        self.prompt: str = defaults.get("prompt") or "{instruction}"
        """Prompt with {instruction}."""
        chunk = self.robot.chunk
        self.execute = defaults.get("execute", chunk) if execute is None else execute
        if not 1 <= self.execute <= chunk:
            raise ValueError(
                f"execute is {self.execute}, expected 1 to {chunk} (actions per chunk)"
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata for clients: sizes, observation keys, and the vocabulary of instructions."""
        tokenizer = self.model.tokenizer
        words = (tokenizer.words if tokenizer is not None else None) or {}
        return {
            "chunk": self.robot.chunk,
            "action_size": self.robot.action_size,
            "state_size": self.robot.state.size,
            "execute": self.execute,
            "keys": self._needs(),
            "cameras": list(self.cameras),
            "tasks": list(self.tasks),
            "words": sorted(word for word in words if not word.startswith("<")),
        }

    def reset(self) -> None:
        """Start a new episode. Does nothing, because the policy has no state between queries."""

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Actions for one observation.

        Args:
            obs: "image" uint8 [Y X 3] RGB, "state" float [S] in robot units (a number where S is
                1), "prompt" str. Policies with several cameras (`cameras`) take the other images
                under their names, or a list of images under "image", in the order of training. A
                state is ignored if the policy does not use it. Keys with openpi's prefix
                "observation/" are accepted.
        Returns:
            "actions" float32 [K A] in robot units; "timing" with "infer_ms" (wall time of the query
            in milliseconds) and "forwards" (of the backbone).
        Raises:
            ValueError: a key is missing or unknown, or a value is not as described.
        """
        return self.infer_batch([obs])[0]

    @torch.inference_mode()
    def infer_batch(self, observations: Items[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Actions for a batch of observations, equal to those of `infer`.

        Args:
            observations: at least one observation, see `infer`.
        Returns:
            One result per observation; the timing is that of the whole batch.
        Raises:
            ValueError: there are none, or one is not valid, see `infer`.
        """
        if not observations:
            raise ValueError("infer_batch: got no observations, expected at least one")
        begin = time.perf_counter()
        model, robot = self.model, self.robot
        examples = [self._example(self._checked(obs)) for obs in observations]
        packed = model.processor.pack(examples)
        if self.placeholder == ZERO:
            answers, forwards = self._one_forward(packed), 1
        else:
            decoded = decode(
                model,
                model.embed(packed.prompts),
                robot.length,
                self.strategies,
                columns=None if robot.ids is None else _columns(robot.ids),
                canvas=packed.canvas,
            )
            answers, forwards = decoded.tokens[:, -robot.length :], decoded.nfe
        actions = [robot.decode(ids) for ids in answers.cpu()]
        timing = {"infer_ms": 1e3 * (time.perf_counter() - begin), "forwards": forwards}
        return [{"actions": chunk, "timing": dict(timing)} for chunk in actions]

    def _one_forward(self, packed: Packed) -> Tensor:
        """Most probable actions [B K*A + tail] int64, with zero embeddings at their positions.

        The tail is given. Source: DreamLM/Dream-VLX: vla/dreamvla/modeling_dreamvl.py
        (_regression_or_discrete_prediction).
        """
        model, robot = self.model, self.robot
        count, tail = robot.length - len(robot.tail), torch.tensor(robot.tail, dtype=torch.long)
        zeros = torch.zeros(count, model.spec.transformer.width).to(model.device, model.dtype)
        sequence = model.embed([Row((*row.parts, zeros, tail)) for row in packed.prompts])
        at = torch.zeros_like(sequence.mask)
        at[:, sequence.tokens.shape[1] - robot.length :][:, :count] = True
        scores = model.logits_at(sequence, at, _columns(robot.bins.ids))
        ids = robot.bins.ids.start + scores.argmax(-1).view(-1, count)
        return torch.cat([ids, tail.to(ids.device).expand(len(ids), -1)], 1)

    def _example(self, obs: Mapping[str, Any]) -> Example:
        """Example of an observation: media, instruction and a slot for the actions."""
        media = [Media("image", image) for image in obs.get("images", ())]
        media += [Media("state", obs["state"])] if "state" in obs else []
        text = self.prompt.replace("{instruction}", obs["prompt"])
        return Example((user(*media, text), assistant(Slot("actions"))))

    def _needs(self) -> list[str]:
        """Required keys of an observation."""
        encoders = self.model.encoders
        image = self.cameras[:1] if "image" in encoders else ()
        return [*image, *(["state"] if "state" in encoders else []), "prompt"]

    def _checked(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Validated observation with the keys "images", "state" and "prompt"."""
        if not isinstance(obs, Mapping):
            raise TypeError(f"obs is a {type(obs).__name__}, expected a dict with {self._needs()}")
        names = {name: (name, OPENPI + name) for name in (*self.cameras, "state")}
        names["prompt"] = ("prompt",)
        unknown = sorted(str(key) for key in obs if not any(key in each for each in names.values()))
        observation: dict[str, Any] = {}
        for name, aliases in names.items():
            given = [alias for alias in aliases if alias in obs]
            if len(given) > 1:
                raise ValueError(
                    f"obs has both {given[0]!r} and {given[1]!r}, expected only one of them"
                )
            if given:
                observation[name] = obs[given[0]]
        missing = [name for name in self._needs() if name not in observation]
        if missing or unknown:
            openpi = ", ".join(OPENPI + name for name in names if name != "prompt")
            raise ValueError(
                f"obs has keys {sorted(map(str, obs))}: "
                + (f"{missing} missing" if missing else f"{unknown} unknown")
                + f"; expected {self._needs()} (or {openpi})"
            )
        prompt = observation["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"obs['prompt'] is {prompt!r}, expected an instruction as text")
        checked: dict[str, Any] = {"prompt": prompt}
        if "image" in self.model.encoders:
            checked["images"] = self._images(observation)
        if "state" in self.model.encoders:
            checked["state"] = self._state(observation["state"])
        return checked

    def _images(self, observation: Mapping[str, Any]) -> list[np.ndarray]:
        """Images of an observation in camera order."""
        images: list[np.ndarray] = []
        for name in self.cameras:
            given = observation.get(name, ())
            several = given if isinstance(given, list | tuple) else (given,)
            images += [_image(name, image) for image in several]
        if not images:
            raise ValueError(
                f"obs[{self.cameras[0]!r}] is an empty list, expected at least one image"
            )
        if len(images) > 1 == len(self.cameras):
            raise ValueError(f"obs has {len(images)} images, but this policy has one camera")
        return images

    def _state(self, state: Any) -> np.ndarray:
        values = np.atleast_1d(np.asarray(state))
        size = self.robot.state.size
        if values.dtype.kind not in "fiu" or values.ndim != 1 or size not in (None, len(values)):
            raise ValueError(
                f"obs['state'] is {values.dtype} {list(values.shape)}, expected {size} numbers in "
                "robot units, as in the data the policy was trained on"
            )
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        if bad:
            raise ValueError(
                f"obs['state'] has NaN or infinity at {bad}: {values.tolist()}; check the sensors"
            )
        return values.astype(np.float32)


def _columns(ids: range) -> slice:
    return slice(ids.start, ids.stop)


def _image(name: str, image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(
            f"obs[{name!r}] is {pixels.dtype} {list(pixels.shape)}, expected uint8 [Y X 3] RGB of "
            "one camera"
        )
    return pixels


def load_policy(source: str | Path, execute: int | None = None, **options: Any) -> Policy:
    """Load the policy of a checkpoint.

    Args:
        source: name of a bundled model ("tiny"), folder, or hub id.
        execute: actions of a chunk to execute before the next query, see `Policy`.
        **options: device, dtype, family, compile and adapter, see `mmdlm.checkpoint.load`.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint has no statistics.
    """
    from mmdlm.checkpoint import load

    model = load(source, **options)
    try:
        return Policy(model, execute)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
