"""Memory of a training step, estimated before it runs.

A step runs on fake tensors (`torch._subclasses.fake_tensor`), which have shapes and no values. The
bytes of every storage that is alive are added up, so the peak includes what autograd keeps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from encoders.features import Prepared
from mmdlm.objectives.cross_entropy import weighted_score
from mmdlm.training import tune as tuning

if TYPE_CHECKING:
    from mmdlm.layout import Sequence
    from mmdlm.model import MultimodalDLM
    from mmdlm.training.optimizer import AdamW

CHUNK = 512  # positions scored at a time, where the objective does not say
RANK = 16  # of the LoRA that is compared


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device.

    Args:
        trained: number of trained parameters.
        weights: of all parameters and buffers.
        gradients: of the trained parameters.
        optimizer: its state.
        activations: the rest of the peak: what autograd keeps, and temporary results.
        peak: the most that is alive at a time.
    """

    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Shape:
    """What a batch of one data set needs of memory.

    Args:
        rows: B.
        length: L, padding included.
        scored: positions whose logits are computed.
        is_masked: the attention has a mask [B L L].
        items: preprocessed media.
        embedded: positions that hold media.
    """

    rows: int
    length: int
    scored: int
    is_masked: bool
    items: tuple[Prepared, ...] = ()
    embedded: int = 0

    @classmethod
    def of(cls, sequence: Sequence, items: Items[Prepared]) -> Shape:
        """The shape of a batch of which every answer token is masked."""
        rows, length = sequence.tokens.shape
        scored = int(sequence.is_answer.sum())
        media = int(sequence.is_medium.sum())
        is_masked = sequence.visible() is not None
        return cls(rows, length, scored, is_masked, tuple(items), media)


def estimate(
    model: MultimodalDLM,
    shapes: Items[Shape],
    optimizer: AdamW,
    tune: dict[str, Any] | None = None,
    precision: str = "32-true",
    chunk: int = CHUNK,
) -> dict[str, Memory]:
    """Memory of a step that trains every weight, by LoRA, and by LoRA on 8-bit weights.

    LoRA is that of the rules if they ask for it, else one of rank `RANK` on the backbone's blocks.
    Where the rules freeze parts without LoRA, "as configured" comes first.

    Args:
        model: as it is trained; it is not changed.
        shapes: of the batch of each data set.
        optimizer: its settings.
        tune: see `mmdlm.training.tune`.
        precision: of Lightning's trainer.
        chunk: positions scored at a time.
    """
    dtype = torch.bfloat16 if precision == "bf16-true" else None
    mixed = torch.bfloat16 if precision == "bf16-mixed" else None
    tune = tune or {}
    loras = [lora for rule in tune.values() if (lora := tuning.lora_of(rule))]

    def run(change: Callable[[nn.Module], None], rules: dict[str, Any], bits: int = 32) -> Memory:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copied = faked(model, mode, dtype)
        saved = saved_by_8_bits(copied) if bits == 8 else 0
        with mode:
            change(copied)
            groups = tuning.groups(copied, rules, optimizer.lr, optimizer.weight_decay)
            found = _measured(copied, optimizer.build(groups), shapes, mixed, chunk)
        return replace(found, weights=found.weights - saved, peak=found.peak - saved)

    low_rank = (lambda copied: None) if loras else add_low_rank
    rules = tune if loras else {}
    rank = max((lora.rank for lora in loras), default=RANK)
    found = {
        "full": run(train_all, {}),
        f"LoRA, rank {rank}": run(low_rank, rules),
        "LoRA on 8 bits": run(low_rank, rules, 8),
    }
    if tune and not loras:
        found = {"as configured": run(lambda copied: None, tune)} | found
    return found


def faked(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model whose parameters and buffers are fake tensors.

    Args:
        model: it is not changed.
        mode: makes the fake tensors.
        dtype: of the floating tensors; None: their own.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with mode:
            fake: Tensor = torch.empty(tensor.shape, dtype=kind)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def train_all(model: nn.Module) -> None:
    """Removes low-rank adapters of peft, and trains all parameters; in place."""
    for name, module in list(model.named_modules()):
        inner = getattr(module, "token_adapter", module)
        inner = getattr(inner, "base_layer", inner)
        if inner is not module and not name.endswith(".token_adapter"):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, inner)
    model.requires_grad_(True).train()


def linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the backbone's blocks, without those of low-rank adapters."""
    named = model.backbone.blocks.named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and ".lora_" not in name]


def add_low_rank(model: nn.Module) -> None:
    """Freezes a model and adds A [r in] and B [out r] to the linear layers of its blocks.

    Args:
        model: changed in place.
    """
    model.requires_grad_(False)
    for layer in linears(model):
        out, width = layer.weight.shape
        kind = {"bias": False, "dtype": layer.weight.dtype}
        layer.low = nn.Sequential(nn.Linear(width, RANK, **kind), nn.Linear(RANK, out, **kind))
        layer.register_forward_hook(lambda layer, given, result: result + layer.low(given[0]))


def saved_by_8_bits(model: nn.Module) -> int:
    """Bytes that 8-bit weights of the backbone's blocks save in a step."""
    weights = [layer.weight for layer in linears(model)]
    # A byte each and a scale per row. A layer's weights are dequantized while it computes.
    saved = sum(each.nbytes - each.numel() - 4 * len(each) for each in weights)
    return saved - max((each.nbytes for each in weights), default=0)


class Alive(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive within it.

    Attributes:
        now: bytes alive.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.finalize(storage, self._freed, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts what it returns."""
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def _measured(
    model: MultimodalDLM,
    optimizer: torch.optim.Optimizer,
    shapes: Items[Shape],
    mixed: torch.dtype | None,
    chunk: int,
) -> Memory:
    """Memory of two steps on fake tensors; the second has gradients and states of the first."""
    alive = Alive()
    for tensor in (*model.parameters(), *model.buffers()):
        alive.add(tensor)
    weights = alive.now
    trained = [p for p in model.parameters() if p.requires_grad]
    with alive:
        for _ in range(2):
            around = torch.autocast("cpu", mixed) if mixed else nullcontext()
            with around:
                loss = sum(_loss(model, shape, chunk) for shape in shapes)
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    count = sum(p.numel() for p in trained)
    rest = alive.peak - weights - gradients - state
    return Memory(count, weights, gradients, state, max(0, rest), alive.peak)


def _loss(model: MultimodalDLM, shape: Shape, chunk: int) -> Tensor:
    """The loss of a batch of this shape, with the operations of a real one."""
    size = (shape.rows, shape.length)
    x = model.backbone.tokens(torch.zeros(size, dtype=torch.long))
    if shape.items:
        media = torch.cat([_embedded(model, kind, shape) for kind in _kinds(shape)])
        media = media[torch.zeros(shape.embedded, dtype=torch.long)]  # items may be repeated
        at = torch.zeros((*size, 1), dtype=torch.bool)
        x = x.masked_scatter(at, media.to(x.dtype))
    mask = torch.ones((*size, shape.length), dtype=torch.bool) if shape.is_masked else None
    positions = torch.zeros(size, dtype=torch.long)
    hidden = model.backbone(x, positions, mask=mask).flatten(0, 1)
    target = torch.zeros(shape.scored, dtype=torch.long)
    # Fake weights are of another type than those for which the gradient is computed at once.
    head = model.backbone.embed if model.backbone.out is None else model.backbone.out
    is_plain = not hasattr(head, "token_adapter")
    return weighted_score(model, hidden[target], target, 1.0, chunk, fused=is_plain)[0]


def _kinds(shape: Shape) -> list[str]:
    return list(dict.fromkeys(item.kind for item in shape.items))


def _embedded(model: MultimodalDLM, kind: str, shape: Shape) -> Tensor:
    """Embeddings [N D] of the items of one kind; their padding is not cut off."""
    items = [
        replace(item, tensor=torch.zeros(item.tensor.shape))
        for item in shape.items
        if item.kind == kind
    ]
    encoder = model.encoders[kind]
    with torch.set_grad_enabled(any(weight.requires_grad for weight in encoder.parameters())):
        features = encoder(items)
    return model.adapters[kind](features).tokens.flatten(0, 1)
