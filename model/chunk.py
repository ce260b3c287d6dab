"""A chunk of a rollout has consecutive samples, everything that was drawn for them, and the time of each phase.

Shapes: S samples of a chunk, T image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.host import now, seconds_between
from .packed import Packed


@dataclass(frozen=True)
class Span:
    """A phase: its name and two points in time."""

    name: str
    start: Any
    end: Any

    @property
    def seconds(self) -> float:
        """How long the phase took. Waits for the phase to end."""
        return seconds_between(self.start, self.end)


class Clock:
    """Times phases on the current stream of a device without waiting for it. The first phase begins at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, now(device)

    def lap(self, name: str) -> Span:
        """End a phase; the next one begins."""
        start, self.start = self.start, now(self.device)
        return Span(name, start, self.start)


def seconds_of(spans: Sequence[Span]) -> dict[str, float]:
    """Total seconds of each phase, by its name. Waits for the device."""
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + span.seconds
    return totals


@dataclass(frozen=True)
class RolloutChunk:
    """S consecutive samples, in the order of the prompts. Tensors are on the policy's device unless stated otherwise.

    Args:
        prompts: Packed int64 on the CPU, ids of the stage-1 prompts; empty where the plan was given.
        plans: Packed int64 on the CPU, ids of the plans up to and including the first EOS; empty where it was given.
        plan_logprobs: Packed float32, log-probabilities of the plan tokens at the sampling temperature.
        plan_texts: the plans as text.
        truncated: [S] bool on the CPU, whether the plan reached max_completion_length without EOS.
        image_prompts: Packed int64 on the CPU, ids of the stage-2 prompts with `<begin_of_image>` last.
        image_tokens: [S, T] int64.
        image_logprobs, guided_logprobs: [S, T] float32, under the conditional and under the guided distribution.
        images: [S, 3, H, W] float32 in [0, 1].
        spans: the phases "plan", "draw" and "decode". If the plans of several chunks were written in one batch, only
            the first of these chunks has the phase "plan".
    """

    prompts: Packed
    plans: Packed
    plan_logprobs: Packed
    plan_texts: list[str]
    truncated: Tensor
    image_prompts: Packed
    image_tokens: Tensor
    image_logprobs: Tensor
    guided_logprobs: Tensor
    images: Tensor
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.plan_texts)

    @cached_property
    def ids(self) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
        """Prompts, plans, image prompts and image tokens as lists; image tokens are copied from the device once."""
        texts = (packed.tolist() for packed in (self.prompts, self.plans, self.image_prompts))
        return *texts, self.image_tokens.tolist()  # type: ignore[return-value]

    def on_host(self) -> RolloutChunk:
        """The chunk itself, with `ids` computed. Slices of it then have their ids without waiting for the device."""
        _ = self.ids
        return self

    def __getitem__(self, samples: slice) -> RolloutChunk:
        """Contiguous samples; `spans` stay those of the whole chunk."""
        part = RolloutChunk(**{f.name: _slice(getattr(self, f.name), samples) for f in fields(self)})
        if "ids" in vars(self):
            vars(part)["ids"] = tuple(ids[samples] for ids in self.ids)
        return part

    @classmethod
    def cat(cls, chunks: Sequence[RolloutChunk]) -> RolloutChunk:
        """The samples of all chunks, in order."""
        whole = cls(**{f.name: _join([getattr(chunk, f.name) for chunk in chunks]) for f in fields(cls)})
        if all("ids" in vars(chunk) for chunk in chunks):
            vars(whole)["ids"] = tuple(_join(list(ids)) for ids in zip(*(chunk.ids for chunk in chunks), strict=True))
        return whole


def _slice(value: Any, samples: slice) -> Any:
    return value if isinstance(value, tuple) else value[samples]


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, (list, tuple)):
        return type(first)(item for value in values for item in value)
    return Packed.cat(values) if isinstance(first, Packed) else torch.cat(values)
