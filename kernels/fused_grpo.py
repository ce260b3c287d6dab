"""The fused pass of `grpo_loss` over the tokens of one stream. It computes the log-prob, the entropy, the terms of the
loss and the gradient of the logits of a token while its logits are still in cache.

Formulas: kernels/grpo_loss.py. Their derivatives by the log-prob lp, with n the token's normaliser and w its own weight
(1 without `token_weight`):

    d policy = ratio·A where the branch that the minimum takes is not at its bound, else 0;  cispo: min(ratio, high)·A
    d KL     = k1: 1      k2: -(lpr - lp)      k3: 1 - exp(lpr - lp)      (corrected: ratio·(d KL + KL))
    d loss   = w·n·(β·d KL - weight·d policy)    by the log-prob,    -w·entropy_coef / tokens    by the entropy

The gradient of the logits follows as in kernels/token_logprobs.py: p_j·(a + b·log p_j) + 1[j = t]·label.

Floor from logits: N·V numbers read and N·V written. From hidden states and a head: 6·N·V·D FLOP (4·N·V·D with a frozen
weight), in slices of tokens whose logits are overwritten by their gradient. Where the gradient of a token is exactly
zero (equal rewards in its group at β = 0, a clipped token, a token of weight 0), zeros are written without reading the
logits a second time. On a CPU such a token also skips the matrix products; on a GPU the host would have to wait for the
number of the other tokens.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, launch, tl, triton, without_autocast
from .linear_logprobs import HeadGradients, empty_gradients, token_slices
from .token_logprobs import (
    NATIVE_LOGITS,
    check_targets,
    contiguous_aligned,
    contiguous_rows,
    native_logits,
    row_config,
    row_stats,
    write_gradient,
    write_zeros,
)

# What the pass returns for each token: the rows of a float32 matrix [len(RESULTS), N].
RESULTS = ("loss", "logprob", "entropy", "ratio", "kl", "clipped_low", "clipped_high", "correction", "grad_logprob")

_POINTER, _MATRIX = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_int64)
_NATIVE = NATIVE_LOGITS + _POINTER * 8 + (ctypes.c_int,) * 3 + _MATRIX * 2


@triton.jit
def _token_terms(  # type: ignore[no-untyped-def]
    logprob, entropy, advantage, norm, old, ref, sampling, entropy_weight, beta, low, high, delta, clip_max,
    CISPO: tl.constexpr, KL: tl.constexpr, CORRECT_KL: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_SAMPLING: tl.constexpr,
):  # fmt: skip
    """-> loss, ratio, kl, clipped_low, clipped_high, correction, d loss / d logprob of one token."""
    before = old if HAS_OLD else logprob
    ratio = tl.exp(logprob - before)
    if CISPO:
        slope = tl.minimum(ratio, high) * advantage
        objective = slope * logprob
        clipped_low = 0.0
    else:
        bounded = tl.minimum(ratio, delta) * advantage
        clipped = tl.minimum(tl.maximum(ratio, low), high) * advantage
        objective = tl.minimum(bounded, clipped)
        outside = tl.where(bounded <= clipped, ratio > delta, (ratio < low) | (ratio > high))  # not where it is NaN
        slope = tl.where(outside, 0.0, ratio * advantage)
        clipped_low = tl.where((ratio < low) & (advantage < 0), 1.0, 0.0)
    clipped_high = tl.where((ratio > high) & (advantage > 0), 1.0, 0.0)
    correction = 1.0
    if HAS_SAMPLING:
        correction = tl.exp(before - sampling)
        objective *= tl.minimum(correction, clip_max)
        slope *= tl.minimum(correction, clip_max)
    kl, kl_slope = 0.0, 0.0
    if KL != 0:
        gap = ref - logprob
        if KL == 1:
            kl, kl_slope = -gap, 1.0
        elif KL == 2:
            kl, kl_slope = gap * gap / 2, -gap
        else:
            excess = tl.exp(gap) - 1
            kl, kl_slope = excess - gap, -excess
        if CORRECT_KL:
            kl, kl_slope = ratio * kl, ratio * (kl_slope + kl)
    loss = norm * (beta * kl - objective) - entropy_weight * entropy
    return loss, ratio, kl, clipped_low, clipped_high, correction, norm * (beta * kl_slope - slope)


# Slices of tokens begin at any address: specialised on the alignment of these pointers, the kernel would compile again.
@triton.jit(
    do_not_specialize=[
        "p_targets",
        "p_sample",
        "p_advantages",
        "p_old",
        "p_ref",
        "p_sampling",
        "p_token_weight",
        "p_results",
        "results_stride",
    ]
)
def _grpo_kernel(  # type: ignore[no-untyped-def]
    p_logits, stride, p_targets, V, inv_temperature, p_sample, p_advantages, p_norm, p_old, p_ref, p_sampling,
    p_token_weight, p_entropy_weight, beta, low, high, delta, clip_max, p_results, results_stride, p_grad, grad_stride,
    CISPO: tl.constexpr, KL: tl.constexpr, CORRECT_KL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_SAMPLING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    p_row, target, sample = p_logits + token * stride, tl.load(p_targets + token), tl.load(p_sample + token)
    scale = inv_temperature * 1.4426950408889634
    maximum, total, weighted, b_last = row_stats(p_row, V, scale, BLOCK, ALIGNED)
    x_target = tl.load(p_row + target).to(tl.float32)
    log_total = tl.log(total)
    logprob = (x_target - maximum) * inv_temperature - log_total
    entropy = log_total - weighted / total * 0.6931471805599453

    norm, entropy_weight = tl.load(p_norm + sample), tl.load(p_entropy_weight)
    if HAS_WEIGHT:
        weight = tl.load(p_token_weight + token)
        norm *= weight
        entropy_weight *= weight
    loss, ratio, kl, clipped_low, clipped_high, correction, grad_logprob = _token_terms(
        logprob, entropy, tl.load(p_advantages + sample), norm,
        tl.load(p_old + token) if HAS_OLD else 0.0, tl.load(p_ref + token) if KL != 0 else 0.0,
        tl.load(p_sampling + token) if HAS_SAMPLING else 0.0, entropy_weight, beta, low, high, delta, clip_max,
        CISPO, KL, CORRECT_KL, HAS_OLD, HAS_SAMPLING,
    )  # fmt: skip
    if HAS_WEIGHT:  # 0 * inf is NaN
        loss, grad_logprob = tl.where(weight == 0, 0.0, loss), tl.where(weight == 0, 0.0, grad_logprob)
    if GRADIENT:
        # In place, no warp may write before all warps have read the target's logit, the rim, and a row so short that
        # every warp holds the whole of it.
        tl.debug_barrier()
    p_out = p_results + token
    tl.store(p_out, loss)
    tl.store(p_out + results_stride, logprob)
    tl.store(p_out + 2 * results_stride, entropy)
    tl.store(p_out + 3 * results_stride, ratio)
    tl.store(p_out + 4 * results_stride, kl)
    tl.store(p_out + 5 * results_stride, clipped_low)
    tl.store(p_out + 6 * results_stride, clipped_high)
    tl.store(p_out + 7 * results_stride, correction)
    tl.store(p_out + 8 * results_stride, grad_logprob)

    if GRADIENT and (grad_logprob == 0) & (entropy_weight == 0):
        write_zeros(p_grad + token * grad_stride, V, BLOCK, ALIGNED)
    elif GRADIENT:
        a = (entropy_weight * entropy - grad_logprob) * inv_temperature
        b = entropy_weight * inv_temperature * 0.6931471805599453
        # log2 p = (x - maximum - log(total) / inv_temperature)·scale
        write_gradient(
            b_last, p_row, p_grad + token * grad_stride, target, V, maximum, log_total / inv_temperature, scale, a, b,
            grad_logprob * inv_temperature, BLOCK, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(p_x, stride, size, p_factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid: rows, and programs that share the `size` elements of each row."""
    factor = tl.load(p_factor)
    if factor != 1.0:
        p_row = p_x + tl.program_id(0).to(tl.int64) * stride
        step = tl.num_programs(1).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(1).to(tl.int64) * BLOCK, size, step):
            o_x = begin + tl.arange(0, BLOCK)
            b_x = tl.load(p_row + o_x, mask=o_x < size).to(tl.float32)
            tl.store(p_row + o_x, (b_x * factor).to(p_x.dtype.element_ty), mask=o_x < size)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss takes for N tokens of S samples, besides their logits. Tensors are contiguous, float32 or int64."""

    targets: Tensor  # [N]
    sample: Tensor  # [N]
    advantages: Tensor  # [S]
    norm: Tensor  # [S], the normaliser of a sample's tokens
    entropy_weight: Tensor  # scalar, entropy_coef / tokens of the step
    old: Tensor | None  # [N] each
    ref: Tensor | None
    sampling: Tensor | None
    token_weight: Tensor | None
    temperature: float
    beta: float
    low: float  # bounds of the ratio: 1 - epsilon
    high: float  # 1 + epsilon_high; cispo: epsilon_high
    delta: float
    clip_max: float
    cispo: bool
    kl: int  # 1, 2 or 3 of k1, k2, k3; 0 without KL
    correct_kl: bool

    def arguments(self) -> tuple[Any, ...]:
        """The arguments `terms` of the ops below."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def of(self, tokens: slice) -> Terms:
        """The terms of some tokens."""
        names = ("targets", "sample", "old", "ref", "sampling", "token_weight")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value[tokens] for name, value in given.items()})


# "Tensor targets, …, Tensor? old, …, float beta, …": the end of each op's schema
_TERMS = ", ".join(f"{field.type} {field.name}".replace(" | None", "?") for field in fields(Terms))


def launch_tokens(logits: Tensor, terms: Terms, impl: str, results: Tensor, grad: Tensor | None) -> None:
    """Fill results [len(RESULTS), N] and, unless None, grad [N, V], which may be `logits` itself."""
    t, (N, V) = terms, logits.shape
    optional = (t.old, t.ref if t.kl else None, t.sampling, t.token_weight)
    if impl == "native":
        run = native.function(f"bicot_fused_grpo_{NATIVE_DTYPES[logits.dtype]}", *_NATIVE)
        addresses = [None if x is None else x.data_ptr() for x in optional]
        numbers = (ctypes.c_double * 6)(t.beta, t.low, t.high, t.delta, t.clip_max, float(t.entropy_weight))
        gradient = (None, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
        per_sample = (t.sample.data_ptr(), t.advantages.data_ptr(), t.norm.data_ptr())
        run(
            *native_logits(logits, t.targets, t.temperature), *per_sample, *addresses, ctypes.addressof(numbers),
            t.cispo, t.kl, t.correct_kl, results.data_ptr(), results.stride(0), *gradient,
        )  # fmt: skip
    elif N:
        pointers = [t.norm if x is None else x for x in optional]  # a pointer that is not read may be any
        target = logits if grad is None else grad
        launch(
            _grpo_kernel, (N,), logits, logits.stride(0), t.targets, V, 1 / t.temperature, t.sample, t.advantages,
            t.norm, *pointers, t.entropy_weight, t.beta, t.low, t.high, t.delta, t.clip_max, results, results.stride(0),
            target, target.stride(0), CISPO=t.cispo, KL=t.kl, CORRECT_KL=t.correct_kl, HAS_OLD=t.old is not None,
            HAS_SAMPLING=t.sampling is not None, HAS_WEIGHT=t.token_weight is not None, GRADIENT=grad is not None,
            **row_config(logits, target),
        )  # fmt: skip


@torch.library.custom_op(
    "bicot::grpo_logits",
    mutates_args=(),
    schema=f"(Tensor logits, bool gradient, str impl, {_TERMS}) -> (Tensor, Tensor)",
)
def grpo_logits(logits: Tensor, gradient: bool, impl: str, *terms: Any) -> tuple[Tensor, Tensor]:
    """-> results [len(RESULTS), N], gradient of the logits (empty unless `gradient`)."""
    given = Terms(*terms)
    check_targets(given.targets, logits.shape[1])
    logits = contiguous_rows(logits) if impl == "native" or not gradient else contiguous_aligned(logits)
    results, grad = _fake_logits(logits, gradient, impl)
    launch_tokens(logits, given, impl, results, grad if gradient else None)
    return results, grad


@grpo_logits.register_fake
def _fake_logits(logits: Tensor, gradient: bool, impl: str, *terms: Any) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient else logits.new_empty(0)
    return _new_results(logits), grad


@torch.library.custom_op(
    "bicot::grpo_logits_", mutates_args=("logits",), schema=f"(Tensor(a!) logits, str impl, {_TERMS}) -> Tensor"
)
def grpo_logits_(logits: Tensor, impl: str, *terms: Any) -> Tensor:
    """Overwrite the logits with their gradient -> results [len(RESULTS), N]."""
    given, results = Terms(*terms), _new_results(logits)
    check_targets(given.targets, logits.shape[1])
    launch_tokens(logits, given, impl, results, logits)
    return results


@grpo_logits_.register_fake
def _fake_logits_(logits: Tensor, impl: str, *terms: Any) -> Tensor:
    return _new_results(logits)


@torch.library.custom_op(
    "bicot::grpo_linear",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, bool[] needed, str impl, {_TERMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def grpo_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool], impl: str, *terms: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> results [len(RESULTS), N], gradients of hidden, weight and bias where `needed`, else empty."""
    results, whole = _new_results(hidden), Terms(*terms)
    check_targets(whole.targets, len(weight))
    gradients = HeadGradients(hidden, weight, needed)
    for tokens in token_slices(hidden, weight):
        logits = F.linear(hidden[tokens], weight, bias)
        given = whole.of(tokens)
        launch_tokens(logits, given, impl, results[:, tokens], logits if any(needed) else None)
        if any(needed):
            gradients.add(tokens, logits, _active_tokens(results[-1, tokens], given))
        del logits  # before those of the next slice are made
    return results, *gradients.result()


@grpo_linear.register_fake
def _fake_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool], impl: str, *terms: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_results(hidden), *empty_gradients(hidden, weight, needed)


def _new_results(like: Tensor) -> Tensor:
    return like.new_empty(len(RESULTS), like.shape[0], dtype=torch.float32)


def _active_tokens(grad_logprob: Tensor, terms: Terms) -> Tensor | None:
    """Indices of the tokens with a gradient; None = all, as always on a GPU: the host would wait for their number."""
    if grad_logprob.is_cuda:
        return None
    slopes = grad_logprob if terms.entropy_weight == 0 else terms.token_weight
    return None if slopes is None else slopes.nonzero()[:, 0]


@torch.library.custom_op("bicot::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, impl: str) -> None:
    """x *= factor, without reading x where the factor is 1 and without asking the device whether it is.

    x is contiguous, or [N, V] with a row stride of more than V; the elements between rows stay as they are.
    """
    if impl == "native":
        if factor != 1:
            x.mul_(factor)
    elif x.numel():
        rows, stride = (1, 0) if x.is_contiguous() else (x.shape[0], x.stride(0))
        size = x.numel() // rows
        grid = (rows, min(triton.cdiv(size, 4096), 2048))
        launch(_scale_kernel, grid, x, stride, size, factor, BLOCK=4096, num_warps=8, enable_fp_fusion=True)


@scale_.register_fake
def _fake_scale_(x: Tensor, factor: Tensor, impl: str) -> None:
    return None


@torch.library.custom_op("bicot::attach_gradients", mutates_args=())
def attach_gradients(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor], impl: str) -> Tensor:
    """A copy of the loss. Its backward pass gives each input its known gradient, times the gradient of the loss.

    It scales the gradients in place, so a second backward pass is an error.
    """
    return loss.clone()


@attach_gradients.register_fake
def _fake_attach(loss: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(loss)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, gradients, ctx.impl = inputs
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.save_for_backward(*gradients)


def _scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    gradients = ctx.saved_tensors
    for gradient in gradients:
        scale_(gradient, grad_loss, ctx.impl)
    scaled = [gradient.detach().to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return None, scaled, [None] * len(scaled), None


attach_gradients.register_autograd(_scaled_gradients, setup_context=_save_gradients)
