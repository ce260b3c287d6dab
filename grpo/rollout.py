"""Samples and their scores: each chunk is scored while the next one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..model.chunk import RolloutChunk
from ..model.engine import RolloutEngine
from ..model.settings import Sampling
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble, RewardHandle


def roll_out(
    engine: RolloutEngine,
    ensemble: RewardEnsemble,
    examples: Sequence[Example],
    group_size: int,
    sampling: Sampling,
    seed: int,
    first_sample: int | list[int] = 0,
    plans: Sequence[str | None] | None = None,
) -> tuple[RolloutChunk, list[Example], RewardHandle]:
    """Draw `group_size` samples of every example -> the samples, the example of each with its plan, their scores."""
    repeated = [example for example in examples for _ in range(group_size)]
    each: list[Example] = []
    chunks: list[RolloutChunk] = []
    handles: list[RewardHandle] = []
    for chunk in engine.generate([e.prompt for e in examples], group_size, sampling, seed, first_sample, plans):
        asked = repeated[len(each) : len(each) + len(chunk)]
        planned = [replace(example, plan=plan) for example, plan in zip(asked, chunk.plan_texts, strict=True)]
        handles.append(ensemble.submit(chunk.images, planned))
        chunks.append(chunk)
        each += planned
    return RolloutChunk.cat(chunks), each, RewardHandle.cat(handles)
