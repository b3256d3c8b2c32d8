"""Whole decodes of block-diffusion samplers: the same ids, steps and number of forwards.

The loop's own `Exact` stores a block while it opens the next one. So against the published loops
it saves the forward for the whole blocks of the prompt and, without a shift, one per block; ids and
steps are the same. With `BlockCache` the forwards are those of the reference, one by one. LLaDA2
recomputes everything in every forward and stores nothing, which makes as many forwards as `Exact`.

What the references do and our loop does not:

- SDAR stores the last block, for nobody: one forward more than with `BlockCache`.
- SDAR takes as many positions as are due even when fewer are masked: known ones are overwritten,
  here the last token of the prompt (`torch.topk` happens to choose it), where the first block has
  one mask and two are due. Our loop never writes known positions. `Overwriting` repeats it, and
  with it all traces are equal.
- The copy of Fast-dLLM v2 that recorded the `blockcache` traces
  (Satgoy152/DualDiffusion: FastDLLM_inferencing) does not forget the keys and values of a block
  when the next one opens, so the first part of a block sees masks that look like the block before.
  Other copies (the same repository: FastDLLM-inferencing) forget them, and so do we:
  `test_sub_block_cache.py` proves that against the loop by hand. `Remembering` repeats the slip,
  and with it all traces are equal.
- LLaDA2 and SDAR fill whole blocks beyond the length asked for; we are asked for that length here.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.decoding.caches.block_cache import BlockCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.memory import Entry, PerRequest
from mmdlm.decoding.plans.sub_blocks import SubBlocks
from mmdlm.decoding.positions import span
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.scores.left_to_right import LeftToRight
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    family: {
        case["name"]: case
        for case in json.loads((GOLDEN / "decoding" / f"{family}.json").read_text())["cases"]
    }
    for family in ("sdar", "llada2_moe", "fast_dllm_v2")
}


def each(family: str, *, cached: bool | None = None) -> pytest.MarkDecorator:
    names = [
        name
        for name, case in CASES[family].items()
        if cached is None or case["args"]["use_block_cache"] == cached
    ]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="module")
def models() -> dict[str, mmdlm.model.MultimodalDLM]:
    return {name: mmdlm.load(GOLDEN / "backbones" / name, device="cpu") for name in CASES}


@dataclass(frozen=True)
class Clock(Strategy):
    """Notes the forward that each step reads."""

    forwards: list[int] = field(default_factory=list, hash=False)

    def stop(self, view: View) -> Tensor:
        self.forwards.append(int(view.forwards[0]) - 1)
        return torch.zeros(len(view.tokens), dtype=torch.bool)


def forwards(got: Decoded, clock: Clock) -> list[int]:
    """The forward that filled each position of the answer."""
    return [clock.forwards[step] for step in got.history.step[0].tolist()]


def dense(steps: list[int]) -> list[int]:
    """Forwards that filled something, counted without the others."""
    order = sorted(set(steps))
    return [order.index(step) for step in steps]


def prompt_of(case: dict) -> tuple[Tensor, int]:
    """The prompt, and the length of what follows it in the trace."""
    prompt = torch.tensor(case["prompt_ids"])
    return prompt, len(case["final_ids"][0]) - prompt.shape[1]


@dataclass(frozen=True)
class Overwriting(Dynamic):
    """Also overwrites the end of the prompt when fewer positions are masked than are due."""

    def select(self, view: View) -> Tensor:
        if int(view.open.sum()) < int(view.block_size) // self.steps_per_block:
            everything, last = slice(0, view.length), slice(view.prompt - 1, view.prompt)
            scores = view.model.run(view.sequence, everything, last, None)
            view.tokens[:, last] = scores.argmax(-1)  # against the rules, to repeat the slip
        return super().select(view)


def sdar(args: dict, rule: type[Dynamic]) -> list[Strategy]:
    """The strategies that stand for a call of block_diffusion_generate."""
    select = rule(args["denoising_steps"], args.get("confidence_threshold", 1.0))
    return [select, LeftToRight()] if args["remasking_strategy"] == "sequential" else [select]


def overwrites(case: dict) -> bool:
    return case["final_ids"][0][: len(case["prompt_ids"][0])] != case["prompt_ids"][0]


@each("sdar")
def test_decode_repeats_sdar(name: str, models: dict) -> None:
    case, model = CASES["sdar"][name], models["sdar"]
    prompt, length = prompt_of(case)
    size = prompt.shape[1]  # the prompt is returned as it was given
    final = [ids[size:] for ids in case["final_ids"]]
    chosen = sdar(case["args"], Overwriting if overwrites(case) else Dynamic)

    got = decode(model, prompt, length, chosen)
    assert got.tokens[:, size:].tolist() == final
    assert got.history.step[0].tolist() == dense(case["unmask_step"][0])
    blocks = length // model.spec.block_size + 1
    assert got.nfe == case["nfe"] - 1 - blocks

    stored = decode(model, prompt, length, [*chosen, BlockCache(), clock := Clock()])
    assert stored.tokens[:, size:].tolist() == final
    assert forwards(stored, clock) == case["unmask_step"][0]
    assert stored.nfe == case["nfe"] - 1


def test_the_prompt_stays_where_sdar_overwrites_it(models: dict) -> None:
    cases = [case for case in CASES["sdar"].values() if overwrites(case)]
    assert len(cases) == 3
    for case in cases:
        prompt, length = prompt_of(case)
        got = decode(models["sdar"], prompt, length, sdar(case["args"], Dynamic))
        assert got.tokens[:, : prompt.shape[1]].tolist() == case["prompt_ids"]


@each("llada2_moe")
def test_decode_repeats_llada2(name: str, models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = CASES["llada2_moe"][name], models["llada2_moe"]
    args = case["args"]
    size = args["block_length"]
    spec = dataclasses.replace(model.spec, mask_id=case["mask_id"], block_size=size)
    monkeypatch.setattr(model, "spec", spec)
    prompt, length = prompt_of(case)
    whole = length + -(prompt.shape[1] + length) % size

    steps = min(args["steps"], args["gen_length"] // args["minimal_topk"])
    got = decode(model, prompt, whole, [Dynamic(steps, args["threshold"])])
    assert got.tokens[:, : prompt.shape[1] + length].tolist() == case["final_ids"]
    assert got.history.step[:, :length].tolist() == case["unmask_step"]
    assert got.nfe == case["nfe"]


@pytest.fixture
def v2(models: dict, monkeypatch: pytest.MonkeyPatch) -> mmdlm.model.MultimodalDLM:
    model, case = models["fast_dllm_v2"], next(iter(CASES["fast_dllm_v2"].values()))
    size = case["args"]["block_size"]
    spec = dataclasses.replace(model.spec, mask_id=case["mask_id"], block_size=size)
    monkeypatch.setattr(model, "spec", spec)
    return model


@each("fast_dllm_v2", cached=False)
def test_decode_repeats_fast_dllm_v2(name: str, v2: mmdlm.model.MultimodalDLM) -> None:
    case = CASES["fast_dllm_v2"][name]
    prompt, length = prompt_of(case)
    chosen = [SubBlocks(case["args"]["small_block_size"]), Dynamic(tau=case["args"]["threshold"])]

    got = decode(v2, prompt, length, chosen)
    assert got.tokens.tolist() == case["final_ids"]
    # A prompt of whole blocks is stored by the forward that scores the first token.
    assert got.nfe == case["nfe"] - (prompt.shape[1] % v2.spec.block_size > 0)

    stored = decode(v2, prompt, length, [*chosen, BlockCache()])
    assert stored.tokens.tolist() == case["final_ids"]
    assert stored.nfe == case["nfe"]


@dataclass(frozen=True)
class Remembering(SubBlockCache):
    """Gives a block the keys and values of the one before; stores the prompt on its own.

    For one row. Blocks are those of the model, the first of their positions opened alone.
    """

    def begin(self, view: View) -> dict[str, Entry]:
        return {"before": PerRequest([None])}

    def refresh(self, view: View) -> Refresh:
        usual, size = super().refresh(view), view.model.spec.block_size
        start, stop = (int(x) for x in span(view))
        at, mine, index = start % size, view.memory(self), torch.arange(view.length)
        block = start - at
        if not int(view.forwards[0]):
            if not at:
                return usual
            prompt = index < block
            return Refresh(usual.compute & ~prompt, prefill=prompt[None])
        kv = view.caches["canvas"]
        if at == 0:
            before = slice(block - size, block)
            mine["before"] = [[x[:, :, before].clone() for x in (*kv.keys, *kv.values)]]
        elif at == 1 and int(view.block_step) == 0 and mine["before"][0]:
            for buffer, before in zip((*kv.keys, *kv.values), mine["before"][0], strict=True):
                buffer[:, :, block : block + size] = before
            part = (index >= block) & (index < stop)
            return Refresh(part[None], attend=(index < block + size)[None])
        return usual


@each("fast_dllm_v2", cached=True)
def test_decode_repeats_the_sub_block_cache(name: str, v2: mmdlm.model.MultimodalDLM) -> None:
    case = CASES["fast_dllm_v2"][name]
    args = case["args"]
    prompt, length = prompt_of(case)
    chosen = [SubBlocks(args["small_block_size"]), Dynamic(tau=args["threshold"]), Remembering()]

    got = decode(v2, prompt, length, chosen)
    assert got.tokens.tolist() == case["final_ids"]
    assert got.nfe == case["nfe"]
