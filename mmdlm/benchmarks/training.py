"""`mmdlm bench train`: time of a training step, and what buckets and packing save of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmdlm.benchmarks import report
from mmdlm.benchmarks.speed import threads as torch_threads
from mmdlm.checkpoint import load
from mmdlm.data.collate import batch, collate
from mmdlm.data.dataset import Dataset, Extent
from mmdlm.data.form import Form
from mmdlm.data.formats import open_data
from mmdlm.messages import RAW, Example, Message, Slot, Text
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.masked import Masked
from mmdlm.training import tune
from mmdlm.training.buckets import BATCHES, lengths
from mmdlm.training.optimizer import AdamW
from mmdlm.training.vocabulary import grow

PARTS = ("data", "forward", "backward", "optimizer")
PROMPT, ANSWER, LONGEST = (60, 1.0), (150, 0.9), 1024
"""Median and sigma of log-normal numbers of tokens, and the most of a prompt and of an answer."""
LR = 1e-6
"""So low that the weights hardly change; the rate does not change the cost."""


class Drawn(Dataset):
    """Conversations of random tokens with log-normal lengths, as instruction data have.

    Numbers of tokens of prompt and answer are independent, with `PROMPT` and `ANSWER` as median and
    sigma of the logarithm. These are round numbers of the size that instruction data have; they
    are not fitted to a data set.

    Args:
        model: for the ids that may be drawn.
        rows: number of conversations.
        seed: of lengths and tokens.
    """

    def __init__(self, model: MultimodalDLM, rows: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        spec = model.spec
        self.ids = np.setdiff1d(
            np.arange(spec.transformer.vocab), [spec.mask_id, spec.eos_id, spec.pad_id]
        )
        self.eos_id = spec.eos_id
        drawn = (rng.lognormal(np.log(middle), sigma, rows) for middle, sigma in (PROMPT, ANSWER))
        self.sizes = np.stack([np.clip(each, 1, LONGEST) for each in drawn], 1).astype(int)

    def __len__(self) -> int:
        return len(self.sizes)

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """See `Dataset.sample`."""
        prompt, answer = (torch.from_numpy(rng.choice(self.ids, n)) for n in self.sizes[index])
        answer = torch.cat([answer, torch.tensor([self.eos_id])])
        slot = Slot("text", len(answer), answer)
        return Example((Message(RAW, (Text(prompt),)), Message("assistant", (slot,))))

    def extent(self, index: int) -> Extent:
        """See `Dataset.extent`; the tokens are counted as those of the canvas."""
        return Extent("", "", int(self.sizes[index].sum()) + 1, {})


@dataclass(frozen=True)
class Way:
    """How the same conversations are made into batches.

    Args:
        name: in the table.
        batches: [steps rows] indices of the conversations of each batch.
        pack: tokens of a packed row; None: one conversation per row.
    """

    name: str
    batches: np.ndarray
    pack: int | None = None


@dataclass(frozen=True)
class Pass:
    """Cost of the steps of one way in one round.

    Args:
        way: name.
        round: from 0.
        steps: number of steps.
        conversations: of all steps together.
        tokens: without padding.
        computed: tokens with padding.
        seconds: by part; of the processor on a CPU, else wall time.
        loss: mean over the steps.
    """

    way: str
    round: int
    steps: int
    conversations: int
    tokens: int
    computed: int
    seconds: dict[str, float]
    loss: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


def ways(sizes: np.ndarray, batch_size: int, steps: int, pack: int | None, seed: int) -> list[Way]:
    """The same conversations in random batches, in length buckets, and packed.

    They are those of every n-th batch of a sorted group of up to `BATCHES` batches, which is what
    training makes of a large data set.

    Args:
        sizes: tokens of each conversation.
        batch_size: conversations per batch.
        steps: number of batches.
        pack: tokens of a packed row; None: those of the longest conversation.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    whole = min(BATCHES, len(sizes) // batch_size)
    if whole < steps:
        raise ValueError(
            f"steps is {steps}, but {len(sizes)} rows make {len(sizes) // batch_size} batches of "
            f"{batch_size}, and a group has at most {BATCHES}; lower steps or batch-size"
        )
    group = rng.permutation(len(sizes))[: whole * batch_size]
    ordered = group[np.argsort(sizes[group], kind="stable")].reshape(whole, batch_size)
    alike = rng.permutation(ordered[np.linspace(0, whole - 1, steps).round().astype(int)])
    mixed = rng.permutation(alike.reshape(-1)).reshape(alike.shape)
    pack = int(sizes[mixed].max()) if pack is None else pack
    return [Way("plain", mixed), Way("buckets", alike), Way(f"packed {pack}", mixed, pack)]


def race(
    model: MultimodalDLM, dataset: Dataset, chosen: Items[Way], rounds: int, tail: int | None
) -> list[Pass]:
    """Trains on the same conversations in each way, alternating; a first step is not counted.

    Args:
        model: it is trained, with a rate that hardly changes it.
        dataset: conversations.
        chosen: the ways.
        rounds: number of rounds.
        tail: see `mmdlm.training.data.Data`.
    """
    model.train().requires_grad_()
    optimizer = AdamW(lr=LR).build(tune.groups(model, {}, LR, 0.0))
    found = []
    for number in range(-1, rounds):
        for way in chosen:
            given = way if number >= 0 else Way(way.name, way.batches[:1], way.pack)
            one = _pass(model, dataset, given, optimizer, max(number, 0), tail)
            found += [one] if number >= 0 else []
    return found


def _pass(
    model: MultimodalDLM,
    dataset: Dataset,
    way: Way,
    optimizer: torch.optim.Optimizer,
    number: int,
    tail: int | None,
) -> Pass:
    clock = _clock(model.device)
    seconds, losses, tokens, computed = dict.fromkeys(PARTS, 0.0), [], 0, 0
    for rows in way.batches:
        times = [clock()]
        samples = [dataset.sample(int(i), np.random.default_rng(int(i))) for i in rows]
        rng = np.random.default_rng(rows)
        samples = [Form(tail=tail).of(one, model.processor, rng) for one in samples]
        phase = torch.arange(len(rows)).double() / len(rows)
        collated = collate(model.processor, samples, torch.from_numpy(rows), phase, way.pack)
        times.append(clock())
        given = batch(model, collated)
        loss = Masked().step(model, given).mean()
        times.append(clock())
        loss.backward()
        times.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        for name, spent in zip(PARTS, np.diff(times), strict=True):
            seconds[name] += float(spent)
        losses.append(float(loss.detach()))
        tokens += int(given.sequence.mask.sum())
        computed += given.sequence.mask.numel()
    return Pass(
        *(way.name, number, len(way.batches), way.batches.size, tokens, computed, seconds),
        float(np.mean(losses)),
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor, or wall time after the work of a GPU."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def tables(passes: Items[Pass]) -> list[Table]:
    """The speed of each way over that of the first, and the parts of its time; medians."""
    speeds = Table("batches", title="training steps on the same conversations, alternating")
    for name in ("ms/step", "rows/s", "tokens/s", "not padding", "speed", "range"):
        speeds.add_column(name, justify="right")
    parts = Table("batches", title="where the time goes")
    for name in PARTS:
        parts.add_column(name, justify="right")
    by_way = {name: [p for p in passes if p.way == name] for name in {p.way: 0 for p in passes}}
    first = next(iter(by_way.values()))
    for name, own in by_way.items():
        total = median(p.total for p in own)
        one = own[0]
        ratios = [a.total / b.total for a, b in zip(first, own, strict=True)]
        shares = (median(p.seconds[part] / p.total for p in own) for part in PARTS)
        speeds.add_row(
            *(name, f"{1e3 * total / one.steps:.0f}", f"{one.conversations / total:.1f}"),
            *(f"{one.tokens / total:.0f}", f"{one.tokens / one.computed:.0%}"),
            *(f"{median(ratios):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}"),
        )
        parts.add_row(name, *(f"{share:.0%}" for share in shares))
    return [speeds, parts]


def bench_train(
    source: str = "tiny",
    data: Path | None = None,
    batch_size: int = 8,
    steps: int = 12,
    pack: int | None = None,
    tail: int | None = None,
    rounds: int = 3,
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
) -> int:
    """Time training steps on your data: random batches, length buckets and packed rows.

    mmdlm bench train --source tiny
    mmdlm bench train --source my-model --data my.jsonl --tail 8 --batch-size 16

    All three train on the same conversations, in alternating rounds: a full fine-tune with masked
    diffusion. The table shows the speed of each over random batches, the share of tokens that is
    not padding, and where the time goes. Without data, conversations of random tokens are drawn,
    with log-normal lengths: prompts of 60 and answers of 150 tokens at the median.

    The published way to train is the baseline of another comparison, with fixed shapes, in a clone
    of the repository: python -m tests.speed train --help.

    Args:
        source: bundled name, folder or hub id.
        data: your file or folder, see mmdlm data formats.
        batch_size: conversations per step.
        steps: steps per round.
        pack: tokens of a packed row; by default those of the longest conversation.
        tail: end tokens after an answer, 1 to this many; by default as many as fill its canvas. The
            answers of drawn conversations have one.
        rounds: rounds of the comparison.
        threads: of torch; with more than one, on an idle machine only.
        seed: of the choice of conversations.
        device: "cpu", "cuda" or "auto".
        out: JSON-lines file for the results, with versions, threads and processor.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if data is None and tail is not None:
        raise ValueError(f"tail={tail} has no effect without data; leave it out")
    model = load(source, device=device, dtype="float32", pack=False)
    if data is None:
        dataset: Dataset = Drawn(model, BATCHES * batch_size, seed)
    else:
        dataset = open_data(data)
        grow(model, dataset.vocabulary())
        dataset.connect(model.processor, model.preset)
    sizes = lengths(dataset, model, tail)
    chosen = ways(sizes, batch_size, steps, pack, seed)
    with torch_threads(threads):
        passes = race(model, dataset, chosen, rounds, tail)
        console = report.terminal()
        _print(console, passes, model.device)
        if out is not None:
            console.print(f"written to {report.write(out, passes)}", markup=False)
    return 0


def _print(console: Console, passes: Items[Pass], device: torch.device) -> None:
    for one in tables(passes):
        one.title_justify = "left"
        console.print(one)
    what = "processor seconds" if device.type == "cpu" else "wall time"
    console.print(f"Times are {what}.", style="dim")
    report.sign(console)
