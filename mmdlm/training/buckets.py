"""Length buckets: batches whose rows have about the same length, so that little is padding."""

from __future__ import annotations

import numpy as np
import torch

from mmdlm.data.dataset import Dataset
from mmdlm.messages import Example
from mmdlm.model import MultimodalDLM
from mmdlm.processor import Processor

BATCHES = 50
"""Most batches of a group that is sorted by length, and `SHARE` the largest part of all rows: with
larger groups a row meets the same rows again in the next pass. The numbers are those of
huggingface/transformers: trainer_pt_utils.py, get_length_grouped_indices."""
SHARE = 4
SAMPLED = 64
"""Rows whose texts are encoded, to know how many characters a token has."""
LEAST_SAVED = 0.05
"""Share of the computed tokens that buckets must save, to be used without being asked for."""


def lengths(dataset: Dataset, model: MultimodalDLM, tail: int | None = None) -> np.ndarray | None:
    """Approximate tokens of each row, int64 [rows], without opening more than one item per medium.

    Texts count by their characters, at the tokens per character of some rows. Every image or clip
    counts as many tokens as the first one of its kind.

    Args:
        dataset: connected.
        model: for the tokens of media, and the tokenizer.
        tail: see `mmdlm.training.data.Data`.
    Returns:
        None where the data set does not tell.
    """
    if dataset.extent(0) is None:
        return None
    rate = tokens_per_character(dataset, model.processor)
    per_medium: dict[str, int] = {}
    sizes = np.zeros(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        one = dataset.extent(index)
        if not one.media.keys() <= per_medium.keys():
            per_medium |= tokens_per_medium(dataset.sample(index, np.random.default_rng(0)), model)
        media = sum(per_medium[kind] * count for kind, count in one.media.items())
        own = one.canvas
        if tail is not None:
            own = min(own, len(one.answer) * rate + (tail + 1) / 2)
        sizes[index] = round(len(one.prompt) * rate + media + own)
    return sizes


def tokens_per_character(dataset: Dataset, processor: Processor) -> float:
    """Tokens per character of prompts and answers, from `SAMPLED` rows."""
    rows = np.linspace(0, len(dataset) - 1, SAMPLED).astype(int)
    found = [dataset.extent(int(i)) for i in rows]
    texts = [text for one in found for text in (one.prompt, one.answer) if text]
    if not texts:
        return 0.0
    return sum(len(processor.encode(text)) for text in texts) / sum(map(len, texts))


@torch.no_grad()
def tokens_per_medium(example: Example, model: MultimodalDLM) -> dict[str, int]:
    """Tokens of the last item of each kind in an example."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # so that nothing is drawn, and no running statistics change
    items = [item for row in model.processor.pack([example]).rows for item in row.items]
    counts = {item.kind: len(model.encode(item.kind, [item])[0]) for item in items}
    for module, mode in modes.items():
        module.training = mode
    return counts


def grouped(
    order: np.ndarray, lengths: np.ndarray, size: int, first: int, rng: np.random.Generator
) -> np.ndarray:
    """The rows of one pass in another order, in which a batch has rows of like length.

    Groups of up to `BATCHES` batches are sorted by length and cut into batches; then all batches
    are shuffled.
    Batches that two passes share keep the order as it was.

    Args:
        order: [rows] int, random.
        lengths: [rows] tokens of each row.
        size: rows per batch of all processes together.
        first: rows of this pass that complete the last batch of the pass before.
        rng: of the order of batches.
    """
    count = max(0, (len(order) - first) // size)
    begin, body = order[:first], order[first : first + count * size]
    group = max(1, min(BATCHES, count // SHARE)) * size
    batches = []
    for start in range(0, len(body), group):
        part = body[start : start + group]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    shuffled = [batches[i] for i in rng.permutation(len(batches))]
    return np.concatenate([begin, *shuffled, order[first + count * size :]]).astype(order.dtype)


def computed(order: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """Tokens of all whole batches of an order, padding included."""
    whole = lengths[order[: len(order) // size * size]].reshape(-1, size)
    return int(whole.max(1, initial=0).sum()) * size


def saved(lengths: np.ndarray, size: int) -> float:
    """Share of the tokens of a pass, padding included, that buckets save."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(lengths))
    without = computed(order, lengths, size)
    if without == 0:
        return 0.0
    return 1 - computed(grouped(order, lengths, size, 0, rng), lengths, size) / without
