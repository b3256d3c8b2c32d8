"""Media tokens that leave a decode: slow references, caches, batches, settings."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmdlm.decoding.caches.dllm_cache import DLLMCache
from mmdlm.decoding.caches.dual_cache import DualCache
from mmdlm.decoding.caches.elastic_cache import ElasticCache
from mmdlm.decoding.caches.max_logit_cache import MaxLogitCache
from mmdlm.decoding.caches.prefix_cache import PrefixCache
from mmdlm.decoding.caches.prefix_lm import PrefixLM
from mmdlm.decoding.commits.top_k import TopK
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.plans.blocks import Blocks
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.decoding.session import Session
from mmdlm.layout import Row, Sparse, append_answer

LENGTH = 6


def row(seed: int, media: int = 9, before: int = 2, after: int = 3) -> Row:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 50, (before + after,), generator=generator)
    image = torch.randn(media, 32, generator=generator)
    return Row((text[:before], image, text[before:]))


def states(model, sequence, layers, gone=None, start=0):
    """States of all positions, layer by layer, and the attention of every layer; slowly.

    From layer `start` on, the positions `gone` [B L] are neither computed nor attended to.
    """
    x = model.backbone.tokens(sequence.tokens)
    if sequence.media is not None:
        x = x.masked_scatter(sequence.is_medium[..., None], sequence.media)
    cos_sin = model.backbone.rotary(sequence.positions)
    seen = sequence.visible()
    if seen is None:
        seen = torch.ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
    weights = []
    for i, block in enumerate(model.backbone.blocks[:layers]):
        allowed = seen if gone is None or i < start else seen & ~gone[:, None]
        q, k, v = block.parts.qkv(block, x, (cos_sin, cos_sin), None)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights.append(scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1))
        y = (weights[-1] @ v).transpose(1, 2).flatten(2)
        x = block.parts.post_attention(block, x, y)
    return x, weights


def least_attended(model, sequence, masks, keep, layer) -> Tensor:
    """[B L] bool, media that the masks attend to least in the last of some layers."""
    _, weights = states(model, sequence, layer)
    mean = torch.stack([w[:, m].mean((0, 1)) for w, m in zip(weights[-1], masks, strict=True)])
    media = sequence.is_medium & sequence.mask
    out = torch.zeros_like(media)
    for i, (scores, held) in enumerate(zip(mean, media, strict=True)):
        at = held.nonzero()[:, 0]
        order = scores[at].argsort(descending=True)
        out[i, at[order[round(keep * len(at)) :]]] = True
    return out


@pytest.mark.parametrize("layer", [1, 2, None])
@pytest.mark.parametrize("shift", [False, True])
def test_a_step_and_those_after_it_equal_a_slow_reference(toy, layer, shift):
    model = toy(attention="full", shift=shift)
    prompt = model.arrange([row(0)])
    mask_id = model.spec.mask_id
    answer = torch.full((1, LENGTH), mask_id)
    whole = append_answer(model.spec, prompt, answer)
    masks = whole.tokens == mask_id
    gone = least_attended(model, whole, masks, 0.5, layer or 3)
    x, _ = states(model, whole, 3, gone, start=layer or 3)
    logits = model.backbone.head(model.backbone.norm(x))[0]
    logits[:, mask_id] = -torch.inf
    logits = logits[-LENGTH - 1 : -1] if shift else logits[-LENGTH:]
    sure = logits.log_softmax(-1).amax(-1)
    first = int(sure.argmax())
    answer[0, first] = logits[first].argmax()
    # From then on: as a decode of a prompt that has the kept media only, in their places.
    part = row(0).parts
    places = (~gone[0, 2:11]).nonzero()[:, 0]
    kept = Row((part[0], Sparse(part[1][places], places, 9), part[2]))
    rest = decode(model, model.arrange([kept]), LENGTH, canvas=answer)
    found = decode(model, prompt, LENGTH, [PruneMedia(keep=0.5, layer=layer)])
    assert found.tokens[:, -LENGTH:].tolist() == rest.tokens[:, -LENGTH:].tolist()
    assert int(found.history.step[0, first]) == 0
    assert found.nfe == LENGTH


@pytest.mark.parametrize(
    "strategies",
    [(), (PrefixLM(),), (PrefixCache(), Blocks(3)), (DualCache(), Blocks(3)), (CFG(scale=0.5),)],
    ids=["plain", "prefix-lm", "prefix", "dual", "cfg"],
)
def test_keeping_all_changes_nothing(toy, strategies):
    model = toy(attention="full")
    prompt = model.arrange([row(1), row(2, media=4)])
    plain = decode(model, prompt, LENGTH, strategies)
    pruned = decode(model, prompt, LENGTH, [*strategies, PruneMedia(keep=1.0, layer=2)])
    assert torch.equal(plain.tokens, pruned.tokens)
    assert torch.allclose(plain.history.confidence, pruned.history.confidence, atol=1e-5)


@pytest.mark.parametrize("rank", ["attention", "raters", "random"])
@pytest.mark.parametrize("layer", [2, None])
@pytest.mark.parametrize("attention", ["full", "prefix", "cascade"])
def test_rows_of_a_batch_equal_rows_alone(toy, attention, layer, rank):
    model = toy(attention=attention)
    rows = [row(1), row(2, media=4, after=6), row(3, media=1), Row((torch.tensor([5, 6]),))]
    strategies = [PruneMedia(keep=0.4, layer=layer, rank=rank), TopK(steps=3)]
    seeds = [torch.Generator().manual_seed(7) for _ in rows]
    together = decode(model, model.arrange(rows), LENGTH, strategies, generator=seeds)
    for i, one in enumerate(rows):
        seed = [torch.Generator().manual_seed(7)]
        alone = decode(model, model.arrange([one]), LENGTH, strategies, generator=seed)
        assert together.tokens[i, -LENGTH:].tolist() == alone.tokens[0, -LENGTH:].tolist()


def test_the_prompt_stays_as_it_was_cached(toy):
    model = toy(attention="prefix")
    prompt = model.arrange([row(1)])
    mask_id, step = model.spec.mask_id, 2
    answer, gone = torch.full((1, LENGTH), mask_id), None
    for now in range(LENGTH):
        sequence = append_answer(model.spec, prompt, answer)
        if now == step:
            leaving = least_attended(model, sequence, sequence.tokens == mask_id, 0.4, 3)
        x = slow_prefix(model, sequence, gone)
        if now == step:
            gone = leaving
        logits = model.backbone.head(model.backbone.norm(x))[0, -LENGTH:]
        logits[:, mask_id] = -torch.inf
        sure = logits.log_softmax(-1).amax(-1).masked_fill(answer[0] != mask_id, -torch.inf)
        at = int(sure.argmax())
        answer[0, at] = logits[at].argmax()
    found = decode(model, prompt, LENGTH, [PruneMedia(keep=0.4, step=step)])
    assert found.tokens[:, -LENGTH:].tolist() == answer.tolist()


def slow_prefix(model, sequence, gone):
    """States where answers do not attend to what is gone, and the prompt does as before."""
    seen = sequence.visible()
    if gone is not None:
        seen = seen & ~(gone[:, None] & sequence.is_answer[..., None])
    x = model.backbone.tokens(sequence.tokens)
    x = x.masked_scatter(sequence.is_medium[..., None], sequence.media)
    turn = model.backbone.rotary(sequence.positions)
    for block in model.backbone.blocks:
        x = block(x, (turn, turn), seen[:, None], None, None)
    return x


def test_tokens_leave_in_stages(toy, monkeypatch):
    from mmdlm.decoding import loop

    model, sizes = toy(attention="prefix"), []
    inner = loop.forward.run

    def run(state, *given):
        sizes.append(int((state.sequence.is_medium & state.sequence.mask).sum()))
        return inner(state, *given)

    monkeypatch.setattr(loop.forward, "run", run)
    strategy = PruneMedia(keep=(0.7, 4, 0.2), step=(0, 2, 4))
    decode(model, model.arrange([row(1, media=10)]), LENGTH, [strategy])
    assert sizes == [10, 7, 7, 4, 4, 2]


def test_layers_of_one_step_prune_one_after_another(toy, watch):
    model = toy(attention="full")
    prompt = model.arrange([row(4, media=10)])
    both = decode(model, prompt, LENGTH, [PruneMedia(keep=(0.6, 0.3), layer=(1, 2))])
    late = decode(model, prompt, LENGTH, [PruneMedia(keep=0.3, layer=2)])
    early = decode(model, prompt, LENGTH, [PruneMedia(keep=0.3, layer=1)])
    found = [d.tokens[0, -LENGTH:].tolist() for d in (both, late, early)]
    assert all(one != other for one, other in itertools.combinations(found, 2))


def test_requests_that_join_later_get_what_they_get_alone(toy):
    model = toy(attention="prefix")
    prompts = [model.arrange([row(i, media=3 + 2 * i)]) for i in range(3)]
    strategies = [PruneMedia(keep=0.5, layer=2, step=1)]
    session, done, keys = Session(model, strategies), {}, []
    for prompt in prompts:
        keys.append(session.add(prompt, LENGTH))
        done |= {e.key: e.tokens for e in session.step() if hasattr(e, "forwards")}
    while session.keys:
        done |= {e.key: e.tokens for e in session.step() if hasattr(e, "forwards")}
    for key, prompt in zip(keys, prompts, strict=True):
        alone = decode(model, prompt, LENGTH, strategies).tokens[0, -LENGTH:]
        assert done[key].tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"keep": 1.5}, "keep is 1.5, expected a share"),
        ({"keep": 0.0}, "keep is 0.0, expected"),
        ({"keep": (0.5, 0.2), "step": (1, 2, 3)}, "lists of one length"),
        ({"keep": 0.5, "step": (2, 1)}, "not in ascending order"),
        ({"keep": 0.5, "layer": (2, 2)}, "repeat"),
        ({"rank": "raters", "step": 1}, "step 0 only"),
        ({"rank": "best"}, "rank is 'best'"),
    ],
)
def test_wrong_settings_are_named(given, error):
    with pytest.raises(ValueError, match=error):
        PruneMedia(**given)


def test_what_does_not_fit_is_refused(toy):
    model = toy(attention="full")
    prompt = model.arrange([row(0)])
    canvas = toy(attention="canvas", block_size=4)
    with pytest.raises(ValueError, match="PruneMedia requires masks in place of undecided"):
        Session(canvas, [PruneMedia()])
    with pytest.raises(ValueError, match="layer is 4, but the model has 3 layers"):
        decode(model, prompt, LENGTH, [PruneMedia(layer=4)])
    for cache in (ElasticCache(), DLLMCache(), MaxLogitCache()):
        with pytest.raises(ValueError, match=f"which {type(cache).__name__} rules out"):
            decode(model, prompt, LENGTH, [PruneMedia(), cache])


def guided_by_hand(model, prompts, scale, keep, layer, step, run):
    """A decode in which each prompt drops its own media; slowly, nothing cached.

    run(sequence, gone, start): states of the last layer without `gone` from layer `start` on.
    """
    mask_id = model.spec.mask_id
    answer, gone = torch.full((1, LENGTH), mask_id), [None] * len(prompts)
    for now in range(LENGTH):
        found = []
        for i, prompt in enumerate(prompts):
            sequence, start = append_answer(model.spec, prompt, answer), 0
            if now == step:
                masks = sequence.tokens == mask_id
                gone[i], start = least_attended(model, sequence, masks, keep, layer), layer
            x = run(sequence, gone[i], start)
            found.append(model.backbone.head(model.backbone.norm(x))[0, -LENGTH:])
        logits = found[0] + sum(scale * (found[0] - other) for other in found[1:])
        logits[:, mask_id] = -torch.inf
        sure = logits.log_softmax(-1).amax(-1).masked_fill(answer[0] != mask_id, -torch.inf)
        at = int(sure.argmax())
        answer[0, at] = logits[at].argmax()
    return answer[0].tolist()


@pytest.mark.parametrize(("layer", "step"), [(1, 0), (2, 0), (3, 2)])
@pytest.mark.parametrize("media", [4, 0])
def test_guidance_by_another_prompt_equals_both_prompts_by_hand(toy, media, layer, step):
    model = toy(attention="full")
    prompt, other = model.arrange([row(0)]), model.arrange([row(5, media=media, before=4)])
    strategies = [CFG(scale=1.5), PruneMedia(keep=0.4, layer=layer, step=step)]
    found = decode(model, prompt, LENGTH, strategies, alternatives={"text": other})

    def run(sequence, gone, start):
        return states(model, sequence, 3, gone, start)[0]

    wanted = guided_by_hand(model, [prompt, other], 1.5, 0.4, layer, step, run)
    assert found.tokens[0, -LENGTH:].tolist() == wanted
    assert found.nfe == 2 * LENGTH
    plain = decode(model, prompt, LENGTH, strategies[:1], alternatives={"text": other})
    assert found.tokens[0, -LENGTH:].tolist() != plain.tokens[0, -LENGTH:].tolist()


GUIDED = {
    "plain": [],
    "prefix-lm": [PrefixLM()],
    "prefix": [PrefixCache(), Blocks(3)],
    "dual": [DualCache(), Blocks(3)],
}


def guided_rows(model):
    """Three requests with two more prompts each, of other sizes and numbers of media."""
    rows = [row(1), row(2, media=4, after=6), Row((torch.tensor([5, 6]),))]
    texts = [row(1, after=1), Row((torch.tensor([7]),)), row(3, media=5)]
    images = [row(4, media=2, before=1), row(5, media=12), Row((torch.tensor([8, 9, 10]),))]
    return rows, texts, images


@pytest.mark.parametrize("rank", ["attention", "raters", "random"])
@pytest.mark.parametrize("strategies", GUIDED.values(), ids=GUIDED)
def test_guided_rows_of_a_batch_equal_rows_alone(toy, strategies, rank):
    model = toy(attention="full")
    rows, texts, images = guided_rows(model)
    pruning = PruneMedia(keep=0.5, layer=2, step=1 if rank == "attention" else 0, rank=rank)
    chosen = [CFG(1.0, image=0.5), pruning, *strategies]

    def run(at):
        given = {"text": texts, "image": images}
        return decode(
            model,
            model.arrange([rows[i] for i in at]),
            LENGTH,
            chosen,
            generator=[torch.Generator().manual_seed(7 + i) for i in at],
            alternatives={n: model.arrange([many[i] for i in at]) for n, many in given.items()},
        )

    together = run(range(3))
    for i in range(3):
        assert together.tokens[i, -LENGTH:].tolist() == run([i]).tokens[0, -LENGTH:].tolist()


@pytest.mark.parametrize("strategies", GUIDED.values(), ids=GUIDED)
def test_keeping_all_changes_nothing_with_other_prompts(toy, strategies):
    model = toy(attention="full")
    rows, texts, images = map(model.arrange, guided_rows(model))
    given = {"alternatives": {"text": texts, "image": images}}
    chosen = [CFG(1.0, image=0.5), *strategies]
    plain = decode(model, rows, LENGTH, chosen, **given)
    pruned = decode(model, rows, LENGTH, [*chosen, PruneMedia(keep=1.0, layer=2)], **given)
    assert torch.equal(plain.tokens, pruned.tokens)
    assert torch.allclose(plain.history.confidence, pruned.history.confidence, atol=1e-5)


def test_guidance_by_another_cached_prompt_equals_both_by_hand(toy):
    """Prompts that do not attend to the answer stay as they were before media left."""
    model = toy(attention="prefix")
    prompt, other = model.arrange([row(0)]), model.arrange([row(5, media=4, before=4)])
    strategies = [CFG(scale=1.5), PruneMedia(keep=0.4, step=2)]
    found = decode(model, prompt, LENGTH, strategies, alternatives={"text": other})

    def run(sequence, gone, start):
        return slow_prefix(model, sequence, gone if start == 0 else None)

    wanted = guided_by_hand(model, [prompt, other], 1.5, 0.4, 3, 2, run)
    assert found.tokens[0, -LENGTH:].tolist() == wanted


def test_guided_requests_that_join_later_get_what_they_get_alone(toy):
    model = toy(attention="full")
    strategies = [CFG(1.0, image=0.5), PruneMedia(keep=0.5, layer=2, step=1)]
    session, done, keys, alone = Session(model, strategies), {}, [], []
    for rows in zip(*guided_rows(model), strict=True):
        prompt, text, image = (model.arrange([one]) for one in rows)
        given = {"alternatives": {"text": text, "image": image}}
        alone.append(decode(model, prompt, LENGTH, strategies, **given).tokens[0, -LENGTH:])
        keys += session.add_rows(prompt, LENGTH, **given)
        for _ in range(2):
            done |= {e.key: e.tokens for e in session.step() if hasattr(e, "forwards")}
    while session.keys:
        done |= {e.key: e.tokens for e in session.step() if hasattr(e, "forwards")}
    assert [done[key].tolist() for key in keys] == [tokens.tolist() for tokens in alone]
