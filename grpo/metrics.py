"""Computes the metrics of a step: rollout, rewards and time.

Scores and plans are on the host. Metrics that are computed on the device are copied to the host in one transfer, by
`on_host`. Shapes: S samples of all ranks, R rewards, G samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from ..model.chunk import Clock, Span, seconds_of
from ..rewards.ensemble import RewardEnsemble, RewardHandle, std_of
from .distributed import Ranks
from .samples import mean_by_name

_SIDE = 64  # pixels


@record_function("metrics")
def on_host(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy scalars from the device, in one transfer that waits for the device."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)) if metrics else {}


@record_function("metrics")
def reward_metrics(
    ensemble: RewardEnsemble, scores: Tensor, num_generations: int, task_types: Sequence[str]
) -> dict[str, float]:
    """Metrics of the rewards, from the scores [S, R] and task types [S] of all ranks in rank order."""
    total = ensemble.total(scores)
    groups = total.view(-1, num_generations)
    by_task = mean_by_name(zip(task_types, total.tolist(), strict=True))
    spread = [0.0 if math.isnan(std := std_of(group[~group.isnan()])) else std for group in groups]
    return {
        "reward": total.nanmean().item(),
        "reward_std": sum(spread) / len(spread),
        "frac_reward_zero_std": spread.count(0.0) / len(spread),
        **ensemble.metrics(scores),
        **{f"reward_by_task/{task}": mean for task, mean in by_task.items() if mean is not None},
    }


@record_function("metrics")
def reward_costs(handle: RewardHandle, ranks: Ranks) -> dict[str, float]:
    """For each reward: how long it took on the slowest rank, how much of that was hidden behind other work on the rank
    that waited longest, and how many samples it skipped on all ranks."""
    everyone, costs = ranks.gather([handle.metrics]), {}
    for name in handle.names:
        worked, hidden, skipped = (
            [metrics[f"rewards/{name}/{what}"] for metrics in everyone]
            for what in ("milliseconds", "milliseconds_hidden", "skipped")
        )
        waited = max(each - behind for each, behind in zip(worked, hidden, strict=True))
        costs[f"rewards/{name}/milliseconds"] = max(worked)
        costs[f"rewards/{name}/milliseconds_hidden"] = max(worked) - waited
        costs[f"rewards/{name}/skipped"] = sum(skipped)
    return costs


@record_function("metrics")
def image_diversity(images: Tensor, num_generations: int, ranks: Ranks) -> dict[str, Tensor]:
    """Mean distance between two pictures of a group, over all groups of all ranks, on the device.

    The distance is the RMS difference of pixel values in [0, 1], after pooling to at most `_SIDE` pixels a side.

    Args:
        images: [S, 3, H, W] of this rank; empty if a replay has no pictures, [S, 0, 0, 0].
        num_generations: G.
        ranks: this process among the others.
    """
    if not images.numel():
        return {}
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(images.float(), (min(_SIDE, height), min(_SIDE, width)))
    groups = small.reshape(-1, num_generations, small[0].numel())
    # not by |a|² + |b|² - 2ab, which rounds small distances to nothing
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist") / groups.shape[2] ** 0.5
    mean = distances.sum() / (len(groups) * num_generations * (num_generations - 1))  # the diagonal is 0
    return {"image_diversity": ranks.sum(mean) / ranks.size}


def plan_diversity(plans: Sequence[Sequence[int]], num_generations: int) -> float:
    """Mean distance between two plans of a group, over all groups: 1 - |A ∩ B| / |A ∪ B| of their sets of tokens."""
    sets = [frozenset(plan) for plan in plans]
    groups = (sets[start : start + num_generations] for start in range(0, len(sets), num_generations))
    distances = [len(a ^ b) / max(1, len(a | b)) for group in groups for a, b in combinations(group, 2)]
    return sum(distances) / len(distances)


@record_function("metrics")
def plan_metrics(plans: Sequence[Sequence[int]], truncated: Sequence[bool], num_generations: int) -> dict[str, float]:
    """Metrics of the plans of all ranks: mean length, share that was cut off, entropy of their tokens, diversity."""
    tokens = torch.tensor([token for plan in plans for token in plan])
    shares = torch.bincount(tokens).float()
    shares = shares[shares > 0] / len(tokens)
    return {
        "plan_tokens": len(tokens) / len(plans),
        "plan_truncated": sum(truncated) / len(plans),
        "plan_entropy": float(-(shares * shares.log2()).sum()),  # in bits; falls if the plans become alike
        "plan_diversity": plan_diversity(plans, num_generations),
    }


class Phases:
    """Measures the seconds of named phases, on a GPU those of the current stream.

    Args:
        spans: phases that the rollout has measured already.
        device: where the phases run.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans, self.device = list(spans), device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        clock = Clock(self.device)
        yield
        self.spans.append(clock.lap(name))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase. Waits for the device."""
        return seconds_of(self.spans)
