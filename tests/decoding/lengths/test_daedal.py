import json
from pathlib import Path

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.dynamic import Dynamic
from mmdlm.decoding.decode import decode
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.scores.gumbel import Gumbel

FILE = Path(__file__).parents[2] / "golden" / "decoding" / "schedules.json"
CASES = json.loads(FILE.read_text())["methods"]["daedal_generate"]["cases"]
MASK, EOS = 15, 0


def strategy(params: dict) -> DAEDAL:
    return DAEDAL(
        growth=params["max_gen_length"] / params["initial_gen_length"],
        size=params["block_length"],
        expansion=params["expansion_factor"],
        high=params["high_conf_threshold"],
        low=params["low_conf_threshold"],
        enough=params["eos_confidence_threshold"],
        expand_until=params["expand_eos_confidence_threshold"],
        check=params["eos_check_tokens"],
    )


def watched(model, monkeypatch) -> list[list[int]]:
    """A list that gets the lengths of all rows for every forward from then on."""
    seen, inner = [], model.run
    monkeypatch.setattr(
        model, "run", lambda s, *rest: (seen.append(s.mask.sum(1).tolist()), inner(s, *rest))[1]
    )
    return seen


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rollout_is_that_of_daedal(case: dict, synthetic, monkeypatch) -> None:
    params, output, model = case["params"], case["output"], synthetic(case["model"])
    seen, prompt = watched(model, monkeypatch), torch.tensor([case["prompt"]])
    got = decode(model, prompt, params["initial_gen_length"], [strategy(params)])
    assert got.tokens.tolist() == [output["sequence"]]
    assert got.nfe == output["nfe"]
    assert [row for (row,) in seen] == output["input_lengths"]


def test_the_cases_grow_in_both_phases() -> None:
    appended = [c for c in CASES if c["output"]["input_lengths"][1] > 14]
    put_in = [c for c in CASES if len(set(c["output"]["input_lengths"][-3:])) > 1]
    assert len(appended) > 3
    assert len(put_in) > 3


@pytest.mark.parametrize("more", [[], [EndOfText()], [PrefixLM()]])
@pytest.mark.parametrize("number", [1, 7, 14, 19])
def test_rows_of_a_batch_find_the_lengths_they_find_alone(
    number: int, more: list, synthetic
) -> None:
    case = CASES[number]
    model, chosen = synthetic(case["model"]), [strategy(case["params"]), *more]
    length = case["params"]["initial_gen_length"]
    tokens = torch.randint(1, 14, (6, 7), generator=torch.Generator().manual_seed(number))
    sizes = (7, 4, 6, 5, 7, 3)
    mask = torch.stack([torch.arange(7) >= 7 - size for size in sizes])
    got = decode(model, tokens, length, chosen, mask=mask)
    found = []
    for i, size in enumerate(sizes):
        alone = decode(model, tokens[i : i + 1, -size:], length, chosen)
        answer, steps = alone.tokens[0, size:].tolist(), alone.history.step[0]
        rest = got.tokens.shape[1] - 7 - len(answer)
        assert got.tokens[i, 7:].tolist() == answer + [EOS] * rest
        assert ((got.history.step[i] >= 0).nonzero() == (steps >= 0).nonzero()).all()
        found.append(len(answer))
    assert len(set(found)) > 1  # otherwise the test shows nothing


def test_without_expansion_the_length_is_fixed_and_closed_by_end_tokens(synthetic) -> None:
    for case in CASES[:6]:
        model, prompt = synthetic(case["model"]), torch.tensor([case["prompt"]])
        kept = decode(
            model, prompt, 16, [DAEDAL(size=8, high=0.6, enough=0, expand_until=0, check=6)]
        )
        canvas = torch.tensor([[MASK] * 16 + [EOS] * 3])
        fixed = decode(model, prompt, 19, [Blocks(8), Dynamic(tau=0.6)], canvas=canvas)
        assert kept.tokens.equal(fixed.tokens)
        assert kept.nfe == fixed.nfe + 1
        low = decode(model, prompt, 16, [DAEDAL(size=8, high=0.6, enough=0, low=0, check=6)])
        assert low.tokens.equal(kept.tokens)


def test_no_answer_exceeds_its_limit_nor_loses_given_tokens(toy) -> None:
    prompt = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    canvas = torch.full((3, 8), 2)
    canvas[0, 7], canvas[1, 0] = 17, 23
    # The first phase appends up to 20; the second must leave the given tokens in place.
    for enough in (0.0, 1.0):
        chosen = [DAEDAL(growth=2.5, size=4, expansion=3, high=0.5, low=1.0, enough=enough)]
        got = decode(toy(), prompt, 8, chosen, canvas=canvas)
        assert got.tokens.shape[1] == 5 + 20
        assert not (got.tokens == 2).any()
        assert (got.tokens[0] == 17).any()
        assert got.tokens[1, 5] == 23


def test_the_context_is_a_limit_too(synthetic, monkeypatch) -> None:
    case = CASES[1]
    model = synthetic(case["model"])
    model.spec.context = model.spec.reach = 15
    refused = []
    monkeypatch.setattr(model.spec, "fits", lambda n: refused.append(n) if n > 15 else None)
    chosen = [DAEDAL(growth=9, size=8, enough=1.0, low=1.0)]
    tokens, mask = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]]), torch.ones(2, 4).bool()
    mask[1, :2] = False
    got = decode(model, tokens, 8, chosen, mask=mask)
    assert got.tokens.shape[1] == 4 + 13
    assert (got.history.step[0] >= 0).sum() <= 11
    assert refused == []


def test_models_and_caches_that_do_not_fit_are_refused(toy) -> None:
    prompt = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="DAEDAL requires full attention, but .* prefix attention"):
        decode(toy(attention="prefix"), prompt, 4, [DAEDAL()])
    with pytest.raises(ValueError, match="DAEDAL cannot be combined with DualCache"):
        decode(toy(), prompt, 4, [DAEDAL(), DualCache()])


@pytest.mark.parametrize("name", ["growth", "size", "expansion", "check"])
def test_sizes_of_daedal_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"DAEDAL.{name} is 0, expected at least 1"):
        DAEDAL(**{name: 0})


@pytest.mark.parametrize("name", ["high", "low", "enough", "expand_until"])
def test_confidences_of_daedal_are_probabilities(name: str) -> None:
    with pytest.raises(ValueError, match=f"DAEDAL.{name} is -1, expected at least 0 and at most 1"):
        DAEDAL(**{name: -1})


def test_rows_of_a_batch_draw_the_same_numbers_as_alone(toy, prompts, seeds) -> None:
    model, (tokens, mask) = toy(), prompts(7, 4, 6, 5)
    chosen = [DAEDAL(growth=3, size=4, expansion=2, enough=0.1, high=0.3, check=3), Gumbel(1.0)]
    batch = decode(model, tokens, 6, chosen, mask=mask, generator=seeds(0, 1, 2, 3))
    for i, size in enumerate((7, 4, 6, 5)):
        alone = decode(model, tokens[i : i + 1, -size:], 6, chosen, generator=seeds(i))
        answer = alone.tokens[0, size:]
        assert batch.tokens[i, 7 : 7 + len(answer)].equal(answer)
