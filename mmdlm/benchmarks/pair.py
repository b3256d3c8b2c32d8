"""Two small models that differ in how they became masked-diffusion models, trained on scenes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmdlm.checkpoint import load, save
from mmdlm.data.collate import batch, collate
from mmdlm.data.scenes import Scenes
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.next_token import NextToken
from mmdlm.objectives.objective import Objective
from mmdlm.training import tune
from mmdlm.training.optimizer import AdamW, Schedule

SCRATCH, DERIVED, CAUSAL = "from-scratch", "AR-derived", "autoregressive"
"""Names of the two models, and of the stage before the second one."""
START = "tiny"
"""Its image encoder, adapter, word embeddings and head are the first stage of both models."""
CAUSAL_SHARE = 2 / 3
"""Share of the steps of the second model that predict the next token."""
TUNE = {"encoders.*": tune.FROZEN}
OPTIMIZER = AdamW(lr=1e-3)
MASKED = Masked(weight="one", normaliser="masked", full=0.5)
"""As in `configs/train/tiny.yaml`."""
QUESTIONS = 1
Note = Callable[[str], None]


def pair(
    out: Path, steps: int, scenes: int = 12, seed: int = 0, note: Note = print
) -> dict[str, MultimodalDLM]:
    """The two models, trained unless their folders exist.

    Both start from the image encoder (frozen), adapter, word embeddings and head of the bundled
    model, with the same new blocks, and take the same number of steps on the same scenes. One
    learns masked diffusion with full attention from the start. The other learns to predict the next
    token with causal attention, and then masked diffusion with full attention, where position i
    still predicts token i + 1, as Dream does.

    Args:
        out: folder of the checkpoints; those of other steps, scenes or seeds stay beside them.
        steps: of each model.
        scenes: per step, each with a caption and a question.
        seed: of the new blocks, the scenes and the noise.
        note: called with a line about the progress.
    """
    run = out / f"{steps}x{scenes}-seed{seed}"

    def stage(
        name: str, start: MultimodalDLM | None, objective: Objective, done: range
    ) -> MultimodalDLM:
        folder = run / name
        if not (folder / "config.json").is_file():
            train(start, objective, done, scenes, seed, lambda line: note(f"{name}: {line}"))
            save(start, folder)
        return load(folder, device="cpu", dtype="float32")

    first = round(steps * CAUSAL_SHARE)
    causal = stage(CAUSAL, untrained("block_causal", 1, True, seed), NextToken(), range(first))
    adapted = untrained("full", None, True, seed)
    adapted.load_state_dict(causal.state_dict())
    return {
        SCRATCH: stage(SCRATCH, untrained("full", None, False, seed), MASKED, range(steps)),
        DERIVED: stage(DERIVED, adapted, MASKED, range(first, steps)),
    }


def untrained(attention: str, block_size: int | None, shift: bool, seed: int = 0) -> MultimodalDLM:
    """The bundled model with new blocks, which therefore has lost all its skills.

    Args:
        attention: see `mmdlm.layout.Attention`.
        block_size: see `Spec`.
        shift: see `Spec`.
        seed: of the blocks.
    """
    layout = {"attention": attention, "block_size": block_size, "shift": shift}
    model = load(START, device="cpu", dtype="float32", pack=False, **layout)
    kept = {n: x for n, x in model.backbone.state_dict().items() if not n.startswith("blocks.")}
    kept = {name: value.clone() for name, value in kept.items()}
    model.backbone.reset(torch.Generator().manual_seed(seed))
    model.backbone.load_state_dict(kept, strict=False)
    return model


def train(
    model: MultimodalDLM, objective: Objective, done: range, scenes: int, seed: int, note: Note
) -> None:
    """Trains all but the encoders; the learning rate rises and falls within these steps.

    Args:
        model: changed in place.
        objective: what is minimised.
        done: numbers of the steps, which decide the scenes and the noise.
        scenes: per step.
        seed: of scenes and noise.
        note: called with a line about the progress.
    """
    data, begin = Scenes(seed=seed, questions=QUESTIONS), time.process_time()
    model.train().requires_grad_()
    tune.freeze(model, TUNE)
    tune.set_frozen_to_eval(model)
    optimizer = OPTIMIZER.build(tune.groups(model, TUNE, OPTIMIZER.lr, OPTIMIZER.weight_decay))
    schedule = Schedule(warmup=len(done) // 10, decay=0.4)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for number, step in enumerate(done):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * schedule.factor(number, number / len(done))
        examples, rng = rows(data, step, scenes, seed)
        phase = torch.from_numpy((np.arange(len(examples)) / len(examples) + rng.random()) % 1)
        seeds = torch.from_numpy(rng.integers(2**31, size=len(examples)))
        losses = objective.step(
            model, batch(model, collate(model.processor, examples, seeds, phase))
        )
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % 20 == 0 or number == len(done) - 1:
            total, count = losses.logs["ce"]
            spent = time.process_time() - begin
            note(f"step {number} of {len(done)}, ce {float(total / count):.3f}, {spent:.0f} s")


def rows(
    data: Scenes, step: int, scenes: int, seed: int
) -> tuple[list[Example], np.random.Generator]:
    """The conversations of a step, one turn each, and the generator of what else is random."""
    rng = np.random.default_rng((seed, step))
    samples = [data.sample(step * scenes + i, rng) for i in range(scenes)]
    return [replace(one, branches=(turn,)) for one in samples for turn in one.branches], rng
