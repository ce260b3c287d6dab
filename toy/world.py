"""The toy's world has scenes of coloured shapes on a 3x3 grid, with their pictures, plans and prompts.

A picture has 32x32 pixels. A shape fills one cell of 8x8 pixels, and cells begin every 12 pixels. With patches of 4x4
pixels, every shape covers exactly 2x2 image tokens and is one token away from its neighbours. Prompts have four of
T2I-R1's task types (object, color, numeracy, spatial) and its JSONL schema.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations, product
from typing import Any

import torch
from torch import Tensor

IMAGE_SIZE, CELL_PITCH, SHAPE_SIZE, PATCH_SIZE = 32, 12, 8, 4

# RGB in [0, 1]. The background is light, so that a blurred edge fades towards white and never towards another colour.
COLOURS = {
    "red": (0.86, 0.16, 0.18),
    "green": (0.13, 0.60, 0.28),
    "blue": (0.16, 0.32, 0.84),
    "yellow": (0.96, 0.78, 0.10),
}
BACKGROUND = (0.96, 0.96, 0.95)
SHAPES = ("circle", "square", "triangle")
POSITIONS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
DIRECTIONS = {
    "left": (0, -1),
    "right": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}  # (dy, dx) from the second to the first
# Where the first object stands from the second -> the words for it, and the relation of the second to the first.
RELATIONS = {
    "left": (("left of", "on the left of"), "right"),
    "right": (("right of", "on the right of"), "left"),
    "above": (("above", "on top of"), "below"),
    "below": (("below", "under"), "above"),
}
TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "{}",
    "draw {}",
    "show {}",
    "a scene with {}",
)


@dataclass(frozen=True)
class SceneObject:
    """One shape: a key of COLOURS, one of SHAPES, and its cell (index into POSITIONS)."""

    colour: str
    shape: str
    cell: int


Scene = tuple[SceneObject, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of object: all objects of a shape, or of a shape and a colour."""

    shape: str
    colour: str | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape


@dataclass(frozen=True)
class Content:
    """What a prompt asks for, apart from its wording: `kinds` of objects, how many of each, and their relation.

    `relation`, a key of RELATIONS, says where the first kind stands from the second.
    """

    task_type: str
    kinds: tuple[Kind, ...]
    counts: tuple[int, ...]
    relation: str | None = None

    def mirrored(self) -> Content:
        """The same content with the kinds in reverse order."""
        relation = RELATIONS[self.relation][1] if self.relation else None
        return replace(self, kinds=self.kinds[::-1], counts=self.counts[::-1], relation=relation)


@dataclass(frozen=True)
class ToyPrompt:
    """A content, and the line of the prompt file that asks for it, in T2I-R1's schema."""

    content: Content
    line: dict[str, Any] = field(hash=False)


def shape_mask(shape: str) -> Tensor:
    """The pixels of a square, a circle or a triangle that points up: [8, 8] bool."""
    centre = torch.arange(SHAPE_SIZE) - (SHAPE_SIZE - 1) / 2
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    if shape == "square":
        return torch.ones(SHAPE_SIZE, SHAPE_SIZE, dtype=torch.bool)
    if shape == "circle":
        return x**2 + y**2 < 14.6
    return x.abs() <= (y + SHAPE_SIZE / 2 + 1) / 2


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draw the scenes: [S, 3, 32, 32] float32 in [0, 1]."""
    canvas = torch.tensor(BACKGROUND).view(1, 3, 1, 1).repeat(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE)
    paint = {c: torch.tensor(rgb).view(3, 1, 1) for c, rgb in COLOURS.items()}
    masks = {s: shape_mask(s) for s in SHAPES}
    for picture, scene in zip(canvas, scenes, strict=True):
        for thing in scene:
            top, left = (CELL_PITCH * i for i in divmod(thing.cell, 3))
            patch = picture[:, top : top + SHAPE_SIZE, left : left + SHAPE_SIZE]
            patch.copy_(torch.where(masks[thing.shape], paint[thing.colour], patch))
    return canvas


def plan_of(scene: Scene) -> str:
    """Describe the scene, its objects in order: `red circle at left . blue square at right .`"""
    return " ".join(f"{thing.colour} {thing.shape} at {POSITIONS[thing.cell]} ." for thing in scene)


def random_scene(content: Content, rng: random.Random) -> Scene:
    """A scene that shows exactly `content`; colours and cells that are open are drawn uniformly."""
    kinds = [kind for kind, count in zip(content.kinds, content.counts, strict=True) for _ in range(count)]
    while True:
        cells = rng.sample(range(len(POSITIONS)), len(kinds))
        if content.relation is None or _stands(content.relation, cells[0], cells[1]):
            break
    colours = (kind.colour or rng.choice(list(COLOURS)) for kind in kinds)
    return tuple(SceneObject(c, k.shape, cell) for k, c, cell in zip(kinds, colours, cells, strict=True))


def mistaken(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one mistake: an object has another colour, shape or cell, is missing, or is added."""
    things = list(scene)
    free = [cell for cell in range(len(POSITIONS)) if cell not in {thing.cell for thing in scene}]
    which = rng.randrange(len(things))
    error = rng.choice(("colour", "shape", "cell", "less", "more"))
    if error == "less":
        things.pop(which)
    elif error == "more":
        things.append(SceneObject(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(free)))
    else:
        choices: Sequence[Any] = {"colour": list(COLOURS), "shape": SHAPES, "cell": free}[error]
        old = getattr(things[which], error)
        things[which] = replace(things[which], **{error: rng.choice([new for new in choices if new != old])})
    return tuple(things)


def _stands(relation: str, first: int, second: int) -> bool:
    """Whether cell `first` is in this relation to cell `second`; at 45 degrees two relations hold."""
    (y1, x1), (y2, x2) = divmod(first, 3), divmod(second, 3)
    (dy, dx), down, right = DIRECTIONS[relation], y1 - y2, x1 - x2
    ahead = down * dy + right * dx
    return ahead > 0 and ahead >= max(abs(right), abs(down))


def contents_of(task_type: str, rng: random.Random) -> list[Content]:
    """The contents of one task type, each once: all of them, or a random sample if there are thousands."""
    plain = [Kind(s) for s in SHAPES]
    coloured = [Kind(s, c) for s in SHAPES for c in COLOURS]
    pairs = [*combinations(coloured, 2), *((a, b) for a in coloured for b in plain if a.shape != b.shape)]

    def ones(kinds: Sequence[Kind], relation: str | None = None) -> Content:
        return Content(task_type, tuple(kinds), (1,) * len(kinds), relation)

    if task_type == "object":
        # three shapes make few sets, so here another order of mention is another content
        return [ones(kinds) for n in (1, 2, 3) for kinds in product(plain, repeat=n)]
    if task_type == "color":
        triples = rng.sample(list(combinations(coloured, 3)), 100)
        return [ones(kinds) for kinds in (*((kind,) for kind in coloured), *pairs, *triples)]
    if task_type == "numeracy":
        alone = [Content(task_type, (kind,), (n,)) for kind in plain + coloured for n in range(1, 6)]
        splits = [(n, m) for n, m in product(range(1, 5), repeat=2) if 3 <= n + m <= 5]
        both = [Content(task_type, pair, split) for pair in pairs for split in splits]
        return alone + rng.sample(both, 170)
    several = [ones(pair, relation) for pair in permutations(plain, 2) for relation in ("left", "above")]
    return several + rng.sample([ones(pair, relation) for pair in pairs for relation in RELATIONS], 250)


def word(content: Content, template: str, rng: random.Random) -> ToyPrompt:
    """One prompt for `content`; `rng` chooses synonyms and, except for object prompts, the order of mention."""
    if content.task_type != "object" and rng.random() < 0.5:
        content = content.mirrored()
    line: dict[str, Any] = {"task_type": content.task_type}
    kinds = content.kinds
    if content.relation is not None:
        locality = rng.choice(RELATIONS[content.relation][0])
        phrase = f"a {kinds[0].name} {locality} a {kinds[1].name}"
        line["spatial_info"] = {"obj1": kinds[0].name, "obj2": kinds[1].name, "locality": locality}
    elif content.task_type == "numeracy":
        entries = list(zip(content.counts, kinds, strict=True))
        phrase = " and ".join(f"{NUMBERS[n]} {kind.name}{'s' * (n > 1)}" for n, kind in entries)
        line["numeracy_info"] = [{"num": n, "obj_name": kind.name} for n, kind in entries]
    else:
        articles = ["another" if kind in kinds[:i] else "a" for i, kind in enumerate(kinds)]
        phrase = " and ".join(f"{article} {kind.name}" for article, kind in zip(articles, kinds, strict=True))
    line["nouns"] = [kind.shape for kind in kinds]
    line["attr_nouns"] = [kind.name for kind in kinds if kind.colour]
    return ToyPrompt(content, {"prompt": template.format(phrase), **line})


def make_prompts(seed: int) -> tuple[list[ToyPrompt], list[ToyPrompt]]:
    """Training prompts and held-out prompts. No training prompt has the content of a held-out one."""
    rng = random.Random(seed)
    train: list[ToyPrompt] = []
    heldout: list[ToyPrompt] = []
    for task_type in ("object", "color", "numeracy", "spatial"):
        contents = list(dict.fromkeys(contents_of(task_type, rng)))
        rng.shuffle(contents)
        cut = round(0.15 * len(contents))
        for index, content in enumerate(contents):
            templates = rng.sample(TEMPLATES, 4 if task_type == "object" else 1)
            (heldout if index < cut else train).extend(word(content, t, rng) for t in templates)
    return train, heldout
