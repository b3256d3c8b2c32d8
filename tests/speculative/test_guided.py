"""Guided diffusion: drafts of a diffusion model verified by a causal model."""

import json
from pathlib import Path

import pytest
import torch

from mmdlm.speculative.accept import accept
from mmdlm.speculative.guided import guided
from mmdlm.speculative.verifier import Verifier

FILE = Path(__file__).parents[1] / "golden" / "decoding" / "speculative.json"
CASES = json.loads(FILE.read_text())["methods"]["guided_verify"]["cases"]
LENGTH, MASK, EOS = 12, 2, 1


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_accepted_tokens_equal_those_of_the_reference(case: dict) -> None:
    params, output = case["params"], case["output"]
    got = accept(
        case["draft"],
        torch.tensor(case["verifier_logits"]),
        params["strategy"],
        top_k=params.get("top_k", 5),
        ratio=params.get("relative_threshold", 0.5),
    )
    assert got == (output["tokens"], output["accepted"])


def by_hand(draft: list[int], rows: list[list[float]], rule: str, k: int, ratio: float) -> list:
    """Slow reference: sequential verification, including the bonus token."""
    kept = []
    for token, row in zip(draft, rows[: len(draft)], strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        weights = torch.tensor(row, dtype=torch.float64).exp().tolist()
        fine = {
            "deterministic": token == order[0],
            "topk": token in order[:k],
            "topk_relative": token in order[:k] and weights[token] >= ratio * weights[order[0]],
        }[rule]
        if not fine:
            return [*kept, order[0]]
        kept.append(token)
    for row in rows[len(draft) :]:
        kept.append(row.index(max(row)))
    return kept


@pytest.mark.parametrize("rule", ["deterministic", "topk", "topk_relative"])
def test_rules_match_a_slow_reference(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = 0
    for i in range(200):
        k, bonus = i % 5, i % 2
        logits = torch.randn(k + bonus, 6, generator=generator).mul(2).round()  # with ties
        draft = logits[:k].argmax(-1)
        wrong = torch.rand(k, generator=generator) < 0.3
        draft[wrong] = torch.randint(6, (int(wrong.sum()),), generator=generator)
        got = accept(draft.tolist(), logits, rule, top_k=2, ratio=0.3)
        assert got.tokens == by_hand(draft.tolist(), logits.tolist(), rule, 2, 0.3)
        assert got.tokens[: got.accepted] == draft[: got.accepted].tolist()
        whole += got.accepted == k
    assert 40 < whole < 200


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_equals_greedy_text_of_the_guider(kind: str, toy, causal, greedy, prompts) -> None:
    for seed in range(3):
        model, guider = toy(seed, shift=bool(seed % 2)), causal(seed, kind)
        sizes = (5, 2, 4)
        tokens, mask = prompts(seed, *sizes)
        got = guided(model, guider, tokens, LENGTH, mask=mask)
        assert got.tokens[:, :5].equal(tokens)
        for row, size in enumerate(sizes):
            alone = tokens[row, -size:].tolist()
            assert got.tokens[row, 5:].tolist() == greedy(guider, alone, LENGTH)


@pytest.mark.parametrize("chunk", [3, 32])
def test_good_drafts_save_forwards(chunk: int, causal, greedy, knowing, prompts) -> None:
    for seed in range(4):
        guider = causal(seed)
        prompt = prompts(seed, 4)[0]
        text = greedy(guider, prompt[0].tolist(), 24)
        model = knowing([prompt[0].tolist() + text])
        got = guided(model, verifier := Verifier(guider), prompt, 24, chunk=chunk)
        assert got.tokens[0, 4:].tolist() == text
        size = text.index(EOS) + 1 if EOS in text else 24
        assert got.nfe == len(model.forwards)
        assert got.checks == verifier.forwards == len(got.accepted[0])
        assert got.checks < max(4, size)
        for drafted, accepted in zip(got.drafted[0], got.accepted[0], strict=True):
            assert accepted <= drafted <= chunk
        steps = got.history.step[0].tolist()
        assert steps == sorted(steps[:size]) + [-1] * (24 - size)
        assert ((got.history.confidence > 0) == (got.history.step >= 0)).all()


def test_perfect_draft_takes_one_forward_and_one_check_per_chunk(
    causal, greedy, knowing, prompts
) -> None:
    prompt = prompts(7, 4)[0]
    guider = causal(3)
    guider.generation_config.eos_token_id = None
    text = greedy(guider, prompt[0].tolist(), 20)
    model = knowing([prompt[0].tolist() + text], slips=0.0)
    got = guided(model, guider, prompt, 20, chunk=8)
    guider.generation_config.eos_token_id = EOS
    if EOS in text:
        text = text[: text.index(EOS)]
    assert got.nfe == 1
    assert got.checks == -(-min(20, len(text) + 1) // 8)
    assert got.tokens[0, 4 : 4 + len(text)].tolist() == text


def test_relaxed_rules_accept_draft_tokens(toy, causal, prompts) -> None:
    tokens, mask = prompts(1, 6, 3)
    whole = guided(toy(), causal(), tokens, LENGTH, "topk", top_k=50, mask=mask)
    drafts = toy().logits(
        torch.cat([tokens, torch.full((2, LENGTH), MASK)], 1),
        torch.cat([mask, torch.ones(2, LENGTH, dtype=torch.bool)], 1),
    )
    drafts[..., MASK] = -torch.inf
    for row, draft in enumerate(drafts[:, 6:].argmax(-1).tolist()):
        size = draft.index(EOS) if EOS in draft else LENGTH
        assert whole.tokens[row, 6 : 6 + size].tolist() == draft[:size]
    strict = guided(toy(), causal(), tokens, LENGTH, mask=mask)
    relative = guided(
        toy(), causal(), tokens, LENGTH, "topk_relative", top_k=50, ratio=1.0, mask=mask
    )
    assert relative.tokens.equal(strict.tokens)
    assert sum(map(sum, whole.accepted)) > sum(map(sum, strict.accepted))


def test_end_token_of_either_model_ends_the_text(causal, greedy, knowing, prompts) -> None:
    prompt = prompts(2, 4)[0]
    guider = causal(2)
    text = greedy(guider, prompt[0].tolist(), 16)
    third = text[2]
    assert text.index(third) == 2
    guider.generation_config.eos_token_id = [EOS, third]
    got = guided(knowing([prompt[0].tolist() + text]), guider, prompt, 16)
    guider.generation_config.eos_token_id = EOS
    assert got.tokens[0, 4:].tolist() == [*text[:3], *[EOS] * 13]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "dynamic"}, "rule is 'dynamic', expected one of deterministic, topk"),
        ({"rule": "topk", "top_k": 0}, "top_k is 0"),
        ({"rule": "topk_relative", "ratio": 2.0}, "ratio is 2.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"length": 0}, "length is 0"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
    ],
)
def test_invalid_arguments_of_guided_are_rejected(given: dict, message: str, toy, causal) -> None:
    call = {"prompt": torch.tensor([[3, 4]]), "length": 4, **given}
    with pytest.raises(ValueError, match=message):
        guided(toy(), causal(), **call)


def test_media_and_unknown_ids_are_rejected(toy, causal) -> None:
    from mmdlm.layout import Row, arrange

    rows = arrange([Row((torch.randn(2, 32), torch.tensor([5, 6])))], pad=0)
    with pytest.raises(ValueError, match="holds media, which the verifier cannot see"):
        guided(toy(), causal(), rows, 4)
    with pytest.raises(ValueError, match="they must share a vocabulary"):
        guided(toy(vocab=60), causal(), torch.tensor([[55]]), 4)
