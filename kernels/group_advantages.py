"""Group-relative advantages of GRPO, from several rewards at once.

S samples come in groups of G (the samples of one prompt, contiguous); R rewards with weights w.

sum_then_normalize:  c_sr = r_sr - mean_g(r_r);  x_s = Σ_r w_r c_sr;  A = x / (std + eps)
normalize_then_sum:  z_sr = c_sr / (std_g(r_r) + eps);  x_s = Σ_r w_r z_sr;  A = x / (std(x) + eps), std over all S
                     samples for every `scale`

`std` is the unbiased standard deviation over the group (`scale="group"`) or over all S samples (`"batch"`); `"none"`
does not divide. NaN is a missing reward. It is left out of every mean and std and counts as the mean of its group, so
it moves no advantage. (In the std over all samples, a reward that a whole group misses counts as the mean of all
samples.) A sample without any reward of nonzero weight is left out and gets advantage 0. No gradient flows through
rewards.

Rewards are centred before they are summed, so a missing one causes no bias, and no E[x²] - E[x]² can cancel. x then
sums to 0 over its group; the reference centres it again against rounding.

Shapes: rewards [S, R], weights [R], advantages [S]. A step has hundreds of samples, so launches dominate: one for the
kernel and some for the check that no reward is infinite, where plain PyTorch has 32 to 77.

Source: GRPO (arXiv 2402.03300); the two aggregations are those of TRL's `multi_objective_aggregation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import Impl, choose, launch, tl, triton

Scale = Literal["group", "batch", "none"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

_MOST = 2**12  # rewards that one program, with padding, holds in registers


def _center(x: Tensor, dim: int) -> Tensor:
    """x minus its mean over `dim` without NaN. Equal values give exactly 0."""
    # the smallest is subtracted first, because the mean of equal values may be rounded
    x = x - x.nan_to_num(nan=torch.inf).amin(dim, keepdim=True)
    return x - x.nanmean(dim, keepdim=True)


def _std(centered: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of centred values without NaN; 0 for fewer than two values."""
    count = centered.isfinite().sum(dim, keepdim=True)
    return (centered.square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def group_advantages_ref(
    rewards: Tensor, group_size: int, weights: Tensor, scale: Scale, combine: Combine, eps: float
) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    num_samples, num_rewards = rewards.shape
    # a reward of weight 0 is only monitored: a sample with no other reward counts as unscored
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
            # as in TRL, the std of the rewards themselves, with the differences between prompts
            spread = _center(rewards, dim=0).view(-1, group_size, num_rewards)
            spread = spread.where(spread.isfinite(), spread.nanmean(1, keepdim=True)).nan_to_num(nan=0.0)
            total = (spread * weights).sum(-1).masked_fill(unscored, torch.nan).view(-1, 1)
            advantages = x / (_std(_center(total, dim=0), dim=0) + eps)
        else:
            advantages = x
    return advantages.reshape(num_samples).nan_to_num(nan=0.0)


@triton.jit
def _mean_apart(b_x, m, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """b_x minus its mean over the axis where m is true, else 0. Equal values give exactly 0."""
    b_x = tl.where(m, b_x - tl.min(tl.where(m, b_x, float("inf")), axis, keep_dims=True), 0)
    b_count = tl.maximum(tl.sum(m.to(tl.float32), axis, keep_dims=True), 1)
    return tl.where(m, b_x - tl.sum(b_x, axis, keep_dims=True) / b_count, 0)


@triton.jit
def _divisor(b_c, m, eps, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Standard deviation of centred values plus eps, or infinity if that is 0: then x / divisor is 0, not 0 / 0."""
    b_count = tl.sum(m.to(tl.float32), axis, keep_dims=True)
    b_std = tl.sqrt(tl.sum(b_c * b_c, axis, keep_dims=True) / tl.maximum(b_count - 1, 1)) + eps
    return tl.where(b_std > 0, b_std, float("inf"))


@triton.jit(do_not_specialize=["p_rewards", "P"])
def _group_advantages_kernel(  # type: ignore[no-untyped-def]
    p_rewards, p_weights, p_advantages, P, eps, G: tl.constexpr, R: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZE: tl.constexpr, PB: tl.constexpr, GB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """One program holds all P groups, [PB, GB, RB]. Padding is NaN, like a missing reward."""
    o_p, o_g, o_r = tl.arange(0, PB)[:, None], tl.arange(0, GB)[None, :], tl.arange(0, RB)[None, None, :]
    o_s, m_s = o_p * G + o_g, (o_p < P) & (o_g < G)
    b_w = tl.load(p_weights + o_r, o_r < R, other=0)
    b_r = tl.load(p_rewards + o_s[:, :, None] * R + o_r, m_s[:, :, None] & (o_r < R), other=float("nan"))
    m = b_r == b_r
    scored = tl.max((m & (b_w != 0)).to(tl.int32), 2) > 0
    b_c = _mean_apart(b_r, m, 1)
    if NORMALIZE:
        b_c /= _divisor(b_c, m, eps, 1)
    b_x = tl.sum(b_c * b_w, 2)
    if NORMALIZE or SCALE == "batch":
        b_t = b_x
        if not NORMALIZE:  # std of the rewards themselves; a missing one counts as its group's mean
            b_l = _mean_apart(tl.reshape(b_r, [1, PB * GB, RB]), tl.reshape(m, [1, PB * GB, RB]), 1)
            b_l = tl.reshape(b_l, [PB, GB, RB])
            b_mean = tl.sum(b_l, 1, keep_dims=True) / tl.maximum(tl.sum(m.to(tl.float32), 1, keep_dims=True), 1)
            b_t = tl.sum(tl.where(m, b_l, b_mean) * b_w, 2)
        m_t = tl.reshape(scored, [1, PB * GB])
        b_a = b_x / _divisor(_mean_apart(tl.reshape(b_t, [1, PB * GB]), m_t, 1), m_t, eps, 1)
    elif SCALE == "group":
        b_a = b_x / _divisor(b_x, scored, eps, 1)
    else:
        b_a = b_x
    tl.store(p_advantages + o_s, b_a, m_s)


def launch_config(num_groups: int, group_size: int, num_rewards: int) -> dict[str, int]:
    PB, GB, RB = (triton.next_power_of_2(n) for n in (num_groups, group_size, num_rewards))
    # no fused multiply-add, which would turn w·c - w·c = 0 into a rounding error
    return {"PB": PB, "GB": GB, "RB": RB, "num_warps": min(16, max(1, PB * GB * RB // 256)), "enable_fp_fusion": False}


@torch.library.custom_op("bicot::group_advantages", mutates_args=())
def _op(rewards: Tensor, group_size: int, weights: Tensor, scale: str, combine: str, eps: float) -> Tensor:
    """Float32 rewards [S, R], S·R > 0, and weights [R]."""
    S, R = rewards.shape
    out = rewards.new_empty(S)
    launch(
        _group_advantages_kernel, (1,), rewards.contiguous(), weights.contiguous(), out, S // group_size, eps,
        group_size, R, scale, combine == "normalize_then_sum", **launch_config(S // group_size, group_size, R),
    )  # fmt: skip
    return out


@_op.register_fake
def _fake(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape[0])


def group_advantages(
    rewards: Tensor,
    group_size: int,
    weights: Tensor | Sequence[float] | None = None,
    *,
    scale: Scale = "group",
    combine: Combine = "sum_then_normalize",
    eps: float = 1e-4,
    impl: Impl = "auto",
) -> Tensor:
    """Advantage of each sample within its group [S], float32 (float64 for float64), without gradient.

    Args:
        rewards: [S, R] or [S] float, NaN = missing.
        group_size: G, a divisor of S. With G = 1 all advantages are 0.
        weights: [R], default all 1.
        scale: what the centred rewards are divided by.
        combine: how several rewards become one.
        eps: added to the standard deviation, at least 0.
        impl: "triton" (CUDA), "torch", or "auto": Triton on a GPU for up to 4,096 rewards, and else PyTorch.

    Raises:
        ValueError: shapes or options that do not fit, an `impl` that cannot run, or an infinite reward (on a GPU, and
            inside torch.compile, an assertion on the device, for which the host does not wait).
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
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be at least 0 and finite")
    rewards = (rewards if rewards.dtype == torch.float64 else rewards.float()).detach()
    num_rewards = rewards.shape[1]
    weights = torch.ones(num_rewards, device=rewards.device) if weights is None else torch.as_tensor(weights).detach()
    if weights.shape != (num_rewards,):
        raise ValueError(f"{weights.numel()} weights for {num_rewards} rewards")
    weights = weights.to(rewards, non_blocking=rewards.is_cuda)
    chosen = choose(impl, rewards.device, rewards.dtype, cpp=False)
    if not rewards.numel():
        return rewards.new_zeros(len(rewards))
    if impl == "auto" and rewards.numel() > _MOST:
        chosen = "torch"
    infinite = rewards.isinf()
    if rewards.is_cuda or torch.compiler.is_compiling():  # no host sync, no data-dependent branch
        torch._assert_async(~infinite.any(), "group_advantages: infinite reward; NaN means missing")
    elif infinite.any():
        raise ValueError(f"infinite reward for sample {int(infinite.any(1).nonzero()[0])}; NaN means missing")
    if chosen == "torch":
        return group_advantages_ref(rewards, group_size, weights, scale, combine, eps)
    return _op(rewards, group_size, weights, scale, combine, eps)
