"""DEER: blocks drafted in one forward; text or distribution of the verifier."""

import math
from collections import Counter

import pytest
import torch

from mmdlm.speculative.accept import accept_sampled
from mmdlm.speculative.deer import deer
from mmdlm.speculative.verifier import Verifier

LENGTH, MASK, EOS = 16, 2, 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_text_equals_greedy_text_of_the_verifier(
    kind: str, attention: str, toy, causal, greedy, prompts
) -> None:
    for seed in range(3):
        size = 4 if attention == "block_causal" else None
        model, verifier = toy(seed, attention=attention, block_size=size), causal(seed, kind)
        sizes = (5, 2, 4)
        tokens, mask = prompts(seed, *sizes)
        got = deer(model, verifier, tokens, LENGTH, block=(32, 4, 1)[seed], mask=mask)
        for row, size in enumerate(sizes):
            alone = tokens[row, -size:].tolist()
            assert got.tokens[row, 5:].tolist() == greedy(verifier, alone, LENGTH)


def test_good_blocks_save_forwards_of_the_verifier(causal, greedy, knowing, prompts) -> None:
    for seed in range(4):
        prompt = prompts(seed, 4)[0]
        text = greedy(causal(seed), prompt[0].tolist(), 40)
        model, verifier = knowing([prompt[0].tolist() + text], slips=0.1), Verifier(causal(seed))
        got = deer(model, verifier, prompt, 40, block=8)
        size = text.index(EOS) + 1 if EOS in text else 40
        assert got.tokens[0, 4:].tolist() == text
        assert got.nfe == got.checks == verifier.forwards == len(model.forwards)
        assert got.checks < max(2, size / 2)
        assert model.forwards[0] == 8


def test_correct_draft_takes_one_round(causal, greedy, knowing, prompts) -> None:
    prompt = prompts(7, 4)[0]
    text = greedy(causal(3), prompt[0].tolist(), 9)
    assert EOS not in text
    got = deer(knowing([prompt[0].tolist() + text], slips=0.0), causal(3), prompt, 9, block=8)
    assert (got.nfe, got.checks, got.accepted) == (1, 1, ((8,),))
    assert got.tokens[0, 4:].tolist() == text


@pytest.mark.parametrize("drawn", [True, False])
def test_accepted_tokens_follow_the_verifier(drawn: bool, fair) -> None:
    """The first token of a draft, its replacement, and the token after an accepted draft."""
    generator = torch.Generator().manual_seed(3)
    logits, trials, temperature = torch.randn(2, 5, generator=generator), 4000, 0.7
    logits[:, MASK] = -torch.inf
    proposal = torch.tensor([[0.4, 0.1, 0.0, 0.2, 0.3]])
    p = (logits / temperature).softmax(-1).double()
    first, second = Counter(), Counter()
    for _ in range(trials):
        token = int(torch.multinomial(proposal[0], 1, generator=generator)) if drawn else 4
        kept = accept_sampled([token], proposal if drawn else None, logits, temperature, generator)
        first[kept.tokens[0]] += 1
        assert len(kept.tokens) == kept.accepted + 1
        if kept.accepted:
            second[kept.tokens[1]] += 1
    assert fair(first, dict(enumerate(p[0].tolist())), trials)
    assert fair(second, dict(enumerate(p[1].tolist())), second.total())
    q = proposal[0].double() if drawn else torch.eye(5, dtype=torch.double)[4]
    accepted = float(torch.minimum(p[0], q).sum()) * trials
    assert abs(second.total() - accepted) < 3.3 * math.sqrt(accepted)


@pytest.mark.parametrize("block", [1, 2])
def test_samples_follow_the_verifiers_distribution(block: int, toy, table, fair) -> None:
    model, verifier, trials, temperature = toy(1, vocab=6), table(6), 400, 1.3
    prompt = torch.tensor([[3]]).expand(trials, -1)
    source = torch.Generator().manual_seed(block)
    got = deer(model, verifier, prompt, 2, block=block, temperature=temperature, generator=source)
    pairs = Counter(map(tuple, got.tokens[:, 1:].tolist()))
    assert fair(pairs, verifier.pairs(3, temperature), trials)
    assert 0 < sum(map(sum, got.accepted)) < 2 * trials


def test_equal_seeds_give_equal_samples_alone_and_in_a_batch(toy, causal, prompts) -> None:
    sizes = (5, 2)
    tokens, mask = prompts(3, *sizes)
    generators = [torch.Generator().manual_seed(i) for i in (4, 5)]
    options = {"block": 3, "temperature": 1.0}
    got = deer(toy(), causal(), tokens, 6, mask=mask, generator=generators, **options)
    for row, size in enumerate(sizes):
        source = [torch.Generator().manual_seed(4 + row)]
        alone = deer(toy(), causal(), tokens[row : row + 1, -size:], 6, generator=source, **options)
        assert got.tokens[row, 5:].tolist() == alone.tokens[0, size:].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": 0}, "block is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"length": 0}, "length is 0"),
    ],
)
def test_invalid_arguments_of_deer_are_rejected(given: dict, message: str, toy, causal) -> None:
    with pytest.raises(ValueError, match=message):
        deer(toy(), causal(), torch.tensor([[3, 4]]), **{"length": 4, **given})
