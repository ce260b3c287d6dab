"""The toy's reward finds coloured shapes in the pixels of a picture, and compares them with the annotations.

Each pixel gets the nearest colour of the palette. Connected components become objects (colour, shape, position), which
are matched with the objects that the annotations require. A score is in [0, 1]:

    object, color   matched / max(required, detected); an object matches half by shape and half by colour
    numeracy        the same, times 1 - (count error) / required
    spatial         0.3 * the score as for object + 0.7 * relation * required / max(required, detected); relation is 1
                    if two of the right objects stand in it, else 0

So a superfluous object lowers the score, unless the relation holds only with it. Every score is multiplied by the share
of painted pixels that belong to an object, so stray paint lowers it too. A prompt must not count an object twice, as in
"two red circles and three circles": no picture has both numbers.
S samples; images [S, 3, H, H] float in [0, 1], resampled to 32x32 if they have another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewards.base import Example
from .world import BACKGROUND, COLOURS, DIRECTIONS, IMAGE_SIZE, SHAPES, Kind

NAMES = tuple(COLOURS)
PALETTE = (*COLOURS.values(), BACKGROUND)
MAX_COLOUR_DISTANCE = 0.35  # between a pixel and its palette colour; beyond this, it is paint without a colour
MIN_AREA = 16  # pixels; a whole shape has 40 to 64
OBJECTS_SHARE, RELATION_SHARE = 0.3, 0.7
SYNONYMS = dict.fromkeys(("top", "over"), "above") | dict.fromkeys(
    ("under", "underneath", "beneath", "bottom"), "below"
)


@dataclass(frozen=True)
class Found:
    """An object of the picture. `shape` is None if it is no known one; (y, x) is its centroid in pixels."""

    shape: str | None
    colour: str
    y: float
    x: float

    def credit(self, kind: Kind) -> float:
        """How well this object matches `kind`: 0, 0.5 or 1."""
        shape = self.shape == kind.shape
        return float(shape) if kind.colour is None else 0.5 * shape + 0.5 * (self.colour == kind.colour)


@dataclass(frozen=True)
class Picture:
    """The objects of one picture, and the share of its painted pixels that belong to them."""

    objects: tuple[Found, ...]
    tidiness: float


EMPTY = Picture((), 1.0)


class SceneReward:
    """See the module's docstring. NaN if the annotations name no object that this reward knows."""

    name = "scene"

    def applies(self, example: Example) -> bool:
        """Whether this reward knows all objects, and the relation, of the annotations."""
        return not math.isnan(_score(EMPTY, example))

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, H] in [0, 1], S examples -> [S] float32 on the device of `images`."""
        return _judge(_score, images, examples)


class SceneRelation:
    """Relation accuracy, for monitoring: 1 if the relation of a spatial prompt holds, else 0; NaN for others."""

    name = "scene_relation"

    def applies(self, example: Example) -> bool:
        """Whether the annotations have a relation that this reward knows."""
        return not math.isnan(_relation(EMPTY, example))

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, H] in [0, 1], S examples -> [S] float32 on the device of `images`."""
        return _judge(_relation, images, examples)


def _judge(rule: Callable[[Picture, Example], float], images: Tensor, examples: Sequence[Example]) -> Tensor:
    scores = [rule(picture, example) for picture, example in zip(look(images), examples, strict=True)]
    return torch.tensor(scores, dtype=torch.float32, device=images.device)


def look(images: Tensor) -> list[Picture]:
    """Find the objects of each picture; images [S, 3, H, H] in [0, 1]. ValueError for another shape."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [S, 3, H, H], got {list(images.shape)}")
    samples = len(images)
    if samples == 0:
        return []
    images = images.float()
    if images.shape[-1] != IMAGE_SIZE:
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
    palette = images.new_tensor(PALETTE)
    pixels = images.flatten(2).transpose(1, 2)  # [S, 1024, 3]
    distance, colour = torch.cdist(pixels, palette.expand(samples, -1, -1)).min(-1)
    painted = (colour < len(NAMES)) | (distance > MAX_COLOUR_DISTANCE)
    colour = colour.masked_fill(distance > MAX_COLOUR_DISTANCE, len(NAMES))
    masks = F.one_hot(colour, len(PALETTE))[..., :-1].transpose(1, 2).bool()  # [S, 4, 1024]
    blobs = _measure(_components(masks.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)))

    objects: list[list[Found]] = [[] for _ in range(samples)]
    area_used = [0.0] * samples
    for mask, area, y, x, top, bottom, left, right in blobs.tolist():
        sample, colour_id = divmod(int(mask), len(NAMES))
        shape = _shape(area, y, bottom - top + 1, right - left + 1, (top + bottom) / 2)
        objects[sample].append(Found(shape, NAMES[colour_id], y, x))
        area_used[sample] += area
    totals = painted.sum(-1).tolist()
    return [
        Picture(tuple(found), used / max(total, 1))
        for found, used, total in zip(objects, area_used, totals, strict=True)
    ]


def _components(masks: Tensor) -> Tensor:
    """Connected components (8 neighbours) of masks [M, H, W] bool: labels [M, H*W] int64, 0 outside the mask.

    A pixel starts as its own label 1 + y*W + x and takes the largest label around it; then it takes the label of the
    pixel that its label names, which halves the remaining distance.
    """
    count, height, width = masks.shape
    inside = masks.flatten(1)
    start = torch.arange(1, height * width + 1, device=masks.device)
    labels = torch.where(inside, start, 0)
    while True:
        # float32 holds these integers exactly
        spread = F.max_pool2d(labels.view(count, 1, height, width).float(), 3, stride=1, padding=1).long()
        spread = torch.where(inside, spread.view(count, -1), 0)
        spread = torch.where(inside, spread.gather(1, (spread - 1).clamp(min=0)), 0)
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _measure(labels: Tensor) -> Tensor:
    """Measure components of at least MIN_AREA pixels -> [N, 8], (mask index, area, y, x, top, bottom, left, right)."""
    pixels = labels.shape[1]
    index, where = labels.nonzero(as_tuple=True)
    key = index * (pixels + 1) + labels[index, where]
    component, member, area = torch.unique(key, return_inverse=True, return_counts=True)
    yx = torch.stack((where // IMAGE_SIZE, where % IMAGE_SIZE), dim=1).float()
    target = member[:, None].expand(-1, 2)
    empty = yx.new_zeros(len(component), 2)
    mean = empty.scatter_reduce(0, target, yx, "mean", include_self=False)
    low = empty.scatter_reduce(0, target, yx, "amin", include_self=False)
    high = empty.scatter_reduce(0, target, yx, "amax", include_self=False)
    box = torch.stack((low, high), dim=2).flatten(1)  # top, bottom, left, right
    rows = torch.cat(((component // (pixels + 1))[:, None], area[:, None], mean, box), dim=1)
    return rows[area >= MIN_AREA]


def _shape(area: float, y: float, height: float, width: float, middle: float) -> str | None:
    """Tell the shape from area, centroid, bounding box and the middle of the box; None if it is no known shape."""
    if not (6 <= height <= 10 and 6 <= width <= 10):
        return None
    fill = area / (height * width)
    sag = (y - middle) / height  # 0.125 for the triangle, whose mass lies low; 0 for the others
    if sag > 0.06:
        return "triangle" if 0.5 < fill < 0.8 else None
    if sag < -0.06 or fill < 0.65:
        return None
    return "square" if fill > 0.91 else "circle"


def _kind(name: str) -> Kind | None:
    """`"red circles"` -> Kind("circle", "red"); None if the name has no known shape."""
    words = name.lower().split()
    shape = next((s for word in words for s in SHAPES if word in (s, s + "s")), None)
    colour = next((word for word in words if word in COLOURS), None)
    return Kind(shape, colour) if shape else None


def _required(example: Example) -> list[Kind | None]:
    """Every object that the annotations require, once per instance; None for one that this reward does not know."""
    if example.spatial_info is not None:
        return [_kind(example.spatial_info.obj1), _kind(example.spatial_info.obj2)]
    if example.numeracy_info:
        return [_kind(entry.obj_name) for entry in example.numeracy_info for _ in range(entry.num)]
    kinds = [_kind(name) for name in example.attr_nouns]
    bare = [_kind(name) for name in example.nouns]
    for kind in kinds:  # "red circle" among attr_nouns is the "circle" among nouns
        if kind is not None and Kind(kind.shape, None) in bare:
            bare.remove(Kind(kind.shape, None))
    return kinds + bare


def _score(picture: Picture, example: Example) -> float:
    wanted = _required(example)
    required = [kind for kind in wanted if kind is not None]
    if not wanted or len(required) < len(wanted):
        return math.nan
    crowd = max(len(required), len(picture.objects))
    matched = _best_match(required, picture.objects)
    score = matched / crowd
    if example.spatial_info is not None:
        relation = _relation(picture, example)  # NaN for a locality without a direction, such as "near"
        score = OBJECTS_SHARE * score + RELATION_SHARE * relation * len(required) / crowd
    elif example.numeracy_info:
        error = 0
        for kind in set(required):
            error += abs(required.count(kind) - sum(thing.credit(kind) == 1 for thing in picture.objects))
        score *= max(0.0, 1 - error / len(required))
    return score * picture.tidiness


def _best_match(required: list[Kind], objects: Sequence[Found]) -> float:
    """The largest total credit of a matching. Each object meets at most one requirement, and vice versa."""
    best = {0: 0.0}  # set of the requirements that are met, as bits -> credit
    for thing in objects:
        credits = [(1 << i, credit) for i, kind in enumerate(required) if (credit := thing.credit(kind))]
        for served, total in list(best.items()):
            for bit, credit in credits:
                if not served & bit:
                    best[served | bit] = max(best.get(served | bit, 0.0), total + credit)
    return max(best.values())


def _relation(picture: Picture, example: Example) -> float:
    """1.0 if some pair of the right objects has the relation, else 0.0; NaN without a known relation."""
    info = example.spatial_info
    if info is None:
        return math.nan
    first, second = _kind(info.obj1), _kind(info.obj2)
    words = (SYNONYMS.get(word, word) for word in info.locality.lower().split())
    direction = next((DIRECTIONS[word] for word in words if word in DIRECTIONS), None)
    if first is None or second is None or direction is None:
        return math.nan
    dy, dx = direction
    for a in picture.objects:
        for b in picture.objects:
            ahead = (a.y - b.y) * dy + (a.x - b.x) * dx
            aside = abs((a.y - b.y) * dx) + abs((a.x - b.x) * dy)
            # at 45 degrees both relations hold; the 0.8 leaves room for a centroid that is a pixel off
            if a is not b and a.credit(first) == b.credit(second) == 1 and ahead > 2 and ahead >= 0.8 * aside:
                return 1.0
    return 0.0
