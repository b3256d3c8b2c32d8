"""The naming loss against slow oracles, and how it combines with the main objective."""

import math

import numpy as np
import pytest
import torch

from adapters.pixel_shuffle import PixelShuffle
from encoders.vit import ViT
from mmdlm.backbones.config import TransformerConfig
from mmdlm.backbones.family import Spec
from mmdlm.data import collate
from mmdlm.data.scenes import Scenes
from mmdlm.layout import Row, Turn
from mmdlm.model import MultimodalDLM
from mmdlm.objectives.grounded import Grounded, groups
from mmdlm.objectives.masked import Masked
from mmdlm.objectives.objective import Batch
from mmdlm.text import Tokenizer

WIDTH, VOCAB, PAD = 16, 12, 0


def small():
    config = TransformerConfig(vocab=VOCAB, width=WIDTH, layers=2, heads=2, inner=32)
    model = MultimodalDLM(
        Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=PAD, attention="cascade")
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def ids(*words):
    return torch.tensor(words, dtype=torch.long)


def batch_of(model, names, **media):
    """One row per media item, followed by a question and its answer."""
    answered = Turn(ids(3, 4), ids(6, 7, 1))
    made = [Row(parts, (answered,)) for parts in zip(*media.values(), strict=True)]
    n = len(made)
    phase = (torch.arange(n).double() + 0.5) / n
    return Batch(model.arrange(made), torch.arange(n), phase, ("",) * n, media, names)


def leaves(*lengths):
    return [torch.randn(n, WIDTH, requires_grad=True) for n in lengths]


def chances(model, media):
    """Probability of each word at each token, plain floats [N][V]."""
    with torch.no_grad():
        return model.backbone.head(model.backbone.norm(media)).double().softmax(-1).tolist()


def chance_of_words(p, words):
    """Sum over all alignments of words and frames, blanks between (Graves et al. 2006).

    Args:
        p: probability of each word at each frame.
        words: ids; equal neighbours need a blank between them.
    """
    spread = [PAD]
    for word in words:
        spread += [word, PAD]
    before = [0.0] * len(spread)
    for frame, row in enumerate(p):
        now = []
        for s, word in enumerate(spread):
            ways = before[s] + (before[s - 1] if s >= 1 else 0.0)
            if s >= 2 and word not in (PAD, spread[s - 2]):
                ways += before[s - 2]
            if frame == 0:
                ways = 1.0 if s <= 1 else 0.0
            now.append(ways * row[word])
        before = now
    return sum(before[-2:])


def test_speech_loss_equals_a_slow_recursion():
    model, media = small(), leaves(9, 6, 4, 5)
    names = [ids(5, 5, 6), ids(7), ids(), ids(8, 9, 8, 9, 8)]  # as many words as frames at last
    losses = Grounded().step(model, batch_of(model, names, audio=media))
    want = [
        -math.log(chance_of_words(chances(model, x), words.tolist()))
        for x, words in zip(media, names, strict=True)
    ]
    assert losses.sum.item() == pytest.approx(sum(want), rel=1e-5)
    assert losses.count.item() == 9
    assert losses.logs["naming"][0].item() == losses.sum.item()
    losses.sum.backward()
    assert all(bool(x.grad.isfinite().all()) and x.grad.abs().sum() > 0 for x in media)


def test_clip_too_short_for_its_words_gives_no_gradient():
    model, media = small(), leaves(2, 5)
    names = [ids(5, 5), ids(6)]  # CTC needs a blank between equal words
    assert chance_of_words(chances(model, media[0]), [5, 5]) == 0
    losses = Grounded().step(model, batch_of(model, names, audio=media))
    want = -math.log(chance_of_words(chances(model, media[1]), [6]))
    assert losses.sum.item() == pytest.approx(want, rel=1e-5)
    losses.sum.backward()
    assert (media[0].grad == 0).all()


def test_image_loss_equals_a_plain_loop():
    model, media = small(), leaves(4, 4)
    names = [[ids(5, 6, 7), ids(), ids(), ids(8)], [ids(), ids(5, 9), ids(5), ids()]]
    losses = Grounded().step(model, batch_of(model, names, image=media))
    want = 0.0
    for image, cells in zip(media, names, strict=True):
        for row, words in zip(chances(model, image), cells, strict=True):
            shown = words.tolist() or [PAD]
            want += sum(-math.log(row[word]) for word in shown) / len(shown)
    assert losses.sum.item() == pytest.approx(want, rel=1e-5)
    assert losses.count.item() == 8


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize(("chunk", "parts"), [(1, 4), (8, 2), (9, 2), (16, 1)])
def test_chunks_change_neither_loss_nor_gradients(kind, chunk, parts, monkeypatch):
    model, media = small(), leaves(4, 4, 4, 4)
    names = [[ids(5, 6), ids(), ids(8), ids(9)]] * 4 if kind == "image" else [ids(5, 6)] * 4
    batch = batch_of(model, names, **{kind: media})
    assert len(groups(media, names, chunk)) == parts
    outcomes = []
    for objective in (Grounded(), Grounded(chunk=chunk)):
        model.zero_grad()
        for x in media:
            x.grad = None
        losses = objective.step(model, batch)
        losses.sum.backward()
        weights = [model.backbone.norm.weight, model.backbone.out.weight]
        outcomes.append((losses.sum, losses.count, [x.grad.clone() for x in [*media, *weights]]))
    (want, count, gradients), (found, found_count, found_gradients) = outcomes
    torch.testing.assert_close(found, want)
    assert found_count == count
    for a, b in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rows, head = [], model.backbone.head
    monkeypatch.setattr(model.backbone, "head", lambda x: rows.append(len(x)) or head(x))
    Grounded(chunk=chunk).step(model, batch).sum.backward()
    # Each chunk is computed again in the backward pass.
    assert len(rows) == (4 if parts == 1 else 8)


def test_groups_are_filled_in_order():
    media = leaves(3, 2, 9, 1)
    found = groups(media, ["a", "b", "c", "d"], 5)
    assert [names for _, names in found] == [["a", "b"], ["c"], ["d"]]
    assert [[len(x) for x in part] for part, _ in found] == [[3, 2], [9], [1]]
    # Two samples with two images each.
    assert groups(media, ["a", "b"], 5) == [(media, ["a", "b"])]


def test_media_without_names_are_not_scored():
    model, media, state = small(), leaves(3, 3), leaves(1, 1)
    names = [[ids(5), ids(), ids(6, 7)]] * 2
    alone = Grounded().step(model, batch_of(model, names, image=media))
    both = Grounded().step(model, batch_of(model, names, image=media, state=state))
    assert both.sum.item() == alone.sum.item()
    assert both.count.item() == 6


def test_training_encoders_alone_skips_the_backbone(monkeypatch):
    scenes = Scenes(size=32, cells=2, objects=(1,))
    tokenizer = Tokenizer.from_words(scenes.vocabulary())
    config = TransformerConfig(vocab=len(tokenizer), width=WIDTH, layers=2, heads=2, inner=32)
    spec = Spec("mmdlm", config, mask_id=2, eos_id=1, pad_id=0, attention="cascade")
    vit = ViT(size=32, patch=8, dim=16, depth=1, heads=2)
    model = MultimodalDLM(spec, {"image": vit}, {"image": PixelShuffle(16, WIDTH)}, tokenizer)
    samples = [scenes.sample(i, np.random.default_rng(i)) for i in range(3)]
    made = collate.collate(model.processor, samples, torch.arange(3), torch.zeros(3).double())
    batch = collate.batch(model, made)
    monkeypatch.setattr(model, "hidden", lambda sequence: pytest.fail("the backbone ran"))
    losses = Grounded(objective=None).step(model, batch)
    assert losses.count.item() == 3 * 4
    losses.sum.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not any(name.startswith("backbone.blocks.") for name in trained)
    towers = {n for n, _ in model.named_parameters() if n.startswith(("encoders.", "adapters."))}
    assert trained >= {"backbone.norm.weight", "backbone.out.weight"} | towers


def test_naming_loss_is_added_to_the_main_mean():
    model, media = small(), leaves(3, 3)
    batch = batch_of(model, [[ids(5), ids(), ids(6, 7)]] * 2, image=media)
    main, naming = Masked().step(model, batch), Grounded().step(model, batch)
    both = Grounded(objective=Masked(), weight=0.3).step(model, batch)
    want = main.sum / main.count + 0.3 * naming.sum / naming.count
    assert both.mean().item() == pytest.approx(want.item(), rel=1e-5)
    assert both.count == main.count
    assert set(both.logs) == {*main.logs, "naming"}
    assert both.logs["ce"] == main.logs["ce"]
    both.sum.backward()
    assert all(weight.grad is not None for weight in model.backbone.blocks.parameters())


def test_data_without_names_add_no_loss():
    model, media = small(), leaves(3, 3)
    batch = batch_of(model, [], image=media)
    main = Masked().step(model, batch)
    both = Grounded(objective=Masked(), weight=0.3).step(model, batch)
    assert both.sum.item() == main.sum.item()
    assert both.count == main.count
    assert both.logs["naming"][1] == 0  # training logs no mean of nothing


def test_loss_without_names_and_objective_is_zero_with_a_graph():
    model, media = small(), leaves(3, 3)
    losses = Grounded().step(model, batch_of(model, [], image=media))
    assert losses.mean().item() == 0
    losses.sum.backward()
    assert all((x.grad == 0).all() for x in media)


def test_names_of_another_grid_are_rejected():
    model = small()
    batch = batch_of(model, [[ids(5)] * 4], image=leaves(9))
    with pytest.raises(ValueError, match="names 4 tokens, the model has 9 .* data set's cells"):
        Grounded().step(model, batch)
