"""Trains the filter of `Learn2PD` on decoded answers of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmdlm.decoding import aux_network
from mmdlm.decoding.commits.learn2pd import KIND, Filter, blocks, gathered, places
from mmdlm.decoding.decode import decode
from mmdlm.decoding.numerics import log_odds, odds_of, rank
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View
from mmdlm.layout import Row

if TYPE_CHECKING:
    from mmdlm.model import MultimodalDLM

EVERY = 25  # epochs between two evaluations on the held-out prompts


@dataclass(frozen=True)
class Scores:
    """Precision and recall of a filter at masked positions of held-out prompts.

    Args:
        precision: fraction of the accepted predictions that are final; NaN if none is accepted.
        recall: fraction of the final predictions that are accepted; NaN if none is final.
        decided: number of predictions.
        epochs: epochs after which the weights were kept.
    """

    precision: float
    recall: float
    decided: int
    epochs: int


@dataclass(frozen=True)
class Samples:
    """Training samples: one block at one decoding step each.

    Args:
        confidences: [N size] float32 probability of each prediction.
        final: [N size] bool, the prediction equals the token of the final answer.
        masked: [N size] bool, the position was still masked.
        real: [N size] bool, the position exists; False in a shorter last block.
        prompt: [N] int64, index of the sample's prompt.
    """

    confidences: Tensor
    final: Tensor
    masked: Tensor
    real: Tensor
    prompt: Tensor

    def of(self, prompts: Tensor) -> Samples:
        """The samples of some prompts, int64 [n]."""
        chosen = torch.isin(self.prompt, prompts)
        return Samples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Recorder(Strategy):
    """Records the filter's inputs at every step, and which predictions are final.

    Args:
        final: [B G] int64 final answer of each row of the caller's batch.
        size: positions per block.
        oracle: commit every final prediction of a step, as a perfect filter would; a row whose
            open predictions are all wrong commits the final tokens of its whole block. If False,
            only the most confident prediction commits.
        seen: filled with one entry per step; `prompt` is the index within the batch.
    """

    sees: ClassVar = "block"
    may_idle: ClassVar = True

    final: Tensor
    size: int
    oracle: bool
    seen: list[Samples] = field(default_factory=list)

    def pick(self, view: View, logits: Tensor) -> Tensor:
        """[B R] the most probable token, or the final one in rows where no prediction is final."""
        best = logits.argmax(-1)
        final = self.final[view.keys].gather(1, view.at - view.prompt)
        self._record(view, log_odds(logits, best).sigmoid(), best == final)
        stuck = ~((best == final) & view.open).any(1, keepdim=True)
        return torch.where(stuck & view.open, final, best) if self.oracle else best

    def select(self, view: View) -> Tensor:
        """[B R] bool."""
        if not self.oracle:
            return rank(view.confidence) < 1
        return view.candidates == self.final[view.keys].gather(1, view.at - view.prompt)

    def _record(self, view: View, probability: Tensor, final: Tensor) -> None:
        place, count = places(view), blocks(view, self.size)
        flags = (final, view.open, torch.ones_like(final))
        table = [
            gathered(probability, place, count, self.size),
            *(gathered(flag, place, count, self.size, False) for flag in flags),
            torch.tensor(view.keys, device=place.device)[:, None].expand(-1, count),
        ]
        # Blocks without open positions are complete and give no sample.
        is_open = table[2].any(-1)
        self.seen.append(Samples(*(part[is_open].cpu() for part in table)))


def train_filter(
    model: MultimodalDLM,
    prompts: Items[Tensor | Row],
    length: int,
    out: str | Path,
    *,
    block: int = 32,
    hidden: int | None = None,
    accept: float = 0.9,
    trajectory: Literal["oracle", "plain"] = "oracle",
    batch_size: int = 8,
    epochs: int = 40_000,
    patience: int = 2_000,
    rate: float = 3e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> Scores:
    """Trains a filter for `Learn2PD`, writes it as safetensors, and returns its test scores.

    The model first decodes each answer with one token per step in blocks. Then it decodes again,
    and every block of every step is a sample: its probabilities, and which of its predictions equal
    the answer. A tenth of the prompts is used for early stopping, another tenth for the scores.
    The kept weights have the best precision at `accept`, computed with one additional wrong
    prediction, so that a filter that accepts almost nothing does not win.

    Source: ims-kdks/Learning-to-Parallel-Decoding: llada/generate_training_data.py, train.ipynb
    (BCE with logits over all positions of a block, AdamW at 3e-3, 40,000 epochs of the whole set);
    it has no held-out prompts and no early stopping.

    Args:
        model: the model the filter is for.
        prompts: token ids [n] each, or rows as `model.arrange` takes them; at least three.
        length: positions of an answer.
        out: file to write.
        block: positions per block; later decodes must use `Blocks` of the same size.
        hidden: width between the filter's layers; None for `block`.
        accept: probability of being final above which the filter will accept.
        trajectory: what the second decode commits in a step: "oracle", every final prediction, as
            the source does; or "plain", one token.
        batch_size: prompts decoded together.
        epochs: maximum number of epochs.
        patience: epochs without a better precision after which training ends.
        rate: learning rate.
        seed: of the split and of the initial weights.
        progress: show progress bars; None: only in a terminal.
    Raises:
        ValueError: there are fewer than three prompts, or the trajectory is unknown.
    """
    if len(prompts) < 3:
        raise ValueError(
            f"{len(prompts)} prompts, expected at least 3: to train, to stop, to score"
        )
    if trajectory not in ("oracle", "plain"):
        raise ValueError(f"trajectory is {trajectory!r}, expected 'oracle' or 'plain'")
    hide = None if progress is None else not progress
    oracle = trajectory == "oracle"
    samples = record(model, prompts, length, block, oracle, batch_size, hide)
    generator = torch.Generator().manual_seed(seed)
    order, part = torch.randperm(len(prompts), generator=generator), max(1, len(prompts) // 10)
    train, stop, test = (samples.of(chosen) for chosen in order.tensor_split([-2 * part, -part]))
    network = fresh(block, hidden, generator)
    when = fit(network, train, stop, accept, epochs, patience, rate, hide)
    scores = _scored(network, test, accept, when)
    sizes = {"size": network.size, "hidden": network.hidden}
    notes = {"accept": accept, "length": length, "prompts": len(prompts), **asdict(scores)}
    aux_network.save(out, KIND, network, sizes, **notes)
    return scores


def _scored(network: Filter, test: Samples, accept: float, epochs: int) -> Scores:
    """Scores on samples that were not used in training."""
    right, accepted, final = counted(network, test, accept)
    return Scores(
        precision=right / accepted if accepted else math.nan,
        recall=right / final if final else math.nan,
        decided=int(test.masked.sum()),
        epochs=epochs,
    )


def filter_loss(logits: Tensor, final: Tensor, real: Tensor) -> Tensor:
    """Mean binary cross entropy of a filter, over all positions of all blocks.

    Source: ims-kdks/Learning-to-Parallel-Decoding: train.ipynb.

    Args:
        logits: [N size] of the filter.
        final: [N size] float, 1 where the prediction is final.
        real: [N size] float, 0 where the position does not exist; it adds no loss.
    """
    return F.binary_cross_entropy_with_logits(logits, final, weight=real)


def fit(
    network: Filter,
    train: Samples,
    stop: Samples,
    accept: float,
    epochs: int,
    patience: int,
    rate: float,
    hide: bool | None,
) -> int:
    """Trains the network, restores its best weights on `stop`, and returns their epoch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    best, kept, when = -math.inf, copy.deepcopy(network.state_dict()), 0
    bar = tqdm(range(1, epochs + 1), desc="filter", unit="epoch", disable=hide)
    for epoch in bar:
        optimizer.zero_grad()
        loss = filter_loss(network(train.confidences), train.final.float(), train.real.float())
        loss.backward()
        optimizer.step()
        if epoch % EVERY and epoch < epochs:
            continue
        right, accepted, _ = counted(network, stop, accept)
        bar.set_postfix(loss=f"{loss.item():.4f}", precision=f"{right / max(1, accepted):.4f}")
        if right / (accepted + 1) > best:
            best, kept, when = right / (accepted + 1), copy.deepcopy(network.state_dict()), epoch
        elif epoch - when >= patience:
            break
    bar.close()
    network.load_state_dict(kept)
    return when


def record(
    model: MultimodalDLM,
    prompts: Items[Tensor | Row],
    length: int,
    block: int,
    oracle: bool,
    batch_size: int = 8,
    hide: bool | None = None,
) -> Samples:
    """The filter's samples while the model decodes the prompts; see `train_filter`."""
    rows = [Row((prompt,)) if isinstance(prompt, Tensor) else prompt for prompt in prompts]
    found: list[Samples] = []
    bar = tqdm(total=len(rows), desc="decode", unit="prompt", disable=hide)
    with bar:
        for first in range(0, len(rows), batch_size):
            batch = model.arrange(rows[first : first + batch_size])
            answers = decode(model, batch, length, [Blocks(block)]).tokens[:, -length:]
            recorder = Recorder(answers, block, oracle)
            decode(model, batch, length, [Blocks(block), recorder])
            for step in recorder.seen:
                parts = [getattr(step, name) for name in Samples.__dataclass_fields__]
                found.append(Samples(*parts[:-1], parts[-1] + first))
            bar.update(len(answers))
    fields = ([getattr(step, name) for step in found] for name in Samples.__dataclass_fields__)
    # Tensors made in inference mode cannot be trained on; copies can.
    return Samples(*(torch.cat(parts).clone() for parts in fields))


@torch.no_grad()
def counted(network: Filter, samples: Samples, accept: float) -> tuple[int, int, int]:
    """Number of masked positions that are accepted and final, accepted, and final."""
    accepted = samples.masked & (network(samples.confidences) > odds_of(accept))
    final = samples.masked & samples.final
    return int((accepted & final).sum()), int(accepted.sum()), int(final.sum())


def fresh(size: int, hidden: int | None, generator: torch.Generator) -> Filter:
    """A filter with initial weights, distributed as in torch but drawn from `generator`."""
    with torch.device("meta"):
        network = Filter(size, hidden)
    network.to_empty(device="cpu")
    for layer in (network.inner, network.outer):
        bound = layer.in_features**-0.5
        for weight in (layer.weight, layer.bias):
            torch.nn.init.uniform_(weight, -bound, bound, generator=generator)
    return network
