"""The option `prune`: what names it takes, and what a model does with it."""

import numpy as np
import pytest
import torch

import mmdlm
from adapters.image_codes import CodeTokens
from adapters.prune_divprune import DivPrune
from adapters.prune_visionzip import VisionZip
from mmdlm.data.scenes import draw, random_scene
from mmdlm.decoding.decode import decode
from mmdlm.decoding.guidance.cfg import CFG
from mmdlm.decoding.pruning.option import RANKS, apply, methods, read
from mmdlm.decoding.pruning.prune_media import PruneMedia
from mmdlm.messages import Example, Media, user


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ("divprune@0.25", DivPrune(0.25)),
        ("divprune@25%", DivPrune(0.25)),
        ("VisionZip@64", VisionZip(64)),
        ("divprune", DivPrune()),
        ("attention@0.35", PruneMedia(0.35)),
        ("raters@10", PruneMedia(10, rank="raters")),
        (
            "{rank: attention, layer: 16, step: 1, keep: 0.35}",
            PruneMedia(0.35, layer=16, step=1),
        ),
        ({"keep": [0.5, 0.2], "step": [0, 4]}, PruneMedia((0.5, 0.2), step=(0, 4))),
        (
            {
                "class_path": "adapters.prune_visionzip.VisionZip",
                "init_args": {"keep": 8, "contextual": 0.5},
            },
            VisionZip(8, contextual=0.5),
        ),
        (DivPrune(3), DivPrune(3)),
        (None, None),
    ],
)
def test_names_and_tables_are_read(given, method):
    assert read(given) == method


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("divprun@0.5", "expected METHOD@KEEP with one of divprune, pooling"),
        ("divprune@half", "expected a share such as 0.25 or 25%"),
        ("divprune@1.5", "keep is 1.5, expected a share"),
        ("{rank: attention", "is not a YAML table"),
        ({"layers": 3}, "layers"),
        ({"class_path": "os.system"}, "outside"),
    ],
)
def test_what_cannot_be_read_is_named(given, error):
    with pytest.raises(ValueError, match=error):
        read(given)


def picture(seed):
    return draw(random_scene(np.random.default_rng(seed), 2), 64)


# The adapter of `tiny` needs a grid, which tome_tower does not leave (test_tome_tower.py).
@pytest.mark.parametrize("method", [name for name in methods() if name != "tome_tower"])
def test_every_method_prunes_alike_alone_and_in_a_batch(method):
    inside = {"rank": method, "layer": 2, "keep": 0.25}
    given = inside if method in RANKS else f"{method}@0.25"
    model, options = mmdlm.load("tiny", prune=given), {"seed": 0, "details": True}
    pictures = [picture(i) for i in range(3)]
    together = mmdlm.caption(model, pictures, **options)
    alone = [mmdlm.caption(model, one, **options) for one in pictures]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    whole = mmdlm.caption(mmdlm.load("tiny"), pictures, **options)
    pairs = zip(together, whole, strict=True)
    assert any(a.confidence != pytest.approx(b.confidence) for a, b in pairs)


@pytest.mark.parametrize(("renumber", "last"), [(True, 7), (False, 16)])
def test_kept_tokens_keep_their_positions_unless_renumbered(renumber, last):
    model = mmdlm.load("tiny")
    apply(model, DivPrune(0.5, renumber=renumber))
    packed = model.processor.pack([Example((user(Media("image", picture(0)), "what ?"),))])
    sequence = model.embed(packed.prompts)
    media = sequence.positions[sequence.is_medium]
    assert len(media) == 8
    text = sequence.positions[~sequence.is_medium]
    assert int(text.min()) == last + (1 if renumber else 0)
    assert (media.tolist() == list(range(8))) == renumber


def test_all_tokens_are_those_without_the_option():
    model, plain = mmdlm.load("tiny", prune="divprune@1.0"), mmdlm.load("tiny")
    pictures = [picture(i) for i in range(2)]
    assert mmdlm.caption(model, pictures) == mmdlm.caption(plain, pictures)


def test_models_that_read_images_as_codes_refuse_it(build):
    model = build()
    model.adapters["image"] = CodeTokens()
    with pytest.raises(ValueError, match="as the token ids of an image tokenizer"):
        apply(model, "attention@0.5")


def test_models_without_images_refuse_it(speller):
    with pytest.raises(ValueError, match="takes text only, not image"):
        apply(speller(), "divprune@0.5")


def test_guided_answers_about_images_are_pruned_alike_alone_and_in_a_batch():
    model, pictures = mmdlm.load("tiny"), [picture(i) for i in range(3)]
    chosen = [CFG(1.0, image=1.0), PruneMedia(0.5, layer=2)]

    def laid(parts):
        return model.embed(model.processor.pack([Example((user(*one),)) for one in parts]).prompts)

    def answers(images, strategies):
        media = [Media("image", one) for one in images]
        prompts = {"": [(one, "what colour is the circle ?") for one in media]}
        prompts |= {"text": [(one, "?") for one in media], "image": [("what ?",)] * len(media)}
        prompt, *others = (laid(parts) for parts in prompts.values())
        given = dict(zip(("text", "image"), others, strict=True))
        found = decode(model, prompt, 8, strategies, alternatives=given)
        return found.tokens[:, -8:].tolist(), found.history.confidence

    together, confidence = answers(pictures, chosen)
    assert together == [answers([one], chosen)[0][0] for one in pictures]
    plain, sure = answers(pictures, chosen[:1])
    assert not torch.allclose(confidence, sure, atol=1e-3)
    whole, all_of_it = answers(pictures, [chosen[0], PruneMedia(1.0, layer=2)])
    assert whole == plain
    assert torch.allclose(all_of_it, sure, atol=1e-5)
