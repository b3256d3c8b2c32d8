"""Multimodal masked-diffusion language model: encoders, adapters and a backbone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Items
from contextlib import nullcontext
from dataclasses import replace
from operator import is_not
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.pruner import Pruned, Pruner, seen
from encoders.attention import recorded
from encoders.encoder import Encoder
from encoders.features import Prepared
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.backbones.kv import KV, Rows, count, indices, take
from mmdlm.backbones.transformer import Transformer
from mmdlm.chat import Template
from mmdlm.layout import Attention, Row, Sequence, Sparse, arrange, from_tokens, visible
from mmdlm.messages import check_ids
from mmdlm.processor import Processor
from mmdlm.text import Tokenizer

STEP = 512
"""Most positions of a compiled step: with more, launching kernels is short beside computing."""

if TYPE_CHECKING:
    from adapters.image_codes import ImageCodes
    from adapters.robot import Robot


class MultimodalDLM(nn.Module):
    """Masked-diffusion language model with optional image, audio and robot-state inputs.

    Several threads may use one model at the same time: tasks, `decode` and sessions keep their
    state to themselves. A `Session` belongs to one thread at a time. Weights must not change
    meanwhile.

    Args:
        spec: sizes, special ids and conventions of the backbone.
        encoders: encoder of each modality ("image", "audio", "state").
        adapters: adapter of each modality, from encoder width to backbone width.
        tokenizer: None for checkpoints without one; only methods on token ids work then.
        robot: action tokens and normalization statistics of a policy.
        template: prompt template; None for the chat template of the family.
        drawing: codes of the images that the model draws; the encoder "image" turns them into
            pixels.
    """

    def __init__(
        self,
        spec: Spec,
        encoders: dict[str, Encoder] | None = None,
        adapters: dict[str, Adapter] | None = None,
        tokenizer: Tokenizer | None = None,
        robot: Robot | None = None,
        template: Template | None = None,
        drawing: ImageCodes | None = None,
    ) -> None:
        super().__init__()
        encoders, adapters = encoders or {}, adapters or {}
        if set(encoders) != set(adapters):
            raise ValueError(
                f"encoders are {sorted(encoders)} and adapters {sorted(adapters)}, "
                "but every encoder needs an adapter with the same name"
            )
        self.spec = spec
        self.backbone = backbone(spec.transformer)
        self.encoders = nn.ModuleDict(encoders)
        self.adapters = nn.ModuleDict(adapters)
        self.tokenizer = tokenizer
        self.robot = robot
        self.template = template
        self.drawing = drawing
        self.preset: dict[str, dict[str, Any]] = {}
        """Default prompt, canvas length and strategies per task, from decoding.yaml."""
        self.system: str | None = None
        """Name of the published multimodal system it was loaded from."""
        self.published: dict[str, dict[str, Any]] = {}
        """JSON files of the published checkpoint it comes from, by name: config.json, and those
        beside it that other programs read. They complete what is written for these."""
        self.on_damage: Literal["error", "warn"] = "error"
        """Whether damaged media files are rejected, or their readable part is used."""
        self.pruner: Pruner | None = None
        """Reduces the tokens of each image before the backbone gets them."""
        self.strategies: tuple[Any, ...] = ()
        """Decoding strategies of every task, besides its own; see `mmdlm.decoding.pruning`."""
        self._processor: tuple[tuple[Any, ...], Processor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.backbone.embed.weight.dtype

    @property
    def processor(self) -> Processor:
        """Converter of messages to token ids and preprocessed media; holds no weights."""
        codecs = {"actions": self.robot, "image": self.drawing}
        settings = self.spec, self.tokenizer, *codecs.values(), self.template, self.on_damage
        parts = (*settings, *self.encoders.values())
        if self._processor is None or any(map(is_not, parts, self._processor[0])):
            inputs = {kind: encoder.preprocess for kind, encoder in self.encoders.items()}
            outputs = {name: codec for name, codec in codecs.items() if codec is not None}
            made = Processor(
                self.spec, self.tokenizer, inputs, outputs, self.template, self.on_damage
            )
            self._processor = (parts, made)
        return self._processor[1]

    def encode(self, kind: str, items: Items[Prepared]) -> list[Tensor | Sparse]:
        """Backbone embeddings [N D] (all or some) or token ids int64 [N] of items of one modality.

        An encoder whose parameters are all frozen runs without a gradient graph.
        """
        ready = [replace(item, tensor=item.tensor.to(self.device)) for item in items]
        encoder, adapter = self.encoders[kind], self.adapters[kind]
        trained = any(weight.requires_grad for weight in encoder.parameters())
        pruner = self.pruner if kind == "image" else None
        ranked, in_tower = pruner and pruner.needs_attention, pruner and pruner.in_tower
        with (
            torch.set_grad_enabled(trained and torch.is_grad_enabled()),
            recorded(encoder) if ranked else nullcontext() as attended,
        ):
            features, places = encoder.merged(ready, pruner) if in_tower else (encoder(ready), None)
        embedded = adapter.embed(features, ready)
        if pruner is None:
            return [item.tokens for item in embedded]
        if in_tower:
            span = math.prod(encoder.grid)
            pairs = zip(embedded, places, strict=True)
            return [self._placed(Pruned(item.tokens, at), span) for item, at in pairs]
        none = [None] * len(ready)
        carried = adapter.carry(attended.features(features), ready) if ranked else none
        pairs = zip(embedded, carried, strict=True)
        return [self._placed(pruner(seen(*pair)), len(pair[0].tokens)) for pair in pairs]

    def _placed(self, found: Pruned, span: int) -> Tensor | Sparse:
        """What a pruner leaves of an item of `span` tokens, in its places or renumbered."""
        if self.pruner.renumber or len(found.tokens) == span:
            return found.tokens
        return Sparse(found.tokens, found.places, span)

    def compile(self, backend: str = "inductor") -> None:
        """Compiles the backbone with `torch.compile`, for GPUs.

        The parts of a block around its attention become compiled functions, shared by all blocks.
        A step of a cached decode of at most `STEP` positions becomes one function, on a GPU with
        CUDA graphs (`mode="reduce-overhead"`). The first decode takes minutes longer. Tokens may
        differ where two were nearly equal, as sums are taken in another order. On a CPU it gains
        nothing. Call it again after layers were exchanged or moved.

        Args:
            backend: of `torch.compile`.
        """
        self.backbone.compile(backend)

    def arrange(self, rows: Items[Row]) -> Sequence:
        """Sequence of rows with this model's attention and pad id, on its device."""
        spec = self.spec
        # The id of undecided positions may be one beyond the embedding, see `Spec.noise`.
        ids = max(spec.transformer.vocab, 1 + (spec.mask_id or 0))
        for i, row in enumerate(rows):
            for part in row.ids:
                check_ids(part, ids, f"row {i} of the batch")
        return arrange(
            rows, pad=spec.pad_id, attention=spec.attention, block_size=spec.block_size
        ).to(self.device)

    def embed(
        self, rows: Items[Row], held: dict[Hashable, Tensor | Sparse] | None = None
    ) -> Sequence:
        """Encode the media of rows and arrange them as a sequence.

        Args:
            rows: rows of `Processor.pack`, with or without canvases.
            held: cache of embeddings [N D] by `Prepared.digest`, which is updated. Items of equal
                content are encoded once.
        """
        held = {} if held is None else held
        items = {item.digest: item for row in rows for item in row.items}
        new = {key: item for key, item in items.items() if key not in held}
        for kind in dict.fromkeys(item.kind for item in new.values()):
            keys = [key for key, item in new.items() if item.kind == kind]
            encoded = self.encode(kind, [new[key] for key in keys])
            held.update(zip(keys, encoded, strict=True))
        return self.arrange([row.map(lambda item: held[item.digest]) for row in rows])

    def hidden(self, sequence: Sequence, at: Tensor | None = None) -> Tensor:
        """Final hidden states [B L D] of a sequence, or [N D] where `at` [B L] is True."""
        x = self.backbone.tokens(sequence.tokens)
        if sequence.media is not None:
            x = x.masked_scatter(sequence.is_medium[..., None], sequence.media.to(x.dtype))
        x, extras = self._conditioned(sequence, x, slice(None), x.shape[1])
        return self.backbone(x, sequence.positions, mask=sequence.visible(), read=at, **extras)

    def _conditioned(
        self, sequence: Sequence, x: Tensor, rows: Rows, end: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the backbone takes of a sequence beside embeddings, positions and mask."""
        soft = None if sequence.soft is None else take(sequence.soft, rows)
        x = self.backbone.condition(x, take(sequence.level, rows), soft)
        layout = sequence.level, sequence.positions, sequence.mask
        return x, self.backbone.extras(*layout, rows, end)

    def hidden_at(self, sequence: Sequence, at: Tensor) -> Tensor:
        """Hidden states [N D] that score the tokens where `at` [B L] is True, row by row."""
        if self.spec.shift:
            at = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], 1)
        return self.hidden(sequence, at)

    def logits_at(self, sequence: Sequence, at: Tensor, columns: slice | None = None) -> Tensor:
        """Logits [N V] of the tokens where `at` [B L] is True, in row-major order."""
        return self.backbone.head(self.hidden_at(sequence, at), columns)

    def logits(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        attention: Attention | None = None,
        block_size: int | None = None,
    ) -> Tensor:
        """Logits of every position of a token sequence.

        Args:
            tokens: [B L] int64 ids.
            mask: [B L] key padding, True = real; or an attention mask [B L L] or [B 1 L L] that is
                combined with the layout's: bool or 0/1 integers, True = attend, or floating, added
                to the attention scores.
            attention: see `mmdlm.layout.Attention`; None: the model's attention.
            block_size: tokens per block for "block_causal"; None: the model's block size.
        Returns:
            [B L V] float32; position i scores token i. The logits of shifted families are aligned;
            the first real position uses its unshifted logits, as published samplers do.
        Raises:
            ValueError: shapes disagree, an id is not in the vocabulary, or the attention is
                unknown.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens is {list(tokens.shape)}, expected token ids [B L]")
        check_ids(tokens, self.spec.transformer.vocab, "tokens")
        padding = mask if mask is not None and mask.ndim == 2 else None
        kind = attention or self.spec.attention
        sequence = from_tokens(tokens, padding, kind, block_size or self.spec.block_size)
        seen = sequence.visible()
        if mask is not None and mask.ndim != 2:
            seen = allowed(mask, seen, tokens)
        x, extras = self._conditioned(
            sequence, self.backbone.tokens(tokens), slice(None), tokens.shape[1]
        )
        hidden = self.backbone(x, sequence.positions, mask=seen, **extras)
        raw = self.backbone.head(hidden).float()
        return align(raw, sequence.mask) if self.spec.shift else raw

    def run(
        self,
        sequence: Sequence,
        rows: Rows,
        read: Rows,
        kv: KV | None,
        columns: slice | None = None,
        mask: Tensor | Literal["layout"] | None = "layout",
    ) -> Tensor:
        """Logits of chosen positions, with the KV cache updated at the recomputed positions.

        Args:
            sequence: the whole sequence.
            rows: positions to recompute, in ascending order; all of them if `kv` is None.
            read: positions to score, which must be among the recomputed ones. Indices if `rows` are
                indices.
            kv: KV cache with the other positions, or None.
            columns: token ids to score.
            mask: [B M keys] bool, True = attend, for the first `kv.end` keys; None: attend to all.
                "layout": computed from the sequence, which needs a host sync.
        Returns:
            [B R V] float32; entry i scores the token at the i-th position of `read`.
        """
        if isinstance(rows, slice) and isinstance(read, slice):
            source = slice(read.start - 1, read.stop - 1) if self.spec.shift else read
            if source.start < rows.start or source.stop > rows.stop:
                raise ValueError(
                    f"positions {read} need rows {source}, but only {rows} are computed"
                )
            within: Rows = slice(source.start - rows.start, source.stop - rows.start)
        elif isinstance(rows, slice):
            within = read - int(self.spec.shift) - rows.start
        else:
            within = torch.searchsorted(rows, read - int(self.spec.shift))
            within = within.clamp(
                max=rows.shape[1] - 1
            )  # for batch rows without positions to score
        end = sequence.tokens.shape[1] if kv is None else kv.end
        if isinstance(mask, str):
            level = sequence.level
            mask = visible(take(level, rows), level[:, :end], sequence.mask[:, :end])
        x, extras = self._conditioned(sequence, self.spliced(sequence, rows), rows, end)
        positions = take(sequence.positions, rows)
        if self.backbone.step is not None and type(kv) is KV and count(rows) <= STEP:
            rows, within = (indices(r, len(sequence.tokens), self.device) for r in (rows, within))
            logits = self.backbone.step(
                self.backbone, x, positions, kv, mask, rows, within, columns
            )
            return logits.clone()  # the next step overwrites it; strategies may keep what they saw
        hidden = self.backbone(x, positions, kv, mask, rows=rows, read=within, **extras)
        return self.backbone.head(hidden, columns).float()

    def spliced(self, sequence: Sequence, rows: Rows) -> Tensor:
        """Input embeddings [B M D] of chosen positions, including media; without host sync."""
        x = self.backbone.tokens(take(sequence.tokens, rows))
        if sequence.media is None or not len(sequence.media):
            return x
        slots = sequence.is_medium
        number = slots.flatten().cumsum(0).view_as(slots) - 1  # index into media
        number = take(number, rows).clamp(min=0)
        media = sequence.media.to(x.dtype)[number]
        return torch.where(take(slots, rows)[..., None], media, x)

    def prompt(self, text: str | Items[Mapping[str, Any]], *, chat: bool | None = None) -> Tensor:
        """Token ids [n] of a text prompt, see `Processor.prompt`.

        Raises:
            ValueError: the conversation contains media, or see `Processor.prompt`.
        """
        parts = self.processor.prompt(text, chat=chat)
        if not all(isinstance(part, Tensor) for part in parts):
            raise ValueError("the conversation contains media; use answer(model, messages)")
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def backbone(config: TransformerConfig) -> Transformer:
    """The transformer of a config, with new weights."""
    if config.gemma is None:
        return Transformer(config)
    from mmdlm.backbones.gemma import Gemma

    return Gemma(config)


def require_model(model: Any, call: str) -> None:
    """Raises where something else is given as the model.

    Args:
        model: what was given.
        call: name of the function, such as "caption".

    Raises:
        TypeError: it is not a model, such as the name of one.
    """
    if not hasattr(model, "spec"):
        name = repr(model) if isinstance(model, str | PurePath) else "..."
        raise TypeError(
            f"{call}: the model is a {type(model).__name__}, expected a loaded model: "
            f"model = mmdlm.load({name}); mmdlm.{call}(model, ...)"
        )


def allowed(mask: Tensor, seen: Tensor | None, tokens: Tensor) -> Tensor:
    """Intersection of two attention masks, bool or floating [B L L].

    Args:
        mask: [B L L] or [B 1 L L], see `MultimodalDLM.logits`.
        seen: bool [B L L], attention mask of the layout; None if all may attend.
        tokens: [B L].
    Raises:
        ValueError: the shapes disagree.
    """
    batch, length = tokens.shape
    if mask.shape not in ((batch, length, length), (batch, 1, length, length)):
        raise ValueError(
            f"mask is {list(mask.shape)}, expected [B L], [B L L] or [B 1 L L] for tokens "
            f"{[batch, length]}"
        )
    mask = mask.reshape(batch, length, length)
    if not mask.is_floating_point():
        return mask.bool() if seen is None else seen & mask.bool()
    return mask if seen is None else mask.masked_fill(~seen, -torch.inf)


def align(raw: Tensor, mask: Tensor) -> Tensor:
    """Logits of a shifted family, aligned so that position i scores token i.

    Args:
        raw: [B L V] logits, where position i scores token i + 1.
        mask: [B L] bool, True = real; the first real position keeps its unshifted logits.
    """
    before = torch.cat([raw[:, :1], raw[:, :-1]], 1)
    start = mask & (mask.long().cumsum(1) == 1)
    return torch.where(start[..., None], raw, before)
