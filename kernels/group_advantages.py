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
E[x²] - E[x]² to cancel. A centred reward sums to 0 over its group, so x does too, up to rounding: the kernels leave its
second centring out. Rewards are data: no gradient flows.

Shapes: rewards [S, R], weights [R], advantages [S]. Floor: 4·S·R bytes read, 4·S written, about 20·S·R FLOPs. A step
has hundreds of samples, so the launches are the time: two, the kernel and the assertion that no reward is infinite,
where plain PyTorch has 32 to 77.

Source: GRPO (arXiv 2402.03300); the two aggregations are those of TRL's `multi_objective_aggregation`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import native
from .dispatch import Impl, choose, launch, tl, triton

Scale = Literal["group", "batch", "none"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

_INFINITE = "group_advantages: infinite reward; NaN means missing"
_NATIVE = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 2 + (ctypes.c_double,)


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


@triton.jit
def _load(p_rewards, start, P, G: tl.constexpr, R: tl.constexpr, PB: tl.constexpr, GB: tl.constexpr, RB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rewards of PB groups from `start` on, [PB, GB, RB]; the padding is NaN, so it counts as missing."""
    o_p = (start + tl.arange(0, PB))[:, None, None]
    o_g = tl.arange(0, GB)[None, :, None]
    o_r = tl.arange(0, RB)[None, None, :]
    o = (o_p.to(tl.int64) * G + o_g) * R + o_r
    return tl.load(p_rewards + o, (o_p < P) & (o_g < G) & (o_r < R), other=float("nan"))


@triton.jit
def _weighted_sums(b_r, b_w, eps, NORMALIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [PB, GB] (0 where unscored), whether each sample is scored, and the mean of each group's rewards [PB, 1, RB] as
    a smallest value and the mean's distance from it (0 present: +inf and 0). Weights b_w [1, 1, RB]."""
    m = b_r == b_r
    b_min = tl.min(tl.where(m, b_r, float("inf")), 1, keep_dims=True)
    b_count = tl.maximum(tl.sum(m.to(tl.float32), 1, keep_dims=True), 1)
    b_c = tl.where(m, b_r - b_min, 0)  # equal rewards become exact zeros
    b_mean = tl.sum(b_c, 1, keep_dims=True) / b_count
    b_c = tl.where(m, b_c - b_mean, 0)
    if NORMALIZE:
        b_std = tl.sqrt(tl.sum(b_c * b_c, 1, keep_dims=True) / tl.maximum(b_count - 1, 1)) + eps
        b_c = tl.where(b_std > 0, b_c / b_std, 0)
    scored = tl.max((m & (b_w != 0)).to(tl.int32), 2) > 0
    return tl.sum(b_c * b_w, 2), scored, b_min, b_mean


@triton.jit
def _reward_means(p_rewards, P, G: tl.constexpr, R: tl.constexpr, PB: tl.constexpr, GB: tl.constexpr, RB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean of each reward over the batch [1, 1, RB], as one of its values and the mean's distance from it (a large
    offset would round it away); whatever where the batch has no such reward."""
    b_some = tl.full([1, 1, RB], float("inf"), tl.float32)
    b_sum = tl.zeros([1, 1, RB], tl.float32)
    b_count = tl.zeros([1, 1, RB], tl.float32)
    for start in range(0, P, PB):
        b_r = _load(p_rewards, start, P, G, R, PB, GB, RB)
        m = b_r == b_r
        b_min = tl.min(tl.min(tl.where(m, b_r, float("inf")), 1, keep_dims=True), 0, keep_dims=True)
        b_some = tl.where(b_some < float("inf"), b_some, b_min)
        b_sum += tl.sum(tl.sum(tl.where(m, b_r - b_some, 0), 1, keep_dims=True), 0, keep_dims=True)
        b_count += tl.sum(tl.sum(m.to(tl.float32), 1, keep_dims=True), 0, keep_dims=True)
    return b_some, b_sum / tl.maximum(b_count, 1)


@triton.jit(do_not_specialize=["P"])
def _group_advantages_kernel(  # type: ignore[no-untyped-def]
    p_rewards, p_weights, p_advantages, p_finite, P, eps, G: tl.constexpr, R: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZE: tl.constexpr, PB: tl.constexpr, GB: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """One program walks over P groups, PB at a time: once to write, and before that once or twice for what the whole
    batch decides. Each walk starts from the rewards, which stay in L1: no thread reads what another one wrote, so no
    barrier is needed."""
    o_r = tl.arange(0, RB)[None, None, :]
    b_w = tl.load(p_weights + o_r, o_r < R, other=0)
    batch_divisor = 1.0
    if NORMALIZE or SCALE == "batch":
        if not NORMALIZE:
            b_some, b_distance = _reward_means(p_rewards, P, G, R, PB, GB, RB)
        # count, mean and sum of squared distances from the mean, merged block by block (Chan)
        count, mean, squares = 0.0, 0.0, 0.0
        for start in range(0, P, PB):
            b_r = _load(p_rewards, start, P, G, R, PB, GB, RB)
            b_x, scored, b_min, b_mean = _weighted_sums(b_r, b_w, eps, NORMALIZE)
            if not NORMALIZE:  # the spread of the rewards themselves: each group at its own level
                b_level = tl.where(b_min < float("inf"), (b_min - b_some) - b_distance + b_mean, 0)
                b_x += tl.sum(b_level * b_w, 2)
            before, old = count, mean
            count += tl.sum(scored.to(tl.float32))
            mean += tl.sum(tl.where(scored, b_x - old, 0)) / tl.maximum(count, 1)
            b_d = tl.where(scored, b_x - mean, 0)
            squares += before * (mean - old) * (mean - old) + tl.sum(b_d * b_d)
        batch_divisor = tl.sqrt(squares / tl.maximum(count - 1, 1)) + eps

    o_g = tl.arange(0, GB)[None, :]
    infinite = 0
    for start in range(0, P, PB):
        b_r = _load(p_rewards, start, P, G, R, PB, GB, RB)
        infinite += tl.sum((tl.abs(b_r) == float("inf")).to(tl.int32))
        b_x, scored, b_min, b_mean = _weighted_sums(b_r, b_w, eps, NORMALIZE)
        if SCALE == "group" and not NORMALIZE:
            b_count = tl.sum(scored.to(tl.float32), 1, keep_dims=True)
            b_divisor = tl.sqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / tl.maximum(b_count - 1, 1)) + eps
        else:
            b_divisor = tl.full([PB, 1], 1, tl.float32) * batch_divisor
        # eps = 0 and no spread: 0 / 0 is an advantage of 0
        b_a = tl.where(b_divisor > 0, b_x / b_divisor, 0)
        o_p = (start + tl.arange(0, PB))[:, None]
        tl.store(p_advantages + o_p.to(tl.int64) * G + o_g, b_a, (o_p < P) & (o_g < G))
    tl.store(p_finite, tl.where(infinite == 0, 1, 0))


def launch_config(group_size: int, num_rewards: int) -> dict[str, int]:
    """Blocks of 2048 rewards, 8 a thread, or of one group if it is larger."""
    GB, RB = triton.next_power_of_2(group_size), triton.next_power_of_2(num_rewards)
    PB = max(1, 2048 // (GB * RB))
    # no fused multiply-add: it would turn w·c - w·c, which is 0, into its rounding error
    return {"PB": PB, "GB": GB, "RB": RB, "num_warps": min(16, PB * GB * RB // 256), "enable_fp_fusion": False}


@torch.library.custom_op("bicot::group_advantages", mutates_args=())
def _op(rewards: Tensor, group_size: int, weights: Tensor, scale: str, combine: str, eps: float, impl: str) -> Tensor:
    """Float32 rewards [S, R], S·R > 0, and weights [R]. The kernels look for infinite rewards on their way."""
    rewards, weights = rewards.contiguous(), weights.contiguous()
    S, R = rewards.shape
    out = rewards.new_empty(S)
    finite = rewards.new_empty((), dtype=torch.uint8)
    normalize = combine == "normalize_then_sum"
    if impl == "native":
        pointers = (t.data_ptr() for t in (rewards, weights, out, finite))
        run = native.function("bicot_group_advantages", *_NATIVE)
        run(*pointers, S // group_size, group_size, R, ("group", "batch", "none").index(scale), normalize, eps)
    else:
        launch(
            _group_advantages_kernel, (1,), rewards, weights, out, finite, S // group_size, eps, group_size, R, scale,
            normalize, **launch_config(group_size, R),
        )  # fmt: skip
    if rewards.is_cuda:
        torch._assert_async(finite.view(torch.bool), _INFINITE)
    elif not finite:
        raise _infinite_reward(rewards)
    return out


@_op.register_fake
def _fake(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape[0])


def _infinite_reward(rewards: Tensor) -> ValueError:
    return ValueError(f"infinite reward for sample {int(rewards.isinf().any(1).nonzero()[0])}; NaN means missing")


def _check_finite(rewards: Tensor) -> None:
    infinite = rewards.isinf().any()
    if rewards.is_cuda or torch.compiler.is_compiling():  # no host sync, no data-dependent branch
        torch._assert_async(~infinite, _INFINITE)
    elif infinite:
        raise _infinite_reward(rewards)


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
    """Advantage of each sample within its group. Not differentiable: rewards are data, and are detached.

    Args:
        rewards: [S, R] or [S] float, NaN = missing.
        group_size: G; S is a multiple of it. One sample alone has advantage 0.
        weights: [R], default all 1.
        scale: what the centred rewards are divided by.
        combine: how several rewards become one.
        eps: added to the standard deviation, at least 0.
        impl: "triton" is one kernel on a GPU, "native" the C++ kernel on a CPU, "torch" plain PyTorch; "auto" is the
            first that takes the rewards. Float64 is PyTorch's; everything else is computed in float32 or better.

    Returns:
        [S] float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: S is not a multiple of G, another number of weights than rewards, an unknown option, an infinite
            reward (on a GPU, and inside torch.compile with plain PyTorch, an assertion on the device, which costs no
            synchronisation), or an `impl` that cannot take these rewards.
        RuntimeError: `impl="native"` and the C++ library is missing.

    Source: arXiv 2402.03300 and TRL's `multi_objective_aggregation`.
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
    rewards = (rewards if rewards.dtype == torch.float64 else rewards.float()).detach()
    num_rewards = rewards.shape[1]
    weights = torch.ones(num_rewards, device=rewards.device) if weights is None else torch.as_tensor(weights).detach()
    if weights.shape != (num_rewards,):
        raise ValueError(f"{weights.numel()} weights for {num_rewards} rewards")
    weights = weights.to(rewards, non_blocking=rewards.is_cuda)
    chosen = choose(impl, rewards.device, rewards.dtype)
    if not rewards.numel():
        return rewards.new_zeros(len(rewards))
    if chosen == "torch":
        _check_finite(rewards)
        return group_advantages_ref(rewards, group_size, weights, scale, combine, eps)
    return _op(rewards, group_size, weights, scale, combine, eps, chosen)
