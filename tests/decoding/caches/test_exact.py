import torch

from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks


def rows(toy, watch, length: int, *strategies, prompt: int = 5, **kind) -> list[tuple[int, int]]:
    model = toy(**kind)
    forwards = watch(model)
    decode(model, torch.arange(3, 3 + prompt)[None], length, strategies)
    assert all(forward.cached == (kind != {}) for forward in forwards)
    return [forward.rows for forward in forwards]


def test_full_attention_computes_everything_again(toy, watch) -> None:
    assert rows(toy, watch, 3) == [(0, 8)] * 3


def test_a_prefix_model_computes_its_prompt_once(toy, watch) -> None:
    assert rows(toy, watch, 3, attention="prefix") == [(0, 8), (5, 8), (5, 8)]
    # The last prompt row scores the first position of a shifted model, and stays in.
    assert rows(toy, watch, 3, attention="prefix", shift=True) == [(0, 8), (4, 8), (4, 8)]


def test_a_block_causal_model_computes_finished_blocks_once(toy, watch) -> None:
    # Text blocks of 4: the answer's five positions lie in [5, 8) and [8, 10).
    kind = {"attention": "block_causal", "block_size": 4}
    assert rows(toy, watch, 5, Threshold(0.0), **kind) == [(0, 8), (4, 10)]
    assert rows(toy, watch, 5, **kind) == [(0, 8), (4, 8), (4, 8), (4, 10), (8, 10)]


def test_an_autoregressive_model_computes_one_row_per_token(toy, watch) -> None:
    kind = {"attention": "block_causal", "block_size": 1, "shift": True}
    assert rows(toy, watch, 4, **kind) == [(0, 5), (5, 6), (6, 7), (7, 8)]
    kind = {"attention": "block_causal", "block_size": 1}
    # Without the shift a position is scored from its own mask, and known one step later.
    assert rows(toy, watch, 3, **kind) == [(0, 6), (5, 7), (6, 8)]


def test_windows_bound_what_is_computed(toy, watch) -> None:
    kind = {"attention": "prefix", "block_size": 2}
    got = rows(toy, watch, 4, Blocks(2), Threshold(0.0), **kind)
    assert got == [(0, 7), (5, 9)]
