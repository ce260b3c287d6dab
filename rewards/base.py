"""What a reward is: a name, and a score for each picture of a batch.

Shapes: S samples, images [S, 3, H, W] float in [0, 1]; a score is [S] float32, NaN where the reward does not apply
to that sample's prompt (a missing reward is left out of the advantage; it is not a zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
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
    """One prompt with the annotations of T2I-R1's schema; the fields a row does not have are empty or None.

    `metadata` holds the row's other keys, as JSON has them. `plan` is the plan of the sample that is scored; before a
    run, in `applies` and `check`, it is empty.
    """

    prompt: str
    task_type: str
    nouns: tuple[str, ...] = ()
    attr_nouns: tuple[str, ...] = ()
    spatial_info: SpatialInfo | None = None
    numeracy_info: tuple[NumeracyInfo, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    plan: str = ""

    def row(self) -> dict[str, Any]:
        """As the prompt file has it: the user's own keys beside the schema's, and no plan."""
        row = asdict(self)
        del row["plan"]
        return row.pop("metadata") | row


class Unavailable(OSError):
    """Raised by a reward that can score no picture now, such as one whose server is down: none is tried alone."""


@runtime_checkable
class Reward(Protocol):
    """Anything with a `name` and a batched `score`. See CONTRIBUTING for one in 20 lines.

    `score` may read the plan of each sample in `example.plan`, and the row's own keys in `example.metadata`.

    It may have three members more:

        applies(example) -> bool    other examples never reach `score`; their score is NaN
        check(example) -> None      ValueError for an example that `score` cannot take; asked once, before a run
        model: torch.nn.Module      frozen, put on the reward's device, and offloaded between uses if asked for
    """

    name: str

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] float32 in [0, 1] on the reward's device, S examples -> [S] float32.

        NaN = does not apply; only for rewards without `applies`, with it a NaN is an error as an infinity is.
        """
        ...


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers of the host (nested lists) on the device, without waiting for what the device is doing."""
    tensor = torch.tensor(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
