"""The interface of a reward, which has a name and scores the pictures of a batch.

Shapes: S samples, images [S, 3, H, W] float in [0, 1]. Scores are [S] float32, and NaN where the reward does not apply
to the sample's prompt: such a sample gets no score from this reward, which is not a score of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SpatialInfo:
    """In the picture, `obj1` is `locality` ("left of", "above", …) `obj2`."""

    obj1: str
    obj2: str
    locality: str


@dataclass(frozen=True)
class NumeracyInfo:
    """The picture shows `num` of `obj_name`."""

    num: int
    obj_name: str


@dataclass(frozen=True)
class Example:
    """One prompt with the annotations of T2I-R1's schema. A field is empty if the prompt's line does not have it.

    `metadata` holds all other keys of the line. `plan` is the plan of the sample that is scored; `applies` and `check`,
    which are called before a run, see an empty one.
    """

    prompt: str
    task_type: str
    nouns: tuple[str, ...] = ()
    attr_nouns: tuple[str, ...] = ()
    spatial_info: SpatialInfo | None = None
    numeracy_info: tuple[NumeracyInfo, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    plan: str = ""

    def as_line(self) -> dict[str, Any]:
        """The JSON object of its line in the prompt file: the schema's keys and the user's own, without the plan."""
        line = asdict(self)
        del line["plan"]
        return line.pop("metadata") | line


class Unavailable(OSError):
    """A reward raises this if it can score no picture at all now, for example because its server is down.

    The samples of the batch are then not tried one by one.
    """


@runtime_checkable
class Reward(Protocol):
    """Anything with a `name` and a batched `score`. docs/rewards.md has one in 20 lines.

    `score` may read the plan of each sample in `example.plan`, and the user's own keys in `example.metadata`.

    Three more members are optional:

        applies(example) -> bool    whether `score` is to see the example; if not, its score is NaN
        check(example) -> None      raises ValueError if `score` cannot take the example; called once, before a run
        model: torch.nn.Module      is frozen, moved to the reward's device, and offloaded between uses if configured
    """

    name: str

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] float32 in [0, 1] on the reward's device, S examples -> [S] float32.

        NaN = does not apply. A reward with `applies` must return finite scores only.
        """
        ...
