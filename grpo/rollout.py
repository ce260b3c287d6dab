"""Draws samples and scores them. Each chunk is scored while the next one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..model.chunk import RolloutChunk
from ..model.engine import RolloutEngine
from ..model.policy import Policy
from ..model.prompts import PromptEncoder
from ..model.settings import Sampling
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble, RewardHandle
from .config import Config


def build_engine(policy: Policy, encoder: PromptEncoder, config: Config) -> RolloutEngine:
    """The engine that draws the samples of a run."""
    return RolloutEngine(
        policy,
        encoder,
        max_rows=config.rollout_max_rows,
        kv_dtype=config.rollout_kv_dtype,
        kv_bytes=None if config.rollout_kv_gib is None else int(config.rollout_kv_gib * 2**30),
        kv_release=config.rollout_kv_release,
    )


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
    """Draw `group_size` samples of every example and send them to the rewards.

    Returns:
        The samples; the example of each, with its plan; and a handle whose `result()` are the scores.
    """
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
