from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmdlm.backbones.kv import KV, Pass
from mmdlm.backbones.rotary import rotate
from mmdlm.decoding.caches.elastic_cache import Elastic, ElasticCache
from mmdlm.decoding.commits.threshold import Threshold
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.lengths.end_of_text import EndOfText
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.preset import strategies
from mmdlm.decoding.refresh import Refresh
from mmdlm.decoding.session import Session
from mmdlm.decoding.strategy import Strategy
from mmdlm.decoding.view import View

MASK, LENGTH = 2, 12
KINDS = [{}, {"shift": True}, {"attention": "prefix"}, {"attention": "prefix", "shift": True}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)) or "full")


@dataclass(frozen=True)
class Sliding(ElasticCache):
    """The first masks, and everything recomputed."""

    def cache(self, view: View) -> KV | None:
        return None

    def refresh(self, view: View) -> Refresh:
        return Refresh(view.level >= 0, cached=False)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The first layer in which each row computed everything, for every pass."""
    seen: list[list[int]] = []
    inner = Elastic.enter

    def enter(self: Elastic, layer: int, now: Pass) -> Pass:
        if layer == 0:
            seen.append(self.since)
        else:
            seen[-1] = self.since
        return inner(self, layer, now)

    monkeypatch.setattr(Elastic, "enter", enter)
    return seen


def softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


class ByHand:
    """One row, layer by layer, with full attention matrices; nothing of `KV` is used."""

    def __init__(self, model, prompt: Tensor, window: int, gamma: float, track: int) -> None:
        self.model, self.window, self.gamma, self.track = model, window, gamma, track
        self.tokens = prompt.tolist() + [MASK] * LENGTH
        self.size, self.total = len(prompt), len(self.tokens)
        self.seen = torch.ones(self.total, self.total, dtype=torch.bool)
        if model.spec.attention == "prefix":
            self.seen[: self.size, self.size :] = False
        self.caches = [SimpleNamespace() for _ in model.backbone.blocks]
        self.tracked: list[int] = []
        self.written: list[int] = []
        self.since = 0

    def attention(self, attn, queries: Tensor, keys: Tensor, rows: list[int]) -> Tensor:
        """[H rows L] of queries [H rows hd] and keys [KV L hd]."""
        keys = keys.repeat_interleave(attn.heads // attn.kv_heads, 0)
        scores = queries @ keys.transpose(1, 2) / attn.head_dim**0.5
        return softmax(scores, self.seen[rows])

    def layer(self, i: int, block, x: Tensor, asked: list[int], masks: list[int]) -> Tensor:
        """States after a layer, of the asked rows or of all."""
        cache, attn, everything = self.caches[i], block.attn, list(range(self.total))
        rows = asked
        if i >= self.since:
            if i == self.since and len(x) < self.total:
                cache.x[asked] = x
                x = cache.x
            rows = everything
            cache.x = x.clone()
        else:
            cache.x[asked] = x
        q, k, v = (t[0] for t in attn.project(block.attn_norm(x)[None], None))
        cos, sin = (t[0] for t in self.model.backbone.rotary(torch.tensor([rows])))
        q, k = (rotate(t, cos, sin, attn.float32) for t in (q, k))
        past = None
        if i >= self.since:
            cache.q, cache.k, cache.v = q.clone(), k.clone(), v.clone()
        else:
            past = self.attention(attn, cache.q[:, self.tracked], cache.k, self.tracked)
            cache.q[:, rows], cache.k[:, rows], cache.v[:, rows] = q, k, v
        weights = self.attention(attn, q, cache.k, rows)
        values = cache.v.repeat_interleave(attn.heads // attn.kv_heads, 0)
        y = attn.o((weights @ values).transpose(0, 1).flatten(1))
        if past is not None:
            now = weights[:, [rows.index(p) for p in self.tracked]]
            alike = []
            for t, p in enumerate(self.tracked):
                for key in range(self.total):
                    if self.seen[p, key]:
                        one, two = past[:, t, key].tolist(), now[:, t, key].tolist()
                        dot = sum(a * b for a, b in zip(one, two, strict=True))
                        norms = sum(a * a for a in one) * sum(b * b for b in two)
                        alike.append(dot / norms**0.5)
            if sum(alike) / len(alike) < self.gamma:
                self.since = i + 1
        mass = weights[:, [rows.index(p) for p in masks]].sum((0, 1)).tolist()
        known = [p for p in range(self.total) if self.tokens[p] != MASK]
        self.next |= set(sorted(known, key=lambda p: -mass[p])[: self.track])
        x = x + y
        return x + block.mlp(block.mlp_norm(x))

    def step(self, tau: float) -> None:
        backbone, shift = self.model.backbone, int(self.model.spec.shift)
        masks = [p for p in range(self.total) if self.tokens[p] == MASK][: self.window]
        asked = list(range(self.total))
        self.since = 0
        if self.tracked:
            asked = sorted({*self.tracked, *self.written, *masks, *(p - shift for p in masks)})
            self.since = len(backbone.blocks)
        self.next: set[int] = set()
        x = backbone.tokens(torch.tensor([self.tokens])[:, asked])[0]
        for i, block in enumerate(backbone.blocks):
            x = self.layer(i, block, x, asked, masks)
        rows = asked if len(x) == len(asked) else list(range(self.total))
        logits = backbone.head(backbone.norm(x))[[rows.index(p - shift) for p in masks]]
        logits[:, MASK] = -torch.inf
        sure, best = logits.double().softmax(-1).max(-1)
        self.written = []
        for j, p in enumerate(masks):
            if sure[j] >= tau or j == int(sure.argmax()):
                self.tokens[p] = int(best[j])
                self.written.append(p)
        self.tracked = sorted(self.next)


@kinds
@pytest.mark.parametrize(("window", "gamma", "track"), [(4, 0.98, 1), (3, 0.9, 2), (12, 0.85, 1)])
def test_every_step_is_what_it_is_by_hand(kind, window, gamma, track, toy, prompts, layers) -> None:
    model = toy(**kind)
    for prompt in prompts(7, 7)[0]:
        layers.clear()
        hand, steps, since = ByHand(model, prompt, window, gamma, track), [-1] * LENGTH, []
        while MASK in hand.tokens:
            hand.step(0.3)
            for p in hand.written:
                steps[p - hand.size] = len(since)
            since.append([hand.since])
        chosen = [ElasticCache(window, gamma, track), Threshold(0.3)]
        got = decode(model, prompt[None], LENGTH, chosen)
        assert got.tokens[0].tolist() == hand.tokens
        assert got.history.step[0].tolist() == steps
        assert layers == since


def assert_same(one, two) -> None:
    assert one.tokens.equal(two.tokens)
    assert one.history.step.equal(two.history.step)
    torch.testing.assert_close(one.history.confidence, two.history.confidence)


@kinds
@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("more", [[], [Threshold(0.25), EndOfText()]])
def test_renewed_in_every_step_it_is_no_cache(kind, window, more, toy, run) -> None:
    model = toy(**kind)
    renewed = run(model, ElasticCache(window, gamma=1.5), *more)
    assert_same(renewed, run(model, Sliding(window), *more))


@kinds
def test_a_window_of_all_masks_renewed_in_every_step_is_the_plain_decode(kind, toy, run) -> None:
    assert_same(run(toy(**kind), ElasticCache(gamma=2)), run(toy(**kind)))


@pytest.mark.parametrize("gamma", [-1.0, 0.0])
def test_without_a_demand_nothing_is_renewed_after_the_first_pass(gamma, toy, run, layers) -> None:
    cached = run(toy(), ElasticCache(4, gamma))
    assert layers[0] == [0, 0, 0]
    assert len(layers) == cached.nfe == 8
    assert {s for row in layers[1:] for s in row} == {3}  # of three layers
    assert not cached.tokens.equal(run(toy(), Sliding(4)).tokens)  # it is an approximation


@kinds
@pytest.mark.parametrize("more", [[], [Threshold(0.25)]])
@pytest.mark.parametrize("gamma", [0.8, 0.95])
def test_four_unequal_prompts_decode_as_they_do_alone(
    kind, more, gamma, toy, prompts, layers
) -> None:
    model, sizes = toy(**kind), (9, 3, 6, 4)
    tokens, mask = prompts(*sizes)
    canvas = torch.full((4, LENGTH), MASK)
    canvas[1, :5], canvas[3, 7] = 21, 30  # windows in other places
    chosen = [ElasticCache(4, gamma), *more]
    batch = decode(model, tokens, LENGTH, chosen, mask=mask, canvas=canvas)
    together = list(layers)
    alone, passes = [], []
    for i, size in enumerate(sizes):
        layers.clear()
        row = tokens[i : i + 1, -size:]
        alone.append(decode(model, row, LENGTH, chosen, canvas=canvas[i : i + 1]))
        passes.append([row[0] for row in layers])
    for i, size in enumerate(sizes):
        assert batch.tokens[i, 9:].tolist() == alone[i].tokens[0, size:].tolist()
        assert batch.history.step[i].tolist() == alone[i].history.step[0].tolist()
        torch.testing.assert_close(batch.history.confidence[i], alone[i].history.confidence[0])
    assert list(batch.forwards) == [len(found) for found in passes]
    for step, since in enumerate(together):
        assert since == [found[step] for found in passes if step < len(found)]
    if not kind:
        # Rows drift in different layers, or not at all, of the same pass.
        assert max(len(Counter(since)) for since in together) > 1


@kinds
@pytest.mark.parametrize("gamma", [0.8, 0.95])
def test_rows_that_join_a_running_batch_drift_in_the_layers_in_which_they_drift_alone(
    kind, gamma, toy, prompts, layers
) -> None:
    """Longer and shorter prompts and answers than those of the rows that run."""
    model, chosen = toy(**kind), [ElasticCache(4, gamma), Threshold(0.25)]
    asked = [(prompts(6)[0][0], LENGTH), (prompts(9)[0][0], 15), (prompts(3)[0][0], 7)]

    def advance(session: Session) -> None:
        """One step; notes in which layer each request computed everything."""
        keys = session.keys
        before = len(layers)
        session.advance()
        if len(layers) > before:
            for key, since in zip(keys, layers[-1], strict=True):
                passes[key].append(since)

    alone = []
    for prompt, length in asked:
        session, passes = Session(model, chosen), {0: []}
        session.add(prompt, length)
        while session.keys:
            advance(session)
        alone.append((*session.finished(), passes[0]))
    session, passes = Session(model, chosen), {key: [] for key in range(3)}
    for prompt, length in asked:
        session.add(prompt, length)
        advance(session)
        advance(session)
    while session.keys:
        advance(session)
    for got in session.finished():
        want, since = alone[got.key]
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.step.tolist() == want.step.tolist()
        assert got.forwards == want.forwards
        torch.testing.assert_close(got.confidence, want.confidence)
        assert passes[got.key] == since
    assert any(0 < since < 3 for *_, found in alone for since in found)


def test_only_the_first_masks_commit(toy, run) -> None:
    for strategy in (ElasticCache(3, 0.99), ElasticCache(3, 2.0)):
        got = run(toy(), strategy, Threshold(0.1))
        for steps in got.history.step.tolist():
            for step in range(max(steps) + 1):
                left = [i for i, s in enumerate(steps) if s >= step]
                assert {i for i in left if steps[i] == step} <= set(left[:3])


def test_a_number_of_steps_is_that_of_the_whole_answer(toy, run) -> None:
    got = run(toy(), ElasticCache(4, 0.99), TopK(4))
    assert got.nfe == 4
    assert got.history.step[0].bincount().tolist() == [2, 2, 2, 2]


def test_tokens_taken_back_are_computed_again(toy, run, watch) -> None:
    @dataclass(frozen=True)
    class Undo(Strategy):
        """Makes all that is written by the sixth step masks again."""

        def revise(self, view: View) -> Tensor:
            return (view.step == 5)[:, None].expand(view.tokens.shape)

    forwards = watch(toy())
    got = run(toy(), ElasticCache(2, -1.0), Undo())
    assert len(forwards) == 14
    first_six = forwards[5].tokens != MASK
    for i in range(3):
        written = first_six[i].nonzero()[:, 0].tolist()
        assert len([p for p in written if p >= 7]) == 5
        assert {p for p in written if p >= 7} <= set(forwards[6].rows[i].tolist())
    assert not (got.tokens[:, 7:] == MASK).any()


def test_the_preset_is_the_published_one(toy, run) -> None:
    assert strategies("elastic") == [ElasticCache(16, 0.9, 1), Threshold(0.9), EndOfText()]
    assert run(toy(), *strategies("elastic")).nfe <= 8


def test_what_cannot_work_is_refused(toy, run) -> None:
    for kind in (
        {"attention": "block_causal", "block_size": 4},
        {"attention": "block_causal", "block_size": 1, "shift": True},
        {"attention": "cascade", "block_size": 4},
    ):
        with pytest.raises(
            ValueError, match="ElasticCache requires an answer that can be filled in any"
        ):
            run(toy(**kind), ElasticCache())
    with pytest.raises(ValueError, match="ElasticCache cannot be combined with CFG"):
        run(toy(), ElasticCache(), CFG())
    with pytest.raises(ValueError, match="both decide 'plan'"):
        run(toy(), ElasticCache(), Blocks(4))
    for given in ({"window": 0}, {"gamma": float("nan")}, {"track": 0}):
        with pytest.raises(ValueError, match=f"ElasticCache.{next(iter(given))} is"):
            ElasticCache(**given)
