"""Guidance by alternative prompts: their logits, other lengths, rows that join and leave."""

import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.random_top_k import RandomTopK
from mmdlm.decoding.commits.uniform_canvas import UniformCanvas
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.lengths.daedal import DAEDAL
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.session import Finished, Session

MASK = 2
SHORT, LONG = torch.tensor([[9, 4]]), torch.tensor([[9, 4, 33, 21, 7, 12, 18]])
PROMPT = torch.tensor([[3, 4, 5, 6]])


def by_hand(model, prompt, others: dict, scales: dict, length: int) -> torch.Tensor:
    """The most probable position commits at each step, without any of the loop's machinery."""
    answer = torch.full((1, length), MASK)
    for _ in range(length):
        logits = model.logits(torch.cat([prompt, answer], 1))[:, prompt.shape[1] :]
        guided = logits.clone()
        for name, other in others.items():
            without = model.logits(torch.cat([other, answer], 1))[:, other.shape[1] :]
            guided = guided + scales[name] * (logits - without)
        guided[..., MASK] = -torch.inf
        p, best = guided.softmax(-1).max(-1)
        at = p.masked_fill(answer != MASK, -1).argmax(1)
        answer[0, at] = best[0, at]
    return answer


@pytest.mark.parametrize(
    "others", [{"text": SHORT}, {"text": LONG}, {"text": SHORT, "image": LONG}]
)
@pytest.mark.parametrize("shift", [False, True])
def test_guidance_equals_separate_forwards(toy, others, shift) -> None:
    model, scales = toy(shift=shift), {"text": 1.5, "image": 0.75}
    chosen = [CFG(1.5, 0.75 if "image" in others else 0.0)]
    found = decode(model, PROMPT, 6, chosen, alternatives=others)
    assert torch.equal(found.tokens[:, -6:], by_hand(model, PROMPT, others, scales, 6))
    assert found.nfe == 6 * (1 + len(others))
    assert found.forwards == (found.nfe,)


def test_caches_and_guidance_by_a_prompt_go_together(toy) -> None:
    cached = [CFG(1.0), Blocks(3), DualCache()]
    found = decode(toy(), PROMPT, 6, cached, alternatives={"text": LONG})
    assert not bool((found.tokens == MASK).any())


@pytest.mark.parametrize(
    "strategies",
    [
        [Blocks(3), DualCache()],
        [UniformCanvas(steps=6)],
        [PrefixLM(), DAEDAL(high=0.3, expansion=2, check=3)],
    ],
    ids=["caches", "random tokens", "another length"],
)
def test_guidance_by_the_prompt_itself_changes_nothing(toy, seeds, strategies) -> None:
    plain = decode(toy(), PROMPT, 6, strategies, generator=seeds(1))
    given = {"generator": seeds(1), "alternatives": {"text": PROMPT}}
    same = decode(toy(), PROMPT, 6, [CFG(1.0), *strategies], **given)
    assert torch.equal(same.tokens, plain.tokens)
    assert torch.equal(same.history.step, plain.history.step)
    assert same.nfe == 2 * plain.nfe


def test_a_request_that_joins_gets_what_it_gets_alone(toy) -> None:
    model, chosen = toy(), [CFG(2.0), RandomTopK(7)]

    def add(session: Session, prompt: torch.Tensor, other: torch.Tensor, seed: int) -> int:
        given = torch.Generator().manual_seed(seed)
        (key,) = session.add_rows(prompt, 8, generator=given, alternatives={"text": other})
        return key

    def run(session: Session, found: dict) -> None:
        events = session.step()
        found |= {e.key: e.tokens.tolist() for e in events if isinstance(e, Finished)}

    alone = {}
    for seed, (prompt, other) in enumerate([(PROMPT, SHORT), (LONG, PROMPT)]):
        session, found = Session(model, chosen), {}
        key = add(session, prompt, other, seed)
        while session.keys:
            run(session, found)
        alone[seed] = found[key]
    session, found = Session(model, chosen), {}
    first = add(session, PROMPT, SHORT, 0)
    run(session, found)
    run(session, found)
    second = add(session, LONG, PROMPT, 1)
    while session.keys:
        run(session, found)
    assert [found[first], found[second]] == [alone[0], alone[1]]


def test_prompts_that_do_not_fit_are_refused(toy) -> None:
    with pytest.raises(ValueError, match="has 2 rows, expected 1"):
        decode(toy(), PROMPT, 4, alternatives={"text": SHORT.repeat(2, 1)})
    with pytest.raises(ValueError, match='CFG reads "text"'):
        decode(toy(), PROMPT, 4, [CFG()], alternatives={"txt": SHORT})
    with pytest.raises(ValueError, match="CFG.image is above 0"):
        decode(toy(), PROMPT, 4, [CFG(1.0, 2.0)], alternatives={"text": SHORT})
    session = Session(toy(), [CFG()])
    session.add_rows(PROMPT, 4, alternatives={"text": SHORT})
    session.step()
    session.add_rows(PROMPT, 4)
    with pytest.raises(ValueError, match="all requests of a session need the same ones"):
        session.step()
