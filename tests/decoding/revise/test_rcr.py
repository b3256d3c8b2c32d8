import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.sub_block_cache import SubBlockCache
from mmdlm.decoding.commits.maskgit import MaskGIT
from mmdlm.decoding.commits.prophet import Prophet
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.revise.rcr import RCR
from mmdlm.decoding.scores.margin import Margin
from mmdlm.decoding.scores.probability import Probability
from mmdlm.decoding.strategy import Strategy

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding" / "history.json"
CASES = json.loads(GOLDEN.read_text())["methods"]["rcr_generate"]["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rollout_is_that_of_mdpo(case: dict, synthetic, watch) -> None:
    given, output = case["params"], case["output"]
    size, steps, curve = given["block_length"], given["steps"], given["mode"]
    score = {"topk_margin": Margin(), "low_confidence": Probability()}[given["conf_alg"]]
    plain = [Blocks(size), MaskGIT(steps, curve)]
    chosen = [RCR(steps, curve, size)] if given["rcr"] else plain
    model, prompt = synthetic(case["model"]), torch.tensor([case["prompt"]])
    forwards = watch(model)
    got = decode(model, prompt, given["gen_length"], [score, *chosen])
    assert got.tokens[0, prompt.shape[1] :].tolist() == output["generated"]
    masked = [
        (forward.tokens[0] == case["model"]["mask_id"]).nonzero()[:, 0] - prompt.shape[1]
        for forward in forwards
    ]
    # The reference also runs the model in steps without masks.
    assert [m.tolist() for m in masked] == [m for m in output["masked_before_each_step"] if m]


def by_hand(model, prompt: list[int], length: int, given: RCR) -> tuple[list[int], list[list]]:
    """One row: positions and running confidences in dictionaries, a linear curve."""
    mask, tokens = model.spec.mask_id, prompt + [model.spec.mask_id] * length
    size, running, seen = given.size or length, {}, []
    for start in range(len(prompt), len(tokens), size):
        stop = min(start + size, len(tokens))
        count, steps = stop - start, max(1, round(given.steps * (stop - start) / length))
        for step in range(1, steps + 1):
            masked = [i for i in range(stop) if tokens[i] == mask]
            if not masked:
                break
            seen.append([i for i, token in enumerate(tokens) if token == mask])
            logits = model.logits(torch.tensor([tokens]))[0]
            logits[:, mask] = -torch.inf
            sure, best = (x.tolist() for x in logits.double().softmax(-1).max(-1))
            for i in masked:
                tokens[i], running[i] = best[i], sure[i]
            left = int(count * (1 - step / steps))
            for i in sorted(running, key=lambda i: (running[i], i))[:left]:
                tokens[i] = mask
    return tokens, seen


@pytest.mark.parametrize("given", [RCR(4), RCR(8, size=4), RCR(6, size=3), RCR(5, size=2)])
def test_a_decode_with_rcr_equals_one_by_hand(given: RCR, toy, prompts, watch) -> None:
    model, forwards = toy(), watch(toy())
    for prompt in prompts(6, 6, 6)[0]:
        forwards.clear()
        got = decode(model, prompt[None], 8, [given])
        masked = [(f.tokens[0] == model.spec.mask_id).nonzero()[:, 0] for f in forwards]
        tokens, want = by_hand(model, prompt.tolist(), 8, given)
        assert got.tokens[0].tolist() == tokens
        assert [m.tolist() for m in masked] == want


@pytest.mark.parametrize("size", [3, 4, None])
def test_a_row_remasks_the_same_tokens_as_alone(size: int | None, toy, prompts) -> None:
    tokens, mask = prompts(7, 4, 6)
    given = RCR(9, "cosine", size)
    batch = decode(toy(), tokens, 12, [given], mask=mask)
    for i, width in enumerate((7, 4, 6)):
        alone = decode(toy(), tokens[i : i + 1, -width:], 12, [given])
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, width:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])


def test_one_step_per_block_equals_top_k(toy, run) -> None:
    for more in ({}, {"size": 4}):
        once = run(toy(), RCR(1 if not more else 2, **more))
        base = run(toy(), TopK(1)) if not more else run(toy(), Blocks(4), TopK(2))
        assert once.tokens.equal(base.tokens)
        assert once.history.step.equal(base.history.step)


def test_takes_the_steps_of_the_curve(toy, run) -> None:
    assert [run(toy(), RCR(steps)).nfe for steps in (1, 3, 8)] == [1, 3, 8]


def test_early_exits_are_refused(toy, run) -> None:
    with pytest.raises(
        ValueError, match="RCR cannot be combined with Prophet: RCR requires a schedule"
    ):
        run(toy(), RCR(), Prophet())


@pytest.mark.parametrize("cache", [SubBlockCache(), PrefixCache(), DualCache()])
@pytest.mark.parametrize("shift", [False, True])
def test_a_row_with_a_cache_equals_the_row_alone(
    shift: bool, cache: Strategy, toy, prompts, seeds
) -> None:
    tokens, mask = prompts(7, 4, 6)
    model, chosen = toy(shift=shift), [RCR(8, size=4), cache]
    batch = decode(model, tokens, 12, chosen, mask=mask, generator=seeds(1, 2, 3))
    for i, size in enumerate((7, 4, 6)):
        alone = decode(model, tokens[i : i + 1, -size:], 12, chosen, generator=seeds(i + 1))
        assert batch.tokens[i, 7:].tolist() == alone.tokens[0, size:].tolist()
        assert batch.history.step[i].equal(alone.history.step[0])
        assert batch.forwards[i] == alone.nfe


def test_an_exact_cache_remasks_the_same_tokens(toy, run) -> None:
    model = toy(attention="prefix")
    for given in (RCR(8, size=4), RCR(5, "cosine")):
        cached, plain = run(model, given, PrefixCache()), run(model, given)
        assert cached.tokens.equal(plain.tokens)
        assert cached.history.step.equal(plain.history.step)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "RCR.steps is 0, expected at least 1"),
        ({"size": 0}, "RCR.size is 0, expected at least 1"),
        ({"schedule": "square"}, "the schedule 'square' is unknown"),
    ],
)
def test_bad_arguments_of_rcr(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RCR(**given)
