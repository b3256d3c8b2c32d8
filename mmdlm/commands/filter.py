"""`mmdlm filter`: a filter for the strategy Learn2PD, trained on what a model writes."""

from __future__ import annotations

from pathlib import Path

from mmdlm.commands.shown import Run
from mmdlm.files import read_lines


def train(
    prompts: Path,
    out: Path,
    run: Run,
    length: int = 256,
    block: int = 32,
    accept: float = 0.9,
    seed: int = 0,
) -> int:
    """Trains a filter that says which predictions are final, for faster decoding.

    mmdlm filter prompts.txt --model my-llada --out filter.safetensors

    The model answers every prompt token by token, so this takes as long as the prompts; training
    itself takes minutes. Then decode with Blocks(size=32) and Learn2PD(filter=OUT).

    Args:
        prompts: file with a prompt per line; some hundred are enough.
        out: safetensors file to write.
        run: which model runs, and where.
        length: positions of an answer.
        block: positions of a block.
        accept: probability of being final at which the filter will be used.
        seed: of the split into training, stopping and scoring prompts, and of the first weights.
    """
    from mmdlm.training.learn2pd import train_filter

    lines = read_lines(prompts)
    model = run.load()
    asked = [model.prompt(line) for line in lines]
    batch_size = run.batch_size
    options = {"block": block, "accept": accept, "seed": seed, "batch_size": batch_size}
    scores = train_filter(model, asked, length, out, **options)
    print(
        f"{out}: written; on prompts kept apart {100 * scores.precision:.1f} % of what it accepts "
        f"is final, and it accepts {100 * scores.recall:.1f} % of what is"
    )
    return 0
