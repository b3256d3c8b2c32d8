import re
from collections import Counter

import numpy as np
import pytest

from mmdlm.data.scenes import (
    COLOURS,
    KINDS,
    NUMBERS,
    OPPOSITE,
    RADII,
    Scene,
    Scenes,
    Shape,
    describe,
    draw,
    questions,
    random_scene,
)

PHRASE = rf"a (small|large) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"


# Published scores and bundled weights refer to these scenes.
FIRST_CAPTIONS = [
    "a small yellow cross",
    "a large yellow star left of a large green circle",
    "a large purple cross left of a small blue square",
]


def shape(kind: str, colour: str, x: int, y: int, size: str = "small") -> Shape:
    return Shape(kind, colour, size, x, y, RADII[size][0])


def scenes_of(n: int, count: int, seed: int = 0) -> list[Scene]:
    return [random_scene(np.random.default_rng((seed, n, i)), n) for i in range(count)]


def footprint(scene: Scene, one: Shape, size: int = 64) -> np.ndarray:
    """Pixels that a shape covers, found by painting it in another colour: bool [Y X]."""
    alone = Scene((one,), (0, 0, 0), scene.grain)
    other_colour = "green" if one.colour != "green" else "red"
    painted = Shape(one.kind, other_colour, one.size, one.x, one.y, one.radius)
    return (draw(alone, size) != draw(Scene((painted,), (0, 0, 0), scene.grain), size)).any(-1)


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """Centre (x, y) of the box around a mask, in pixels."""
    ys, xs = np.nonzero(mask)
    return (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2


@pytest.mark.parametrize("n", [1, 2, 3])
def test_caption_agrees_with_the_pixels(n):
    for scene in scenes_of(n, 250):
        caption = describe(scene)
        found = [(m[2], m[3], m[1]) for m in re.finditer(PHRASE, caption)]
        assert sorted(found) == sorted((s.colour, s.kind, s.size) for s in scene.shapes)
        at = {s.kind: centroid(footprint(scene, s)) for s in scene.shapes}
        places = [at[kind] for _, kind, _ in found]
        if n == 1:
            assert re.fullmatch(PHRASE, caption)
        elif n == 2:
            (x0, y0), (x1, y1) = places
            relation = re.fullmatch(rf"{PHRASE} (left of|above) {PHRASE}", caption)[4]
            assert abs(abs(x1 - x0) - abs(y1 - y0)) >= 6  # 8 in centres; outlines are lopsided
            if relation == "left of":
                assert x1 - x0 > abs(y1 - y0)
            else:
                assert y1 - y0 > abs(x1 - x0)
        else:
            assert re.fullmatch(rf"{PHRASE} , {PHRASE} and {PHRASE}", caption)
            assert places[1][0] - places[0][0] >= 5
            assert places[2][0] - places[1][0] >= 5


def test_caption_does_not_depend_on_the_order_of_shapes():
    for n in (2, 3):
        for scene in scenes_of(n, 50):
            turned = Scene(scene.shapes[::-1], scene.background, scene.grain)
            assert describe(turned) == describe(scene)


def test_captions_read_as_documented():
    star, circle = shape("star", "blue", 15, 30), shape("circle", "red", 45, 32, "large")
    square = shape("square", "green", 30, 50)
    assert describe(Scene((circle,))) == "a large red circle"
    assert describe(Scene((circle, star))) == "a small blue star left of a large red circle"
    low = shape("circle", "red", 20, 50)
    assert describe(Scene((low, star))) == "a small blue star above a small red circle"
    assert describe(Scene((circle, square, star))) == (
        "a small blue star , a small green square and a large red circle"
    )


@pytest.mark.parametrize(
    "places", [((10, 10), (30, 32)), ((10, 10), (13, 40), (50, 30))], ids=["diagonal", "column"]
)
def test_describe_rejects_a_scene_with_two_correct_captions(places):
    shapes = [shape(KINDS[i], list(COLOURS)[i], *place) for i, place in enumerate(places)]
    with pytest.raises(ValueError, match="move one"):
        describe(Scene(tuple(shapes)))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("size", [64, 50, 128])
def test_shapes_are_inside_and_do_not_overlap(n, size):
    for scene in scenes_of(n, 40, seed=7):
        masks = [footprint(scene, s, size) for s in scene.shapes]
        assert np.sum(masks, axis=0).max() == 1
        for mask in masks:
            assert mask[1:-1, 1:-1].sum() == mask.sum() > 0


def test_every_shape_is_drawn_in_its_colour_and_sizes_are_far_apart():
    areas = {(kind, size): set() for kind in KINDS for size in RADII}
    for scene in scenes_of(3, 120, seed=3):
        image = draw(scene).astype(int)
        for one in scene.shapes:
            seen = image[one.y, one.x]
            distances = {c: np.abs(seen - rgb).sum() for c, rgb in COLOURS.items()}
            assert min(distances, key=distances.get) == one.colour
            areas[one.kind, one.size].add(int(footprint(scene, one).sum()))
    for kind in KINDS:
        assert min(areas[kind, "large"]) > 2 * max(areas[kind, "small"])


def test_all_sizes_kinds_and_colours_are_equally_likely():
    shapes = [s for scene in scenes_of(3, 800, seed=5) for s in scene.shapes]
    for attribute, values in (("kind", KINDS), ("colour", COLOURS), ("size", RADII)):
        counts = Counter(getattr(s, attribute) for s in shapes)
        expected = len(shapes) / len(values)
        assert all(0.8 < counts[v] / expected < 1.2 for v in values), counts


def truth(scene: Scene, prompt: str) -> str:
    """The answer to a prompt, found by walking over the shapes one at a time."""
    shapes = {s.kind: s for s in scene.shapes}
    holds = {
        "left of": lambda a, b: b.x - a.x,
        "right of": lambda a, b: a.x - b.x,
        "above": lambda a, b: b.y - a.y,
        "below": lambda a, b: a.y - b.y,
    }
    if m := re.fullmatch(r"what colour is the (\w+) \?", prompt):
        return shapes[m[1]].colour
    if m := re.fullmatch(r"how large is the (\w+) \?", prompt):
        return shapes[m[1]].size
    if prompt == "how many shapes are there ?":
        return NUMBERS[len(shapes)]
    if m := re.fullmatch(r"is there a (\w+) (\w+) \?", prompt):
        return "yes" if any((s.colour, s.kind) == (m[1], m[2]) for s in scene.shapes) else "no"
    if m := re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+) \?", prompt):
        gap = holds[m[2]](shapes[m[1]], shapes[m[3]])
        assert abs(gap) >= 8, "asked without a clear margin"
        return "yes" if gap > 0 else "no"
    if m := re.fullmatch(r"what shape is (left of|right of|above|below) the (\w+) \?", prompt):
        assert len(shapes) == 2
        right = [s.kind for s in scene.shapes if holds[m[1]](s, shapes[m[2]]) >= 8]
        assert len(right) == 1, "more than one right answer"
        return right[0]
    m = re.fullmatch(r"what shape is (\w+) \?", prompt)
    right = [s.kind for s in scene.shapes if s.colour == m[1]]
    assert len(right) == 1
    return right[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_answers_are_correct(n):
    rng = np.random.default_rng(0)
    for scene in scenes_of(n, 400, seed=1):
        for turn in questions(scene, rng, 9):
            assert turn.answer == truth(scene, turn.prompt), turn.prompt


def test_yes_and_no_are_balanced_and_negatives_share_one_word():
    rng = np.random.default_rng(0)
    answers = {"presence": Counter(), "relation": Counter()}
    halves = Counter()
    for scene in scenes_of(2, 700) + scenes_of(3, 700):
        for turn in questions(scene, rng, 7):
            if turn.answer not in ("yes", "no"):
                continue
            there = re.fullmatch(r"is there a (\w+) (\w+) \?", turn.prompt)
            answers["presence" if there else "relation"][turn.answer] += 1
            if there and turn.answer == "no":
                right_colour = there[1] in [s.colour for s in scene.shapes]
                right_kind = there[2] in [s.kind for s in scene.shapes]
                assert right_colour or right_kind
                halves[right_colour, right_kind] += 1
    for counts in answers.values():
        assert 0.4 < counts["yes"] / counts.total() < 0.6, counts
    only_colour, only_kind = halves[True, False], halves[False, True]
    assert 0.3 < only_colour / (only_colour + only_kind) < 0.7


def test_kinds_of_questions_are_equally_likely_and_spread():
    rng = np.random.default_rng(0)
    counts = Counter()
    (scene,) = scenes_of(2, 1)
    patterns = ("what colour", "how large", "how many", "is there", "is the ", "what shape is")
    for _ in range(700):
        asked = [turn.prompt for turn in questions(scene, rng, 1)]
        counts[next(p for p in patterns if asked[0].startswith(p))] += 1
    assert all(60 < counts[p] < 140 for p in patterns[:-1]), counts
    assert 140 < counts["what shape is"] < 260  # two kinds begin like this
    (alone,) = scenes_of(1, 1)
    assert len({turn.prompt.split(" the ")[0] for turn in questions(alone, rng, 5)}) == 5
    assert questions(scene, rng, 0) == ()


def test_scene_depends_only_on_seed_and_index():
    a, b = Scenes(count=50), Scenes(count=50, questions=2, caption=False)
    for index in (0, 7, 49):
        first = a.sample(index, np.random.default_rng(1))
        again = a.sample(index, np.random.default_rng(1))
        other = b.sample(index, np.random.default_rng(2))
        assert first.turns == again.turns
        assert np.array_equal(first.media("image")[0], again.media("image")[0])
        assert np.array_equal(first.media("image")[0], other.media("image")[0])
        assert first.turns[0].answer == describe(a.scene(index))


def test_another_seed_or_index_is_another_image():
    images = {
        Scenes(seed=seed).sample(index, np.random.default_rng(0)).media("image")[0].tobytes()
        for seed in range(4)
        for index in range(50)
    }
    assert len(images) == 200


def test_a_scene_stays_the_same_across_releases():
    texts = [describe(Scenes(seed=0).scene(i)) for i in range(3)]
    assert texts == FIRST_CAPTIONS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objects": (1,)},
        {"objects": (2,), "questions": 0},
        {"objects": (3,), "caption": False, "questions": 6},
        {"objects": (1, 3)},
    ],
    ids=str,
)
def test_vocabulary_is_exact_and_answers_fit_their_canvas(options):
    scenes = Scenes(count=1200, **options)
    rng = np.random.default_rng(0)
    words = set()
    for index in range(len(scenes)):
        caption = options.get("caption", True)
        turns = questions(scenes.scene(index), rng, scenes.questions)
        if caption:
            turns += scenes.sample(index, rng).turns[:1] if index < 60 else ()
            words |= set(describe(scenes.scene(index)).split())
        for turn in turns:
            words |= set(turn.prompt.split()) | set(turn.answer.split())
            assert len(turn.answer.split()) < turn.length  # room for an end token
    assert sorted(words) == scenes.vocabulary()


def test_sample_has_the_documented_layout():
    scenes = Scenes(objects=(2,), size=96, questions=3)
    sample = scenes.sample(5, np.random.default_rng(0))
    assert sample.media("image")[0].shape == (96, 96, 3)
    assert sample.media("image")[0].dtype == np.uint8
    assert sample.group == "scene2"
    assert [turn.length for turn in sample.turns] == [20, 4, 4, 4]
    assert sample.turns[0].prompt == "describe the picture"
    assert {Scenes().sample(i, np.random.default_rng(0)).group for i in range(20)} == {
        "scene1",
        "scene2",
        "scene3",
    }


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"objects": ()}, "objects"),
        ({"objects": (0, 1)}, "objects"),
        ({"objects": (4,)}, "objects"),
        ({"size": 16}, "size"),
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"questions": -1}, "questions"),
        ({"questions": 0, "caption": False}, "expected one turn"),
    ],
)
def test_error_names_the_invalid_option(options, name):
    with pytest.raises(ValueError, match=name):
        Scenes(**options)


def test_invalid_calls_are_rejected():
    rng = np.random.default_rng(0)
    red, blue = shape("circle", "red", 15, 15), shape("circle", "blue", 40, 40)
    with pytest.raises(IndexError, match="index 9"):
        Scenes(count=9).sample(9, rng)
    with pytest.raises(IndexError, match="index -1"):
        Scenes(count=9).scene(-1)
    with pytest.raises(ValueError, match="n is 4"):
        random_scene(rng, 4)
    with pytest.raises(ValueError, match="n is -1"):
        questions(Scene((red,)), rng, -1)
    with pytest.raises(ValueError, match="size is 8"):
        draw(Scene((red,)), 8)
    with pytest.raises(ValueError, match="kinds are"):
        Scene((red, blue))
    with pytest.raises(ValueError, match="colours are"):
        Scene((red, shape("star", "red", 40, 40)))
    with pytest.raises(ValueError, match="hexagon"):
        Scene((shape("hexagon", "red", 40, 40),))
    with pytest.raises(ValueError, match="0 entries"):
        Scene(())


def test_opposites_are_mutual():
    assert all(OPPOSITE[OPPOSITE[relation]] == relation for relation in OPPOSITE)
