"""Group-relative advantages of GRPO, from several rewards at once.

S samples come in groups of G (the samples of one prompt, contiguous); R rewards with weights w.

sum_then_normalize:  c_sr = r_sr - mean_g(r_r);  x_s = Σ_r w_r c_sr;  A = (x - mean_g(x)) / (std + eps)
normalize_then_sum:  z_sr = c_sr / (std_g(r_r) + eps);  x_s = Σ_r w_r z_sr;  A = (x - mean(x)) / (std(x) + eps), over
                     the batch, whatever `scale` says

`std` is unbiased, over the group (`scale="group"`), over the batch (`"batch"`), or absent (`"none"`). NaN is a missing
reward: it is left out of every mean and std and stands at its group's mean (in the spread of the batch: at the batch's
mean where its whole group misses it), so it moves no sample for or against. A sample with no weighted reward at all
takes no part and gets advantage 0.

Centring before the sum changes nothing where all rewards are there, keeps a missing one unbiased, and leaves no
E[x²] - E[x]² to cancel. Work: 4·S·R bytes read, 4·S written.

Source: GRPO (arXiv 2402.03300); the two aggregations are those of TRL's `multi_objective_aggregation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]


def _center(x: Tensor, dim: int) -> Tensor:
    """x minus its mean over `dim`, NaN left out. Equal values give exactly 0."""
    # subtracting the smallest first makes equal values exact zeros, which a rounded mean would not
    x = x - x.nan_to_num(nan=torch.inf).amin(dim, keepdim=True)
    return x - x.nanmean(dim, keepdim=True)


def _std(centered: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of centred values, NaN left out; 0 where there are fewer than two."""
    count = centered.isfinite().sum(dim, keepdim=True)
    return (centered.square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def group_advantages_ref(
    rewards: Tensor, group_size: int, weights: Tensor, scale: Scale, combine: Combine, eps: float
) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    num_samples, num_rewards = rewards.shape
    # a reward of weight 0 only watches: it neither moves a sample nor makes one count as scored
    missing = rewards.isnan() | (weights == 0)
    unscored = missing.all(1).view(-1, group_size)
    centered = _center(rewards.view(-1, group_size, num_rewards), dim=1)
    if combine == "normalize_then_sum":
        centered = centered / (_std(centered, dim=1) + eps)
    x = (centered.nan_to_num(nan=0.0) * weights).sum(-1).masked_fill(unscored, torch.nan)
    if combine == "normalize_then_sum":
        x = _center(x.view(1, -1), dim=1)
        advantages = x / (_std(x, dim=1) + eps)
    else:
        x = _center(x, dim=1)
        if scale == "group":
            advantages = x / (_std(x, dim=1) + eps)
        elif scale == "batch":
            # TRL's batch scale is the spread of the rewards themselves, differences between prompts included
            spread = _center(rewards, dim=0).view(-1, group_size, num_rewards)
            spread = spread.where(spread.isfinite(), spread.nanmean(1, keepdim=True)).nan_to_num(nan=0.0)
            total = (spread * weights).sum(-1).masked_fill(unscored, torch.nan).view(-1, 1)
            advantages = x / (_std(_center(total, dim=0), dim=0) + eps)
        else:
            advantages = x
    return advantages.reshape(num_samples).nan_to_num(nan=0.0)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    weights: Tensor | Sequence[float] | None = None,
    *,
    scale: Scale = "group",
    combine: Combine = "sum_then_normalize",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each sample within its group.

    Args:
        rewards: [S, R] or [S] float, NaN = missing.
        group_size: G; S is a multiple of it. One sample alone has advantage 0.
        weights: [R], default all 1.
        scale: what the centred rewards are divided by.
        combine: how several rewards become one.
        eps: added to the standard deviation.

    Returns:
        [S] float32 (float64 for float64 rewards).

    Raises:
        ValueError: S is not a multiple of G, another number of weights than rewards, an unknown option, or an
            infinite reward (on a GPU a device-side assertion, which costs no synchronisation).
    """
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [S, R] or [S], got shape {tuple(rewards.shape)}")
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards cannot be split into groups of group_size={group_size}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r} is unknown; use 'group', 'batch' or 'none'")
    if combine not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(f"combine={combine!r} is unknown; use 'sum_then_normalize' or 'normalize_then_sum'")
    infinite = rewards.isinf().any(1)
    if rewards.is_cuda:
        torch._assert_async(infinite.any().logical_not(), "group_advantages: infinite reward; NaN means missing")
    elif infinite.any():
        raise ValueError(f"infinite reward for sample {int(infinite.nonzero()[0])}; NaN means missing")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    weights = torch.ones(rewards.shape[1]) if weights is None else torch.as_tensor(weights)
    if weights.shape != (rewards.shape[1],):
        raise ValueError(f"{weights.numel()} weights for {rewards.shape[1]} rewards")
    if not rewards.numel():
        return rewards.new_zeros(len(rewards))
    return group_advantages_ref(rewards, group_size, weights.to(rewards), scale, combine, eps)
