"""Compares the detections of a picture with the annotations of its prompt: which objects, how many, and where.

    object    share of the nouns that are found
    spatial   0.2 for each of the two objects found, plus 0.6 relation(most confident box of each) if both are found
    counting  mean over the entries of: 1 if the number found is the number asked for, else 0

An object is found where a box has a score above the threshold. Boxes of one object count once (non-maximum suppression
at IoU 0.5). Shapes: one picture, Q boxes [Q, 4] as corners x0, y0, x1, y1 in [0, 1], P phrases, scores [P, Q], on the
CPU. The score types and their weights are from T2I-R1 (arXiv 2505.00703), the relation from T2I-CompBench (2307.06350).

`compat=True` computes what T2I-R1's published code does, wherever that changes a reward:
- a relation earns at most 0.5, "above" and "on top of" earn nothing, "near" and its synonyms always hold,
- only task_type "spatial" scores the relation, only "numeracy" the count, and all others the nouns,
- a wrong count earns 0.2 if anything is found,
- suppression takes centres and sizes for corners,
- only the nouns are looked for, and a noun of three words or more is never found,
- the detector cuts a noun at a full stop or question mark,
- a prompt without nouns scores 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Example, NumeracyInfo, SpatialInfo

THRESHOLD = 0.3
NEAR_DISTANCE = 0.29  # of the picture's size; T2I-CompBench has 150 of 512 pixels
FREE_IOU = 0.1  # boxes that overlap more earn only a part of the score for a direction
NEAR = ("next to", "on side of", "near")
DIRECTIONS = {  # locality -> axis (0: x, 1: y) and sign of the vector from the first object to the second
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
    """Words in lower case with one space between them. Names of objects are compared in this form."""
    return " ".join(text.lower().split())


def phrases(example: Example, compat: bool = False) -> list[str]:
    """The folded names to look for: the nouns, and (unless compat) all other objects of the annotations, each once."""
    names = [fold(noun) for noun in example.nouns]
    if compat:
        return names
    if example.spatial_info is not None:
        names += [fold(example.spatial_info.obj1), fold(example.spatial_info.obj2)]
    names += [fold(entry.obj_name) for entry in example.numeracy_info]
    return list(dict.fromkeys(names))


def layout_score(found: Mapping[str, Tensor], example: Example, compat: bool = False) -> float:
    """The score of one picture in [0, 1]; NaN if the example has no annotation that a detector can check.

    The annotations decide, and not the task type: the relation is scored if there is `spatial_info`, the count if there
    is `numeracy_info`, the mean of both if there are both, and the share of the nouns if there is neither.

    Args:
        found: the result of `detections`.
        example: the prompt with its annotations.
        compat: see the module's docstring.

    Raises:
        ValueError: an unknown locality.
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
    """The objects in the picture: folded phrase -> boxes [K, 4], most confident first, one box for each object.

    Args:
        phrases: P names; boxes of equal names are pooled.
        boxes: [Q, 4].
        scores: [P, Q], confidence that a box shows the object of a phrase.
        threshold: a box counts if its score is above this.
        compat: see the module's docstring.
    """
    rows_of: dict[str, list[int]] = {}  # name -> its rows of `scores`
    for row, name in enumerate(map(fold, phrases)):
        if not (compat and len(name.split()) > 2):
            rows_of.setdefault(name, []).append(row)
    found = {}
    for name, rows in rows_of.items():
        hit = scores[rows] > threshold
        hits = boxes[hit.nonzero()[:, 1]]
        if len(hits):
            found[name] = hits[nms(_centred(hits) if compat else hits, scores[rows][hit])]
    return found


def nms(boxes: Tensor, scores: Tensor) -> Tensor:
    """Greedy non-maximum suppression: drop each box whose IoU with a more confident box that is kept is above 0.5.

    Boxes of equal scores are sorted by coordinates, so the order of the boxes does not matter.

    Args:
        boxes: [Q, 4], corners.
        scores: [Q].

    Returns:
        indices [K] of the boxes that are kept, most confident first.
    """
    order = torch.arange(len(boxes), device=boxes.device)
    for key in (*boxes.unbind(1), -scores):
        order = order[key[order].argsort(stable=True)]
    overlaps = (_iou(boxes[order], boxes[order]) > 0.5).tril(-1)  # [box, a more confident one]
    # Each iteration decides at least the next most confident box for good, so the fixed point is the greedy result.
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
    """0.2 for each object found, plus 0.6 (compat: 0.5) times the relation of the most confident boxes of the two.

    If both objects have the same name, they are its two most confident boxes, in the order that scores more.

    Raises:
        ValueError: an unknown locality.
    """
    if not compat:
        known_locality(info.locality)
    one, two = fold(info.obj1), fold(info.obj2)
    if one != two:
        pair = [found[name][0] for name in (one, two) if name in found]
    elif compat:
        return 0.0  # here the published code raises an error, and counts that as 0
    else:
        pair = list(found[one][:2]) if one in found else []
    held = 0.0
    if len(pair) == 2:
        held = relation(info.locality, pair[0], pair[1], compat)
        if one == two:
            held = max(held, relation(info.locality, pair[1], pair[0], compat))
    return 0.2 * len(pair) + (0.5 if compat else 0.6) * held


def counting_score(found: Mapping[str, Tensor], entries: Sequence[NumeracyInfo], compat: bool = False) -> float:
    """Mean over `entries` of: 1 if the number found is right, else 0 (compat: 0.2 if wrong, 0 if none is found)."""
    wrong = 0.2 if compat else 0.0
    scores = []
    for entry in entries:
        count = len(found.get(fold(entry.obj_name), ()))
        scores.append(0.0 if compat and not count else 1.0 if count == entry.num else wrong)
    return sum(scores) / len(scores)


def relation(locality: str, box1: Tensor, box2: Tensor, compat: bool = False) -> float:
    """How well `box1` stands in relation `locality` to `box2`, in [0, 1]. Both boxes are corners [4].

    A direction holds if the vector between the centres is longest along its axis and has its sign. It scores 1, or
    0.1/IoU if the boxes overlap with an IoU above 0.1. "near" scores 1 if the vector is shorter than NEAR_DISTANCE
    along x or y; otherwise NEAR_DISTANCE divided by the longer of the two.

    Raises:
        ValueError: an unknown locality (compat: the score is 0).
    """
    word = fold(locality) if compat else known_locality(locality)
    vector = ((box2[:2] + box2[2:]) / 2 - (box1[:2] + box1[2:]) / 2).tolist()
    if word in NEAR:
        reach = 150.0 if compat else NEAR_DISTANCE
        shorter, longer = sorted(map(abs, vector))
        return 1.0 if shorter < reach else reach / longer
    if compat and (word in UNPUBLISHED or word not in DIRECTIONS):
        return 0.0
    axis, sign = DIRECTIONS[word]
    if vector[axis] * sign <= abs(vector[1 - axis]):
        return 0.0
    return FREE_IOU / max(FREE_IOU, _iou(box1[None], box2[None]).item())


def known_locality(locality: str) -> str:
    """The folded locality. Raises ValueError if it is unknown."""
    if fold(locality) not in (*DIRECTIONS, *NEAR):
        raise ValueError(f"unknown locality {locality!r}; known are {', '.join((*DIRECTIONS, *NEAR))}")
    return fold(locality)


def check_localities(examples: Sequence[Example]) -> None:
    """Raises ValueError, with the prompt, for the first example with an unknown locality."""
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
