import math

import pytest
import torch

from mmdlm.decoding.commits.klass import KLASS
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import from_tokens

MASK = 15


def model(synthetic, mix: float):
    return synthetic(
        {
            "seed": 5,
            "vocab": 16,
            "mask_id": MASK,
            "scale": 12.0,
            "eos_id": None,
            "eos_slope": 0.0,
            "shift": 0,
            "mix": mix,
        }
    )


def oracle(
    predictor, prompt: list[int], size: int, block: int, rule: KLASS, softmax
) -> tuple[list[int], list[int], int]:
    """The reference: tokens, the step of each, and the number of steps with several ready."""
    tokens, steps, step, ready_steps = [*prompt, *[MASK] * size], [-1] * size, 0, 0
    last: list[list[float]] | None = None
    stable_steps = [0] * size
    for start in range(0, size, block):
        now = 0
        while masked := [i for i in range(start, start + block) if tokens[len(prompt) + i] == MASK]:
            sequence = from_tokens(torch.tensor([tokens]), None, "full", None)
            logits = predictor.run(sequence, None, slice(len(prompt), None), None)[0]
            logits[:, MASK] = -torch.inf
            p = [softmax(z) for z in logits.double().tolist()]
            for i in range(size if last else 0):
                change = sum(a * math.log(a / b) for a, b in zip(p[i], last[i], strict=True) if a)
                stable_steps[i] = stable_steps[i] + 1 if change < rule.kl else 0
            last = p
            ready = [i for i in masked if stable_steps[i] >= rule.steps and max(p[i]) > rule.tau]
            ready = ready if now >= rule.steps - 1 else []
            ready_steps += len(ready) > 1
            for i in ready or [max(masked, key=lambda i: (max(p[i]), -i))]:
                tokens[len(prompt) + i], steps[i] = p[i].index(max(p[i])), step
            step, now = step + 1, now + 1
    return tokens, steps, ready_steps


@pytest.mark.parametrize("mix", [0.6, 0.95])
@pytest.mark.parametrize("rule", [KLASS(0.6, 0.05), KLASS(0.4, 0.5, 1), KLASS(0.3, 2.0, 3)])
@pytest.mark.parametrize("block", [4, 12])
def test_rollouts_are_those_of_the_reference(
    block: int, rule: KLASS, mix: float, synthetic, softmax
) -> None:
    predictor, ready = model(synthetic, mix), 0
    for seed in range(4):
        prompt = [3 + seed, 4, 5]
        tokens, steps, count = oracle(predictor, prompt, 12, block, rule, softmax)
        got = decode(predictor, torch.tensor([prompt]), 12, [Blocks(block), rule])
        assert got.tokens[0].tolist() == tokens
        assert got.history.step[0].tolist() == steps
        ready += count
    assert ready > 0 or mix < 0.9


def test_a_bound_of_zero_commits_one_per_step(synthetic) -> None:
    predictor, prompt = model(synthetic, 0.5), torch.tensor([[3, 4, 5]])
    strict, one = (decode(predictor, prompt, 12, [s]) for s in (KLASS(0.0, 0.0), TopK()))
    assert strict.tokens.equal(one.tokens)
    assert strict.history.step.equal(one.history.step)


def test_rows_of_a_batch_commit_as_alone(synthetic) -> None:
    predictor, rule = model(synthetic, 0.7), [Blocks(6), KLASS(0.3, 0.5, 1)]
    prompts = torch.arange(3, 11).view(-1, 1).expand(-1, 3)
    batch = decode(predictor, prompts, 12, rule)
    first = batch.history.step[:, :6].amax(1)
    assert first.min() < first.max()  # rows finish their first block in different steps
    for i, prompt in enumerate(prompts):
        alone = decode(predictor, prompt[None], 12, rule)
        assert alone.tokens[0].equal(batch.tokens[i])
        assert alone.history.step[0].equal(batch.history.step[i])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": -1}, "KLASS.tau is -1, expected a probability"),
        ({"kl": -1}, "KLASS.kl is -1, expected at least 0"),
        ({"steps": 0}, "KLASS.steps is 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_klass(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLASS(**given)
