"""DiffuSpec: controller and search equal a third-party port; text of the verifier."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmdlm.speculative.diffuspec import DraftLength, NGram, diffuspec, lattice, path
from mmdlm.speculative.verifier import Verifier

FILE = Path(__file__).parents[1] / "golden" / "decoding" / "speculative.json"
METHODS = {name: m["cases"] for name, m in json.loads(FILE.read_text())["methods"].items()}
LENGTH, MASK, EOS = 16, 2, 1


def each(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", METHODS[name], ids=range(len(METHODS[name])))


@each("diffuspec_adl")
def test_draft_lengths_equal_those_of_the_port(case: dict) -> None:
    p = case["params"]
    control = DraftLength(p["k_min"], p["k_max"], p["delta"], p["rho"])
    lengths = [control.tokens]
    for drafted, accepted in case["feedback"]:
        control.learn(drafted, accepted)
        lengths.append(control.tokens)
    assert lengths == case["output"]


@each("diffuspec_cps")
def test_path_equals_that_of_the_port(case: dict) -> None:
    p = case["params"]
    options = lattice(torch.tensor(case["logits"]), p["eos_id"], most=p["M_max"], mass=p["tau"])

    def proxy(text: list[int], candidates: list[int]) -> list[float]:
        return [case["proxy"][text[-1]][token] for token in candidates]

    got = path(options, case["prefix"], proxy, p["eos_id"], beam=p["beam_size"], weight=p["lam"])
    assert got == case["output"]


def test_lattice_equals_manual_calculation() -> None:
    generator = torch.Generator().manual_seed(0)
    stopped = 0
    for i in range(100):
        logits = torch.randn(4, 8, generator=generator) * (0.5, 2, 5)[i % 3]
        logits[:, 7] -= 2 * (i % 4)
        most, mass = 1 + i % 5, (0.3, 0.8, 0.95)[i % 3]
        expected = []
        for row in logits.double().softmax(-1).tolist():
            ids = sorted(range(8), key=lambda t: -row[t])[:most]
            size = next(
                (
                    n
                    for n in range(1, len(ids) + 1)
                    if 7 in ids[:n] and sum(row[t] for t in ids[:n]) >= mass
                ),
                len(ids),
            )
            natural = 7 in ids[:size]
            expected.append(ids[:size] + [7] * (not natural))
            if natural:
                stopped += 1
                break
        got = lattice(logits, 7, most=most, mass=mass)
        assert [[token for token, _ in options] for options in got] == expected
        for options, row in zip(got, logits.double().log_softmax(-1).tolist(), strict=False):
            assert [value for _, value in options] == pytest.approx(
                [row[t] for t, _ in options], abs=1e-5
            )
    assert 0 < stopped < 100


def test_a_wide_beam_finds_the_best_path() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits, table = (
            torch.randn(3, 5, generator=generator),
            torch.randn(5, 5, generator=generator),
        )
        options = [list(enumerate(row)) for row in logits.log_softmax(-1).tolist()]

        def score(
            tokens: tuple[int, ...], options: list = options, table: torch.Tensor = table
        ) -> float:
            before = (0, *tokens)
            drafter = sum(options[i][t][1] for i, t in enumerate(tokens))
            return 0.7 * drafter + 0.3 * sum(
                float(table[a, b]) for a, b in itertools.pairwise(before)
            )

        # A path may end early, with token 4, and is not extended then.
        every = {
            t[: t.index(4) + 1] if 4 in t else t for t in itertools.product(range(5), repeat=3)
        }
        got = path(
            options,
            [0],
            lambda text, ids, table=table: table[text[-1], ids].tolist(),
            4,
            beam=200,
            weight=0.7,
        )
        assert tuple(got) == max(every, key=score)


def test_trigrams_equal_manual_calculation() -> None:
    text = [3, 4, 3, 4, 5, 3, 4, 3]
    model = NGram(vocab=6, order=3, smoothing=0.5).fit(text[:4])
    model.fit(text, 4)
    for context in ([3, 4], [9, 4], [4], [], [1], [7, 7]):
        tail = context[-2:]
        while tail and not any(
            text[i : i + len(tail)] == tail for i in range(len(text) - len(tail))
        ):
            tail = tail[1:]
        follows = Counter(
            text[i + len(tail)]
            for i in range(len(text) - len(tail))
            if text[i : i + len(tail)] == tail
        )
        expected = [math.log((follows[t] + 0.5) / (follows.total() + 3)) for t in range(6)]
        assert model(context, list(range(6))) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_equals_greedy_text_of_the_verifier(kind: str, toy, causal, greedy, prompts) -> None:
    for seed in range(3):
        model, verifier = toy(seed, shift=bool(seed % 2)), causal(seed, kind)
        sizes = (5, 2, 4)
        tokens, mask = prompts(seed, *sizes)
        lengths = {"shortest": 2, "longest": 5, "growth": 2} if seed else {}
        got = diffuspec(model, verifier, tokens, LENGTH, mask=mask, **lengths)
        for row, size in enumerate(sizes):
            alone = tokens[row, -size:].tolist()
            assert got.tokens[row, 5:].tolist() == greedy(verifier, alone, LENGTH)


def test_good_drafts_save_verifier_forwards_and_grow(causal, greedy, knowing, prompts) -> None:
    for seed in range(4):
        verifier = Verifier(causal(seed))
        verifier.ends = frozenset()
        prompt = prompts(seed, 4)[0]
        causal(seed).generation_config.eos_token_id = None
        text = greedy(causal(seed), prompt[0].tolist(), 40)
        causal(seed).generation_config.eos_token_id = EOS
        text = text[: text.index(EOS)] if EOS in text else text
        model = knowing([prompt[0].tolist() + text], slips=0.1)
        got = diffuspec(
            model, verifier, prompt, len(text), shortest=2, longest=12, growth=4, weight=1.0
        )
        assert got.tokens[0, 4:].tolist() == text
        assert got.nfe == got.checks == len(model.forwards) == verifier.forwards
        assert got.checks <= len(text) / 2
        assert sum(got.accepted[0]) + got.checks in (len(text), len(text) + 1)
        assert max(model.forwards) <= 12


def test_drafts_shrink_while_they_are_rejected(toy, causal, prompts) -> None:
    got = diffuspec(toy(1), causal(1), prompts(0, 4)[0], 20, shortest=2, longest=8, growth=1)
    drafted, accepted = got.drafted[0], got.accepted[0]
    assert not any(accepted)
    assert drafted[0] == 8
    assert max(drafted[1:]) == 4


def test_custom_proxy_is_called(toy, causal, prompts) -> None:
    calls = []

    def proxy(text: list[int], candidates: list[int]) -> list[float]:
        calls.append((text, candidates))
        return [0.0 if token == 7 else -50.0 for token in candidates]

    prompt = prompts(0, 4)[0]
    got = diffuspec(toy(), causal(), prompt, 4, proxy=proxy, most=50, mass=1.0, weight=0.0)
    assert calls[0][0] == prompt[0].tolist()
    assert MASK not in {token for _, candidates in calls for token in candidates}
    assert got.drafted[0][0] >= 1


def test_samples_along_a_searched_path_follow_the_verifier(toy, table, fair) -> None:
    model, verifier, trials, temperature = toy(1, vocab=6), table(6), 400, 1.3
    prompt = torch.tensor([[3]]).expand(trials, -1)
    source = torch.Generator().manual_seed(0)
    got = diffuspec(
        model,
        verifier,
        prompt,
        2,
        temperature=temperature,
        most=3,
        shortest=2,
        longest=2,
        generator=source,
    )
    pairs = Counter(map(tuple, got.tokens[:, 1:].tolist()))
    assert fair(pairs, verifier.pairs(3, temperature), trials)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shortest": 9, "longest": 3}, "shortest is 9, longest is 3"),
        ({"rate": 2.0}, "rate is 2.0"),
        ({"beam": 0}, "beam is 0"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_invalid_arguments_of_diffuspec_are_rejected(
    given: dict, message: str, toy, causal
) -> None:
    with pytest.raises(ValueError, match=message):
        diffuspec(toy(), causal(), torch.tensor([[3, 4]]), 4, **given)
