"""Detections of a picture against its prompt's annotations: are the things there, as many as asked, and where asked?

    object    share of the nouns that are found
    spatial   0.2 for each of the two objects found, and 0.6 relation(most confident box of each) if both are
    counting  mean over the entries of: 1 if as many are found as asked, else 0

A thing is found where its score passes the threshold; one thing counts once (non-maximum suppression at IoU 0.5).
Shapes: one picture, Q boxes [Q, 4] as corners x0, y0, x1, y1 in [0, 1], P phrases, scores [P, Q]; small, on the host.
Weights and kinds of score: T2I-R1 (arXiv 2505.00703); the relation: T2I-CompBench (arXiv 2307.06350).

`compat=True` everywhere: the arithmetic of T2I-R1's published code where that changes a reward. There
- a relation earns at most 0.5, "above" and "on top of" earn none, "near" and its like always hold,
- the relation is scored for task_type "spatial" alone, the count for "numeracy" alone, anything else by its nouns,
- a wrong count pays 0.2 if anything is found,
- suppression takes centres and sizes for corners,
- only the nouns are looked for, and one of three words or more is never found,
- the detector cuts a noun at a full stop or question mark,
- a row without nouns scores 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Example, NumeracyInfo, SpatialInfo

THRESHOLD = 0.3
NEAR_DISTANCE = 0.29  # of the picture; T2I-CompBench's 150 of 512 pixels
FREE_IOU = 0.1  # boxes that overlap more have a direction only in part
NEAR = ("next to", "on side of", "near")
DIRECTIONS = {  # locality -> axis (0: x, 1: y) and sign of the way from the first object to the second
    "left of": (0, 1),
    "on the left of": (0, 1),
    "right of": (0, -1),
    "on the right of": (0, -1),
    "above": (1, 1),
    "top of": (1, 1),
    "on top of": (1, 1),
    "on the top of": (1, 1),
    "below": (1, -1),
    "on the bottom of": (1, -1),
}
UNPUBLISHED = ("above", "on top of")  # directions that the published code does not know


def fold(text: str) -> str:
    """Words in lower case with one space between them: the names of things are compared in this form."""
    return " ".join(text.lower().split())


def phrases(example: Example, compat: bool = False) -> list[str]:
    """What to look for, folded: the nouns, and (unless compat) whatever else the annotations name; each name once."""
    names = [fold(noun) for noun in example.nouns]
    if compat:
        return names
    if example.spatial_info is not None:
        names += [fold(example.spatial_info.obj1), fold(example.spatial_info.obj2)]
    names += [fold(entry.obj_name) for entry in example.numeracy_info]
    return list(dict.fromkeys(names))


def layout_score(found: Mapping[str, Tensor], example: Example, compat: bool = False) -> float:
    """The score of one picture in [0, 1]; NaN if the example has no annotation that a detector can check.

    Annotations decide, whatever the task type: the relation if there is `spatial_info`, the count if there is
    `numeracy_info`, the mean of the two if there are both, and the share of the nouns if there is neither.

    Args:
        found: what `detections` returns.
        example: the prompt with its annotations.
        compat: see the module's docstring.

    Raises:
        ValueError: a locality that is not known.
    """
    if compat and not example.nouns:
        return 1.0
    scores = []
    if example.spatial_info is not None and (not compat or example.task_type == "spatial"):
        scores.append(spatial_score(found, example.spatial_info, compat))
    if example.numeracy_info and (not compat or example.task_type == "numeracy"):
        scores.append(counting_score(found, example.numeracy_info, compat))
    return sum(scores) / len(scores) if scores else object_score(found, example.nouns)


def detections(
    phrases: Sequence[str], boxes: Tensor, scores: Tensor, threshold: float = THRESHOLD, compat: bool = False
) -> dict[str, Tensor]:
    """The things that are in the picture: folded phrase -> boxes [K, 4], most confident first, one box each.

    Args:
        phrases: P names; boxes of equal names are pooled.
        boxes: [Q, 4].
        scores: [P, Q], confidence that a box shows what the phrase says.
        threshold: a box counts if its score is above.
        compat: see the module's docstring.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(map(fold, phrases)):
        if not (compat and len(name.split()) > 2):
            rows.setdefault(name, []).append(row)
    found = {}
    for name, own in rows.items():
        hit = scores[own] > threshold
        mine = boxes[hit.nonzero()[:, 1]]
        if len(mine):
            found[name] = mine[nms(_centred(mine) if compat else mine, scores[own][hit])]
    return found


def nms(boxes: Tensor, scores: Tensor, iou: float = 0.5) -> Tensor:
    """Greedy non-maximum suppression: a box goes if it overlaps a more confident one that stays.

    Equal scores are ordered by coordinates, so the order of the boxes does not matter.

    Args:
        boxes: [Q, 4], corners.
        scores: [Q].
        iou: two boxes overlap if their intersection over union is above.

    Returns:
        indices [K] of the boxes that stay, most confident first.
    """
    order = torch.arange(len(boxes), device=boxes.device)
    for key in (*boxes.unbind(1), -scores):
        order = order[key[order].argsort(stable=True)]
    overlaps = (_iou(boxes[order], boxes[order]) > iou).tril(-1)  # [box, a more confident one]
    # Every pass settles at least one more box, from the most confident on: the fixed point is the greedy answer.
    keep = torch.ones_like(order, dtype=torch.bool)
    while True:
        kept = ~(overlaps & keep).any(1)
        if torch.equal(kept, keep):
            return order[keep]
        keep = kept


def object_score(found: Mapping[str, Tensor], nouns: Sequence[str]) -> float:
    """Share of `nouns` that are in the picture; NaN without nouns."""
    return sum(fold(noun) in found for noun in nouns) / len(nouns) if nouns else math.nan


def spatial_score(found: Mapping[str, Tensor], info: SpatialInfo, compat: bool = False) -> float:
    """0.2 for each object found, and 0.6 (compat: 0.5) times the relation of the most confident boxes of the two.

    If both objects have one name, its two most confident boxes are taken, in the better of their two orders.

    Raises:
        ValueError: a locality that is not known.
    """
    if not compat:
        known_locality(info.locality)
    one, two = fold(info.obj1), fold(info.obj2)
    if one != two:
        pair = [found[name][0] for name in (one, two) if name in found]
    elif compat:
        return 0.0  # the published code fails on such a row, and takes that for 0
    else:
        pair = list(found[one][:2]) if one in found else []
    held = 0.0
    if len(pair) == 2:
        held = relation(info.locality, pair[0], pair[1], compat)
        if one == two:
            held = max(held, relation(info.locality, pair[1], pair[0], compat))
    return 0.2 * len(pair) + (0.5 if compat else 0.6) * held


def counting_score(found: Mapping[str, Tensor], entries: Sequence[NumeracyInfo], compat: bool = False) -> float:
    """Mean over `entries` of: 1 if as many are found as asked, else 0 (compat: 0.2 if wrong, 0 if none is found)."""
    wrong = 0.2 if compat else 0.0
    rights = []
    for entry in entries:
        count = len(found.get(fold(entry.obj_name), ()))
        rights.append(0.0 if compat and not count else 1.0 if count == entry.num else wrong)
    return sum(rights) / len(rights)


def relation(locality: str, box1: Tensor, box2: Tensor, compat: bool = False) -> float:
    """How far `box1` stands in relation `locality` to `box2`, in [0, 1]; both [4], corners.

    A direction holds if the way between the centres is longest along its axis and has its sign; where the boxes
    overlap with an IoU of 0.1 or more it counts 0.1/IoU. Things are near each other if the way is below
    NEAR_DISTANCE along x or y, and less so in proportion if it is not.

    Raises:
        ValueError: a locality that is not known (compat: 0).
    """
    word = fold(locality) if compat else known_locality(locality)
    way = ((box2[:2] + box2[2:]) / 2 - (box1[:2] + box1[2:]) / 2).tolist()
    if word in NEAR:
        reach = 150.0 if compat else NEAR_DISTANCE
        steps = sorted(map(abs, way))
        return 1.0 if steps[0] < reach else reach / steps[1]
    if compat and (word in UNPUBLISHED or word not in DIRECTIONS):
        return 0.0
    axis, sign = DIRECTIONS[word]
    if way[axis] * sign <= abs(way[1 - axis]):
        return 0.0
    return FREE_IOU / max(FREE_IOU, _iou(box1[None], box2[None]).item())


def known_locality(locality: str) -> str:
    """The locality, folded. Raises ValueError with those that are known if it is none of them."""
    if fold(locality) not in (*DIRECTIONS, *NEAR):
        raise ValueError(f"unknown locality {locality!r}; known are {', '.join((*DIRECTIONS, *NEAR))}")
    return fold(locality)


def check_localities(examples: Sequence[Example]) -> None:
    """Raises ValueError with the prompt of the first example that has a locality that is not known."""
    for example in examples:
        if example.spatial_info is not None:
            try:
                known_locality(example.spatial_info.locality)
            except ValueError as error:
                raise ValueError(f"{example.prompt!r}: {error}") from error


def _iou(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of every box [N, 4] with every box [M, 4]: [N, M]; NaN where the union is empty."""
    low = torch.maximum(one[:, None, :2], two[None, :, :2])
    high = torch.minimum(one[:, None, 2:], two[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, two)]
    return both / (areas[0][:, None] + areas[1] - both)


def _centred(boxes: Tensor) -> Tensor:
    """Corners [N, 4] -> centre x, centre y, width, height."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat(((low + high) / 2, high - low), dim=1)
