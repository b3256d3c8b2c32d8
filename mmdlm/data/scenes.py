"""Synthetic scenes of coloured shapes with captions and questions, the training data of `tiny`.

Every scene has one correct caption and every question one correct answer. A masked model predicts
the words of a step independently, so two correct captions would be mixed (CLEVR: 1612.06890).
Positions and radii are pixels of a 64 x 64 image (`GRID`), y downwards; `draw` scales them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np

from mmdlm.data.dataset import Dataset, example
from mmdlm.data.naming import cell_words
from mmdlm.messages import Example, Turn

GRID = 64
SMALLEST = 32  # side of an image in pixels; below, shapes are indistinguishable
KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 105, 245),
    "yellow": (245, 215, 45),
    "purple": (175, 60, 205),
    "white": (240, 240, 240),
}
RADII = {"small": (5.0, 5.5), "large": (9.5, 10.0)}
NUMBERS = ("zero", "one", "two", "three")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MARGIN = 8  # smallest distance of two centres in pixels for a relation between them
COLUMN_GAP = 6  # smallest distance in x of neighbours among three shapes, pixels
CLEARANCE = 2  # pixels between two bounding boxes, and to the border
CAPTION_PROMPT = "describe the picture"
CAPTION_LENGTH = 20  # the longest caption has 14 words
ANSWER_LENGTH = 4  # every answer is one word
_STREAM = 0x5CE7E  # part of every seed, so that it differs from a caller's (seed, index)


@dataclass(frozen=True)
class Shape:
    """One coloured shape of a scene.

    Args:
        kind: one of `KINDS`.
        colour: one of the names in `COLOURS`.
        size: "small" or "large".
        x: column of the centre, pixels of `GRID`.
        y: row of the centre, pixels of `GRID`, downwards.
        radius: one of `RADII[size]`, pixels of `GRID`.
        brightness: factor on the colour, in (0, 1].
    """

    kind: str
    colour: str
    size: str
    x: int
    y: int
    radius: float
    brightness: float = 1.0

    @property
    def words(self) -> str:
        """Noun phrase of the shape: "a large red circle"."""
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One to three shapes that all differ in kind and in colour, on a dark background.

    Args:
        shapes: in any order.
        background: darkest RGB value of the background, each in [0, 60].
        grain: seed of the background noise.
    """

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int] = (24, 24, 24)
    grain: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes) <= 3:
            raise ValueError(f"Scene.shapes has {len(self.shapes)} entries, expected 1 to 3")
        for what, known in (("kind", KINDS), ("colour", COLOURS), ("size", RADII)):
            seen = [getattr(shape, what) for shape in self.shapes]
            if not set(seen) <= set(known):
                raise ValueError(f"Scene: {what}s are {seen}, expected values of {list(known)}")
            if what != "size" and len(set(seen)) < len(seen):
                raise ValueError(f"Scene: {what}s are {seen}, expected distinct values")


def _spikes(count: int, inner: float, outer: float) -> np.ndarray:
    """Corners of a star whose first spike points upwards, [2 * count, 2] as (x, y)."""
    angles = np.arange(2 * count) * math.pi / count
    lengths = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([lengths * np.sin(angles), -lengths * np.cos(angles)], axis=1)


_STEPS = (1, 1, 3, 3, 1, 1, -1, -1, -3, -3, -1, -1)  # x of a cross's corners; y lags by 3
# Outlines for radius 1. Thin shapes extend beyond 1, so that all kinds of one size have a similar
# area.
_OUTLINES = {
    "circle": _spikes(32, 1.0, 1.0),
    "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": np.array([(0.0, -1.05), (1.1, 0.85), (-1.1, 0.85)]),
    "star": _spikes(5, 0.5, 1.25),
    "cross": 0.35 * np.array([_STEPS, np.roll(_STEPS, 3)]).T,
}
# Half the width and height of the bounding boxes, centred on the shape.
_BOXES = {kind: np.abs(outline).max(axis=0) for kind, outline in _OUTLINES.items()}


@lru_cache(maxsize=512)
def _coverage(kind: str, radius: float) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [2h+1 2h+1 1], centred."""
    half = math.ceil(radius * _BOXES[kind].max()) + 1
    side, fine = 2 * half + 1, 4  # 4 x 4 samples per pixel
    ticks = ((np.arange(side * fine) + 0.5) / fine - half - 0.5) / radius
    x, y = np.meshgrid(ticks, ticks)
    inside = np.zeros(x.shape, dtype=bool)
    corners = _OUTLINES[kind]
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:  # even-odd rule: count the edges to the right of a point
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    share = inside.reshape(side, fine, side, fine).mean(axis=(1, 3), dtype=np.float32)[..., None]
    share.flags.writeable = False  # cached: all callers share it
    return share


def draw(scene: Scene, size: int = GRID) -> np.ndarray:
    """Renders a scene: uint8 [Y X 3] RGB with Y = X = `size`.

    Args:
        scene: the scene; equal scenes give equal pixels.
        size: side of the image in pixels, at least 32.
    """
    if size < SMALLEST:
        raise ValueError(f"draw: size is {size} px, expected at least {SMALLEST}")
    noise = np.random.default_rng(scene.grain).integers(0, 14, (size, size, 3), dtype=np.uint8)
    image = noise + np.array(scene.background, dtype=np.uint8)
    scale = size / GRID
    for shape in scene.shapes:
        share = _coverage(shape.kind, shape.radius * scale)
        side = len(share)
        left, top = (round((at + 0.5) * scale - 0.5) - side // 2 for at in (shape.x, shape.y))
        patch = image[max(top, 0) : top + side, max(left, 0) : left + side]
        share = share[max(-top, 0) :, max(-left, 0) :][: len(patch), : patch.shape[1]]
        ink = np.array(COLOURS[shape.colour], dtype=np.float32) * shape.brightness
        patch[...] = patch + share * (ink - patch) + 0.5
    return image


def random_scene(rng: np.random.Generator, n: int) -> Scene:
    """Draws a scene of `n` shapes that do not overlap and have one correct caption.

    Only positions are redrawn until they fit, so that large shapes are as frequent as small ones.

    Args:
        rng: source of all random choices.
        n: number of shapes, 1 to 3.
    """
    if n not in (1, 2, 3):
        raise ValueError(f"random_scene: n is {n}, expected 1, 2 or 3")
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[:n]]
    colours = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:n]]
    bigger, wider = rng.integers(2, size=(2, n)).tolist()
    sizes = [("small", "large")[i] for i in bigger]
    radii = [RADII[size][i] for size, i in zip(sizes, wider, strict=True)]
    places = _places(rng, np.array([_BOXES[kind] for kind in kinds]) * np.array(radii)[:, None])
    bright = (0.88 + 0.12 * rng.random(n)).tolist()
    columns = zip(kinds, colours, sizes, *zip(*places, strict=True), radii, bright, strict=True)
    background = tuple(rng.integers(8, 41, size=3).tolist())
    return Scene(tuple(Shape(*values) for values in columns), background, int(rng.integers(2**31)))


def _places(rng: np.random.Generator, boxes: np.ndarray) -> list[list[int]]:
    """Centres [x, y] for boxes of half width and height [n 2], redrawn until all margins hold."""
    n = len(boxes)
    tries = (1, 16, 192)[n - 1]  # enough at once that a second round is rare
    low = np.ceil(boxes) + CLEARANCE  # [n 2]
    while True:
        spots = (low + rng.random((tries, n, 2)) * (GRID - 2 * low)).astype(np.int64)
        fits = np.ones(tries, dtype=bool)
        for a, b in combinations(range(n), 2):
            dx, dy = np.abs(spots[:, a] - spots[:, b]).T
            wide, high = boxes[a] + boxes[b] + CLEARANCE
            fits &= (dx >= wide) | (dy >= high)
            fits &= np.abs(dx - dy) >= MARGIN if n == 2 else dx >= COLUMN_GAP
        found = int(fits.argmax())
        if fits[found]:
            return spots[found].tolist()


def describe(scene: Scene) -> str:
    """The caption of a scene.

    One shape: its noun phrase. Two: their relation along the axis of the larger distance, the left
    or upper one first. Three: a list from left to right.
    Raises:
        ValueError: the positions allow two correct captions.
    """
    ordered = sorted(scene.shapes, key=lambda shape: shape.x)
    words = [shape.words for shape in ordered]
    across = [b.x - a.x for a, b in pairwise(ordered)]
    down = ordered[-1].y - ordered[0].y
    if len(words) == 1:
        return words[0]
    if len(words) == 3 and min(across) >= COLUMN_GAP:
        return f"{words[0]} , {words[1]} and {words[2]}"
    if len(words) == 2 and across[0] - abs(down) >= MARGIN:
        return f"{words[0]} left of {words[1]}"
    if len(words) == 2 and abs(down) - across[0] >= MARGIN:
        return " above ".join(words if down > 0 else words[::-1])
    raise ValueError(
        f"describe: centres are {[(shape.x, shape.y) for shape in ordered]}, so two captions are "
        f"correct; move one: |dx| and |dy| of two shapes must differ by {MARGIN} px, neighbours "
        f"of three must be {COLUMN_GAP} px apart in x"
    )


def _facts(scene: Scene) -> list[tuple[Shape, str, Shape]]:
    """All relations between two shapes that hold by `MARGIN`, in both directions."""
    facts = []
    for a, b in permutations(scene.shapes, 2):
        if b.x - a.x >= MARGIN:
            facts += [(a, "left of", b), (b, "right of", a)]
        if b.y - a.y >= MARGIN:
            facts += [(a, "above", b), (b, "below", a)]
    return facts


def _pick(rng: np.random.Generator, options: list | tuple) -> Any:
    return options[int(rng.integers(len(options)))]


def _question(kind: str, scene: Scene, rng: np.random.Generator, facts: list) -> tuple[str, str]:
    """Prompt and answer of one question of the given kind (a key of `_ASKED`)."""
    shape, truth = _pick(rng, scene.shapes), bool(rng.integers(2))
    answer = "yes" if truth else "no"
    if kind == "colour":
        return f"what colour is the {shape.kind} ?", shape.colour
    if kind == "shape":
        return f"what shape is {shape.colour} ?", shape.kind
    if kind == "size":
        return f"how large is the {shape.kind} ?", shape.size
    if kind == "count":
        return "how many shapes are there ?", NUMBERS[len(scene.shapes)]
    if kind == "presence":
        colour, name = shape.colour, shape.kind
        # A wrong pair keeps one correct word, so that neither word alone determines the answer.
        if not truth and rng.integers(2):
            name = _pick(rng, [other for other in KINDS if other != name])
        elif not truth:
            colour = _pick(rng, [other for other in COLOURS if other != colour])
        return f"is there a {colour} {name} ?", answer
    a, relation, b = _pick(rng, facts)
    if kind == "neighbour":
        return f"what shape is {relation} the {b.kind} ?", a.kind
    return f"is the {a.kind} {relation if truth else OPPOSITE[relation]} the {b.kind} ?", answer


# Each kind of question: the numbers of shapes it applies to, and its fixed words.
_ASKED = {
    "colour": ((1, 2, 3), "what colour is the ?"),
    "shape": ((1, 2, 3), "what shape is ?"),
    "size": ((1, 2, 3), "how large is the ?"),
    "count": ((1, 2, 3), "how many shapes are there ?"),
    "presence": ((1, 2, 3), "is there a ? yes no"),
    "relation": ((2, 3), "is the left right of above below ? yes no"),
    "neighbour": ((2,), "what shape is left right of above below the ?"),
}


def questions(scene: Scene, rng: np.random.Generator, n: int) -> tuple[Turn, ...]:
    """Draws `n` questions about a scene with their answers.

    No kind is repeated before every applicable kind was used; yes and no are equally likely.

    Args:
        scene: the scene.
        rng: selects the kinds, the shapes and whether the answer is yes or no.
        n: number of questions, 0 or more.
    """
    if n < 0:
        raise ValueError(f"questions: n is {n}, expected 0 or more")
    facts, turns = _facts(scene), []
    kinds = [kind for kind, (numbers, _) in _ASKED.items() if len(scene.shapes) in numbers]
    while len(turns) < n:
        for choice in rng.permutation(len(kinds))[: n - len(turns)]:
            turns.append(Turn(*_question(kinds[choice], scene, rng, facts), ANSWER_LENGTH))
    return tuple(turns)


class Scenes(Dataset):
    """Scenes rendered on demand, each with its caption first and then questions about it.

    The scene at an index depends only on `seed` and the index. Seeds give different images, so
    train on `Scenes(seed=0)` and score on `Scenes(seed=1)`.

    Args:
        objects: possible numbers of shapes in a scene, each 1 to 3, equally likely.
        size: side of the images in pixels, at least 32.
        count: length of the dataset; scenes are not stored, so it may be large.
        seed: seed of the scenes, 0 to 2**32 - 1.
        questions: number of questions per scene.
        caption: whether the first turn is the caption.
        cells: cells per side that samples have names for (see `mmdlm.data.naming`); 0 for none.
    """

    def __init__(
        self,
        objects: tuple[int, ...] = (1, 2, 3),
        size: int = GRID,
        count: int = 1_000_000,
        seed: int = 0,
        questions: int = 4,
        caption: bool = True,
        cells: int = 0,
    ) -> None:
        if not objects or not set(objects) <= {1, 2, 3}:
            raise ValueError(f"Scenes: objects is {objects}, expected numbers from 1 to 3")
        limits = {"size": SMALLEST, "count": 1, "seed": 0, "questions": 0}
        for (name, low), value in zip(limits.items(), (size, count, seed, questions), strict=True):
            if not low <= value < 2**32:
                raise ValueError(f"Scenes: {name} is {value}, expected {low} to 2**32 - 1")
        if not caption and questions == 0:
            raise ValueError("Scenes: caption is False and questions is 0, expected one turn")
        self.objects, self.size, self.count, self.seed = tuple(objects), size, count, seed
        self.questions, self.caption, self.cells = questions, caption, cells

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The scene at `index` in [0, count), equal in every process."""
        if not 0 <= index < self.count:
            raise IndexError(f"Scenes: index {index} is outside [0, {self.count})")
        rng = np.random.default_rng((_STREAM, self.seed, index))
        return random_scene(rng, _pick(rng, self.objects))

    def sample(self, index: int, rng: np.random.Generator) -> Example:
        """The image at `index` with its turns; `rng` selects only the questions."""
        scene = self.scene(index)
        turns = questions(scene, rng, self.questions)
        if self.caption:
            turns = (Turn(CAPTION_PROMPT, describe(scene), CAPTION_LENGTH), *turns)
        names = cell_words(scene.shapes, self.cells, GRID) if self.cells else None
        group = f"scene{len(scene.shapes)}"
        return example(turns, group=group, names=names, image=draw(scene, self.size))

    def vocabulary(self) -> list[str]:
        """Every word of these prompts and answers, sorted."""
        texts = [*KINDS, *COLOURS, *RADII]
        if self.caption:
            used = ("", "a", "a left of above", "a , and")  # by number of shapes
            texts += [CAPTION_PROMPT, *(used[n] for n in self.objects)]
        if self.questions:
            texts += [NUMBERS[n] for n in self.objects]
            texts += [words for numbers, words in _ASKED.values() if {*numbers} & {*self.objects}]
        return sorted(set(" ".join(texts).split()))
