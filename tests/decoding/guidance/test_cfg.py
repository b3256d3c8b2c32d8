import pytest
import torch

from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.layout import Row, arrange

PROMPT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = 2


def test_logits_move_away_from_those_without_the_prompt(toy, watch, monkeypatch) -> None:
    model = toy()
    forwards, guided = watch(model), []
    inner = CFG.guide
    monkeypatch.setattr(
        CFG, "guide", lambda self, *given: guided.append(inner(self, *given)) or guided[-1]
    )
    got = decode(model, PROMPT, 4, [CFG(1.5)])
    assert got.nfe == len(forwards) == 8
    assert got.history.step.max() == 3
    for own, without, result in zip(forwards[::2], forwards[1::2], guided, strict=True):
        blank = own.tokens.clone()
        blank[:, :4] = MASK
        assert without.tokens.equal(blank)
        triples = zip(
            *(t.flatten().tolist() for t in (own.logits, without.logits, result)), strict=True
        )
        for c, u, z in triples:
            if z > -torch.inf:
                assert z == pytest.approx(u + 2.5 * (c - u), abs=1e-4)


def test_scale_zero_is_no_guidance(toy) -> None:
    plain, guided = decode(toy(), PROMPT, 6), decode(toy(), PROMPT, 6, [CFG(0.0)])
    assert guided.tokens.equal(plain.tokens)
    assert guided.nfe == plain.nfe


def test_media_stay_where_they_are(toy, watch) -> None:
    forwards = watch(toy())
    image = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompt = arrange([Row((image, torch.tensor([5, 6])))], pad=0)
    decode(toy(), prompt, 2, [CFG()])
    assert forwards[1].tokens[0, :5].tolist() == [0, 0, 0, MASK, MASK]


@pytest.mark.parametrize("cache", [[], [Blocks(1), DualCache()]])
def test_each_branch_has_keys_of_its_own(cache: list, toy, watch) -> None:
    model = toy() if cache else toy(attention="prefix")
    forwards = watch(model)
    got = decode(model, PROMPT, 5, [CFG(2.0), *cache])
    assert all(f.cached for f in forwards)
    for without in forwards[1::2]:
        # A prompt of masks from the start, with nothing kept.
        want = model.logits(without.tokens, attention="full")
        if model.spec.attention == "prefix":
            seen = torch.ones(9, 9, dtype=torch.bool)
            seen[:4, 4:] = False
            want = model.logits(without.tokens, seen.expand(2, -1, -1), attention="full")
        want = without.scored(want)
        want[..., MASK] = without.logits[..., MASK]
        torch.testing.assert_close(without.logits, want)
    assert got.nfe == 10


def test_scale_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="CFG.scale is -1, expected at least 0"):
        CFG(-1)
