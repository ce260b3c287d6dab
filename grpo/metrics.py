"""What a step reports of its rollout, rewards and time. S samples of all ranks, R rewards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..model.engine import RolloutChunk
from ..rewards.ensemble import RewardEnsemble, RewardHandle
from .distributed import Ranks
from .evaluate import entropy_bits, mean_by_name


def reward_metrics(
    ensemble: RewardEnsemble, scores: Tensor, num_generations: int, task_types: Sequence[str]
) -> dict[str, float]:
    """Of the whole step: scores [S, R] and task types [S] of all ranks, in rank order."""
    total = ensemble.total(scores)
    groups = total.view(-1, num_generations)
    by_task = mean_by_name(zip(task_types, total.tolist(), strict=True))
    spread = torch.stack([g[~g.isnan()].std() if (~g.isnan()).sum() > 1 else g.new_zeros(()) for g in groups])
    largest, smallest = groups.nan_to_num(nan=-torch.inf).amax(1), groups.nan_to_num(nan=torch.inf).amin(1)
    return {
        "reward": total.nanmean().item(),
        "reward_std": spread.mean().item(),
        # not by the std: of eight times 0.35 it is not 0 but a rounding error
        "frac_reward_zero_std": (largest == smallest).float().mean().item(),
        **ensemble.metrics(scores),
        **{f"reward_by_task/{task}": mean for task, mean in by_task.items() if mean is not None},
    }


def reward_costs(handle: RewardHandle, ranks: Ranks) -> dict[str, float]:
    """Times of this rank, skipped samples of all."""
    names = [name for name in handle.metrics if name.endswith("/skipped")]
    skipped = ranks.sum(torch.tensor([handle.metrics[name] for name in names], device=ranks.device))
    return {**handle.metrics, **dict(zip(names, skipped.tolist(), strict=True))}


def plan_metrics(rollout: RolloutChunk, vocabulary: int, ranks: Ranks) -> dict[str, float]:
    """Of the plans of all ranks: mean length, share that was cut off, entropy of their tokens in bits."""
    words = torch.bincount(rollout.plans.values, minlength=vocabulary).float()
    ends = torch.stack([rollout.truncated.sum(), rollout.truncated.new_tensor(len(rollout), dtype=torch.int64)])
    words, (truncated, plans) = ranks.sum(words), ranks.sum(ends.float())
    return {
        "plan_tokens": (words.sum() / plans).item(),
        "plan_truncated": (truncated / plans).item(),
        "plan_entropy": entropy_bits(words),
    }


class Phases:
    """Wall seconds of named phases, added to those that the rollout measured itself."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = dict(seconds)
        self.device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
