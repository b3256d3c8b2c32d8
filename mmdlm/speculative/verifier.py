"""Autoregressive verifiers of speculative decoding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmdlm.model import MultimodalDLM


@runtime_checkable
class Scorer(Protocol):
    """Protocol of a verifier; `Verifier` implements it for transformers models.

    Attributes:
        vocab: vocabulary size.
        ends: end token ids.
        names: token text to id; None if unknown.
        forwards: number of forwards so far.
    """

    vocab: int
    ends: frozenset[int]
    names: Mapping[str, int] | None
    forwards: int

    def score(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Next-token logits of the last tokens of a text, see `Verifier.score`."""


class Verifier:
    """A causal transformers model with a KV cache that is reused between calls.

    Only tokens after the common prefix with the previous text are computed.

    Args:
        model: for example `AutoModelForCausalLM.from_pretrained(...)`, in eval mode.
        tokenizer: its tokenizer, to compare the vocabularies token by token; None: only their
            sizes are compared.
        cached: reuse the KV cache. Use False for models whose cache cannot be cropped (state-space
            layers, sliding windows).
    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, cached: bool = True) -> None:
        if model.training:
            raise ValueError("the verifier is in training mode, expected eval mode; call .eval()")
        self.model, self.cached = model, cached
        self.vocab: int = model.config.get_text_config().vocab_size
        self.names: Mapping[str, int] | None = None if tokenizer is None else tokenizer.get_vocab()
        config = getattr(model, "generation_config", None) or model.config
        ends = config.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self.forwards = 0
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._cached_tokens = torch.zeros(0, dtype=torch.long)
        """Tokens whose keys and values are in the cache, on the CPU."""

    @torch.inference_mode()
    def score(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Next-token logits of the last tokens of a text, from one forward.

        Args:
            tokens: [n] int64, at least one token.
            last: number of tokens to score; None: all but the first.
        Returns:
            [last + 1 V] float32; row i scores token n - last + i, so the final row scores the
            token after the text.
        Raises:
            ValueError: there is no token before the first scored one.
        """
        tokens = tokens.cpu()
        last = len(tokens) - 1 if last is None else last
        if not 0 <= last < len(tokens):
            raise ValueError(
                f"last is {last} of {len(tokens)} tokens, expected 0 to {len(tokens) - 1}"
            )
        begin = self._shorten(tokens, len(tokens) - 1 - last) if self.cached else 0
        given = {"logits_to_keep": last + 1} if self._has_logits_to_keep else {}
        if self.cached:
            given["past_key_values"] = self._cache
        out = self.model(
            input_ids=tokens[None, begin:].to(self.model.device), use_cache=self.cached, **given
        )
        self.forwards += 1
        if self.cached:
            self._cache, self._cached_tokens = out.past_key_values, tokens
        return out.logits[0, -last - 1 :].float()

    def _shorten(self, tokens: Tensor, most: int) -> int:
        """Crops the cache to its common prefix with a text, at most `most` tokens."""
        size = min(len(self._cached_tokens), most)
        differ = (self._cached_tokens[:size] != tokens[:size]).nonzero()
        common = int(differ[0]) if len(differ) else size
        if common == 0:
            self._cache = None
        elif common < len(self._cached_tokens):
            # A negative argument is the number of tokens to remove, in all transformers versions.
            self._cache.crop(common - len(self._cached_tokens))
        self._cached_tokens = self._cached_tokens[:common]
        return common


def as_verifier(model: Any) -> Scorer:
    """The argument if it is a `Scorer`, else a `Verifier` of a transformers model."""
    return model if isinstance(model, Scorer) else Verifier(model)


def check_vocabulary(model: MultimodalDLM, verifier: Scorer) -> None:
    """Raises ValueError unless both models have the same vocabulary.

    Without tokenizers, the sizes must be equal; with them, the tokens.
    """
    size = model.spec.transformer.vocab
    if verifier.names is None or model.tokenizer is None:
        if size != verifier.vocab:
            raise ValueError(
                f"the model has {size} ids and the verifier {verifier.vocab}; they must share a "
                "vocabulary. If only the padding differs, pass Verifier(model, tokenizer) and a "
                "model with a tokenizer, so that the tokens are compared"
            )
        return
    names = model.tokenizer.backend.get_vocab()
    other = [(n, i, names.get(n)) for n, i in verifier.names.items() if names.get(n) != i]
    if other:
        name, theirs, ours = min(other, key=lambda each: each[1])
        raise ValueError(
            f"{len(other)} of the verifier's tokens differ from the model's: {name!r} is {theirs} "
            f"in the verifier and {'missing' if ours is None else ours} in the model; use a "
            "verifier with the model's vocabulary"
        )
