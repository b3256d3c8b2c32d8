"""Whole decodes, equal to the reference samplers: the same ids, steps and number of forwards.

Three kinds of cases differ from our loop on purpose:

- `fast_dual_b8_s8_thr0.9_masks_left` ends with masks in the answer, because that sampler gives up
  on a block after its share of steps. Our strategies never leave a mask; `GivesUp` and `Given`
  below do as it does, to show that all else is equal.
- `fast2025_06_*`: that version runs one forward more after a block that its full pass has
  finished. We do not; ids and steps are equal, and the forwards are compared without those.
- `llada_generate_cfg_*`: both branches are one call there and two forwards here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.commits.factor import Factor
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.timesteps import Timesteps
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import Decoded, decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.scores.entropy import Entropy
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.scores.random_order import RandomOrder
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    case["name"]: (family, case)
    for family in ("llada", "dream")
    for case in json.loads((GOLDEN / "decoding" / f"{family}.json").read_text())["cases"]
}
SCORES = {"maskgit_plus": Probability, "topk_margin": Margin, "entropy": Entropy}


@dataclass(frozen=True)
class GivesUp(Strategy):
    """Blocks that close after two steps; the first of them may also fill what was left before."""

    size: int

    def plan(self, view: View) -> Tensor:
        block, late = view.step // 2, view.step % 2
        start = self.size * block[:, None]
        at = torch.arange(view.length) - view.prompt
        first = torch.where(late[:, None] > 0, start, 0)
        return (at >= first) & (at < start + self.size) & (start < view.length - view.prompt)


@dataclass(frozen=True)
class Given(Strategy):
    """A full pass in the first step of such a block, then the block alone."""

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.plan if int(view.step[0]) % 2 else view.level >= 0)


@pytest.fixture(scope="module")
def models() -> dict[str, mmdlm.model.MultimodalDLM]:
    folder = GOLDEN / "backbones"
    return {name: mmdlm.load(folder / name, device="cpu") for name in ("llada", "dream")}


def llada_strategies(name: str, args: dict) -> list[Strategy]:
    """The strategies that stand for a call of a LLaDA sampler."""
    if "masks_left" in name:
        return [GivesUp(args["block_length"]), Given(), Threshold(args["threshold"])]
    chosen: list[Strategy] = [Blocks(args["block_length"])]
    if "prefix" in name:
        chosen.append(PrefixCache())
    if "dual" in name:
        chosen.append(DualCache())
    if "cfg_scale" in args:
        chosen.append(CFG(args["cfg_scale"]))
    if args["remasking"] == "random":
        chosen.append(RandomOrder())
    if "threshold" in args:
        return [*chosen, Threshold(args["threshold"])]
    if "factor" in args:
        return [*chosen, Factor(args["factor"])]
    return [*chosen, TopK(args["steps"])]


def dream_strategies(name: str, args: dict) -> list[Strategy]:
    """The strategies that stand for a call of a Dream sampler."""
    chosen: list[Strategy] = []
    if "block_length" in args:
        chosen = [Blocks(args["block_length"]), DualCache() if "dual" in name else PrefixCache()]
    if args["alg"] == "confidence_threshold":
        # Only the sampler without blocks bounds what a step may commit by a schedule.
        return [*chosen, Threshold(args["threshold"], None if chosen else args["steps"])]
    return [*chosen, Timesteps(args["steps"], args["eps"]), SCORES[args["alg"]]()]


def run(model: mmdlm.model.MultimodalDLM, family: str, case: dict) -> Decoded:
    args = case["args"]
    strategies = {"llada": llada_strategies, "dream": dream_strategies}[family]
    mask = torch.tensor(case["attention_mask"]) if "attention_mask" in case else None
    length = args["gen_length"] if family == "llada" else args["max_new_tokens"]
    chosen = strategies(case["name"], args)
    return decode(model, torch.tensor(case["prompt_ids"]), length, chosen, mask=mask)


def wasted(case: dict) -> int:
    """Forwards the June 2025 samplers run after a block that its first forward has finished."""
    size, steps = case["args"]["block_length"], case["unmask_step"][0]
    blocks = [steps[i : i + size] for i in range(0, len(steps), size)]
    return sum(min(block) == max(block) for block in blocks)


@pytest.mark.parametrize("name", CASES)
def test_decode_repeats_the_reference(
    name: str, models: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, case = CASES[name]
    if case["args"].get("remasking") == "random":
        # The reference draws for prompt, window and all else at once, from one generator.
        generator = torch.Generator().manual_seed(0)

        def uniform(view: View) -> Tensor:
            draws = torch.rand(len(view.tokens), view.length, generator=generator)
            return draws.gather(1, view.at)

        monkeypatch.setattr(View, "uniform", uniform)

    got = run(models[family], family, case)

    nfe = case["nfe"]
    if "fast2025_06" in name:
        nfe -= wasted(case)
    if "cfg_scale" in case["args"]:
        nfe *= 2
    assert got.tokens.tolist() == case["final_ids"]
    assert got.history.step.tolist() == case["unmask_step"]
    assert got.nfe == nfe
