"""What a step reports of its rollout, rewards and time. S samples of all ranks, R rewards, G samples of a prompt.

Scores and plans are on the host; what is computed on the device comes there in one transfer, by `on_host`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from ..model.chunk import Clock, Span, seconds_of
from ..rewards.ensemble import RewardEnsemble, RewardHandle
from .distributed import Ranks
from .evaluate import entropy_bits
from .samples import mean_by_name

_SIDE = 64  # pixels


@record_function("metrics")
def on_host(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of the device as numbers; the one place of a step that waits for its end."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)) if metrics else {}


@record_function("metrics")
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


@record_function("metrics")
def reward_costs(handle: RewardHandle, ranks: Ranks) -> dict[str, float]:
    """Of each reward the longest time that it took a rank, what of it the longest wait leaves hidden, and the samples
    that it skipped on all ranks."""
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
    """Mean distance of two pictures of a group, over all groups of all ranks, on the device.

    The distance is the RMS difference of their values in [0, 1], averaged down to at most `_SIDE` pixels a side.
    images [S, 3, H, W] are this rank's; a replay may have none, [S, 0, 0, 0].
    """
    if not images.numel():
        return {}
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(images.float(), (min(_SIDE, height), min(_SIDE, width)))
    groups = small.reshape(-1, num_generations, small[0].numel())
    # not by |a|² + |b|² - 2ab, which rounds small distances to nothing
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist") / groups.shape[2] ** 0.5
    mean = distances.sum() / (len(groups) * num_generations * (num_generations - 1))  # to itself it is 0
    return {"image_diversity": ranks.sum(mean) / ranks.size}


def plan_diversity(plans: Sequence[Sequence[int]], num_generations: int) -> float:
    """Mean distance of two plans of a group, over all groups: 1 - |A ∩ B| / |A ∪ B| of their sets of tokens."""
    sets = [frozenset(plan) for plan in plans]
    groups = (sets[start : start + num_generations] for start in range(0, len(sets), num_generations))
    distances = [len(a ^ b) / max(1, len(a | b)) for group in groups for a, b in combinations(group, 2)]
    return sum(distances) / len(distances)


@record_function("metrics")
def plan_metrics(plans: Sequence[Sequence[int]], truncated: Sequence[bool], num_generations: int) -> dict[str, float]:
    """Of the plans of all ranks: mean length, share that was cut off, entropy of their tokens in bits, diversity."""
    words = torch.tensor([word for plan in plans for word in plan])
    return {
        "plan_tokens": len(words) / len(plans),
        "plan_truncated": sum(truncated) / len(plans),
        "plan_entropy": entropy_bits(torch.bincount(words).float()),
        "plan_diversity": plan_diversity(plans, num_generations),
    }


class Phases:
    """Seconds of named phases, added to those that the rollout measured itself: on a GPU, of the current stream."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans, self.device = list(spans), device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        clock = Clock(self.device)
        yield
        self.spans.append(clock.lap(name))

    @property
    def seconds(self) -> dict[str, float]:
        """Waits for the device."""
        return seconds_of(self.spans)
