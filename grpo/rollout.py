"""Samples and their scores: each chunk is scored while the next one is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.engine import RolloutChunk, RolloutEngine
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
    first_sample: int = 0,
) -> tuple[RolloutChunk, list[Example], RewardHandle]:
    """Draw `group_size` samples of every example -> the samples, the example of each, their scores on their way."""
    each = [example for example in examples for _ in range(group_size)]
    chunks: list[RolloutChunk] = []
    handles: list[RewardHandle] = []
    done = 0
    for chunk in engine.generate([e.prompt for e in examples], group_size, sampling, seed, first_sample):
        handles.append(ensemble.submit(chunk.images, each[done : done + len(chunk)]))
        chunks.append(chunk)
        done += len(chunk)
    return RolloutChunk.cat(chunks), each, RewardHandle.cat(handles)
