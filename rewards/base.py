"""What a reward is: a name, and a score for each picture of a batch.

Shapes: S samples, images [S, 3, H, W] float in [0, 1]; a score is [S] float32, NaN where the reward does not apply
to that sample's prompt (a missing reward is left out of the advantage; it is not a zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SpatialInfo:
    """`obj1` stands in relation `locality` ("left of", "above", …) to `obj2`."""

    obj1: str
    obj2: str
    locality: str


@dataclass(frozen=True)
class NumeracyInfo:
    """The picture shows `num` times `obj_name`."""

    num: int
    obj_name: str


@dataclass(frozen=True)
class Example:
    """One prompt with the annotations of T2I-R1's schema; the fields a row does not have are empty or None."""

    prompt: str
    task_type: str
    nouns: tuple[str, ...] = ()
    attr_nouns: tuple[str, ...] = ()
    spatial_info: SpatialInfo | None = None
    numeracy_info: tuple[NumeracyInfo, ...] = ()


@runtime_checkable
class Reward(Protocol):
    """Anything with a `name` and a batched `score`. See CONTRIBUTING for one in 20 lines."""

    name: str

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] in [0, 1], S examples -> [S] float32; NaN = this reward does not apply."""
        ...
