"""The fused pass of `grpo_loss` over the tokens of one stream: log-prob, entropy, the terms of the loss and the
gradient of the logits, while a token's row of logits is still in cache.

Formulas: kernels/grpo_loss.py; their derivatives by the log-prob lp, with n the token's normaliser and w its
own weight (1 without `token_weight`):

    d policy = ratio·A where the branch that the minimum takes is not at its bound, else 0;  cispo: min(ratio, high)·A
    d KL     = k1: 1      k2: -(lpr - lp)      k3: 1 - exp(lpr - lp)      (corrected: ratio·(d KL + KL))
    d loss   = w·n·(β·d KL - weight·d policy)    by the log-prob,    -w·entropy_coef / tokens    by the entropy

and from there the gradient of the logits is that of kernels/token_logprobs.py: p_j·(a + b·log p_j) + 1[j = t]·label.

Floor with logits in: N·V read and N·V written once each. With hidden states and a head, 6·N·V·D FLOP (4 with a frozen
weight), in chunks of tokens whose logits become their gradient in place. A token whose gradient is exactly zero (a
group without spread at β = 0, a clipped token, a token of weight 0) gets zeros unread; on a CPU it also skips the GEMMs
(on a GPU the host would have to wait for the number of those that remain).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, launch, tl, triton
from .linear_logprobs import HeadGradients, empty_gradients, row_chunks
from .token_logprobs import (
    NATIVE_ROWS,
    check_targets,
    dense_rows,
    native_rows,
    row_config,
    row_stats,
    unit_columns,
    write_gradient,
    write_zeros,
)

# What is kept of each token, the columns of a [len(ROWS), N] float32 result.
ROWS = ("loss", "logprob", "entropy", "ratio", "kl", "clipped_low", "clipped_high", "correction", "grad_logprob")

_POINTER, _ROWS = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_int64)
_NATIVE = NATIVE_ROWS + _POINTER * 7 + (ctypes.c_int,) * 3 + _ROWS * 2 + _POINTER


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
        moves = tl.where(bounded <= clipped, ratio <= delta, (low <= ratio) & (ratio <= high))
        slope = tl.where(moves, ratio * advantage, 0.0)
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


# The per-token pointers are slices that begin anywhere: specialising on their alignment would compile again for each.
@triton.jit(
    do_not_specialize=[
        "p_targets",
        "p_sample",
        "p_old",
        "p_ref",
        "p_sampling",
        "p_token_weight",
        "p_rows",
        "rows_stride",
    ]
)
def _rows_kernel(  # type: ignore[no-untyped-def]
    p_logits, stride, p_targets, V, inv_temperature, p_sample, p_advantages, p_norm, p_old, p_ref, p_sampling,
    p_token_weight, p_entropy_weight, beta, low, high, delta, clip_max, p_rows, rows_stride, p_grad, grad_stride,
    CISPO: tl.constexpr, KL: tl.constexpr, CORRECT_KL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_SAMPLING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_row, target, sample = p_logits + row * stride, tl.load(p_targets + row), tl.load(p_sample + row)
    scale = inv_temperature * 1.4426950408889634
    maximum, total, weighted, b_last = row_stats(p_row, V, scale, BLOCK, ALIGNED)
    x_target = tl.load(p_row + target).to(tl.float32)
    log_total = tl.log(total)
    logprob = (x_target - maximum) * inv_temperature - log_total
    entropy = log_total - weighted / total * 0.6931471805599453

    norm, entropy_weight = tl.load(p_norm + sample), tl.load(p_entropy_weight)
    if HAS_WEIGHT:
        weight = tl.load(p_token_weight + row)
        norm *= weight
        entropy_weight *= weight
    loss, ratio, kl, clipped_low, clipped_high, correction, grad_logprob = _token_terms(
        logprob, entropy, tl.load(p_advantages + sample), norm,
        tl.load(p_old + row) if HAS_OLD else 0.0, tl.load(p_ref + row) if KL != 0 else 0.0,
        tl.load(p_sampling + row) if HAS_SAMPLING else 0.0, entropy_weight, beta, low, high, delta, clip_max,
        CISPO, KL, CORRECT_KL, HAS_OLD, HAS_SAMPLING,
    )  # fmt: skip
    if HAS_WEIGHT:  # 0 * inf is NaN
        loss, grad_logprob = tl.where(weight == 0, 0.0, loss), tl.where(weight == 0, 0.0, grad_logprob)
    if GRADIENT:
        # In place, a warp that is ahead would overwrite logits that another one has still to read: the target's, the
        # rim's, and all of a row so short that every warp holds the whole of it.
        tl.debug_barrier()
    p_out = p_rows + row
    tl.store(p_out, loss)
    tl.store(p_out + rows_stride, logprob)
    tl.store(p_out + 2 * rows_stride, entropy)
    tl.store(p_out + 3 * rows_stride, ratio)
    tl.store(p_out + 4 * rows_stride, kl)
    tl.store(p_out + 5 * rows_stride, clipped_low)
    tl.store(p_out + 6 * rows_stride, clipped_high)
    tl.store(p_out + 7 * rows_stride, correction)
    tl.store(p_out + 8 * rows_stride, grad_logprob)

    if GRADIENT and (grad_logprob == 0) & (entropy_weight == 0):
        write_zeros(p_grad + row * grad_stride, V, BLOCK, ALIGNED)
    elif GRADIENT:
        a = (entropy_weight * entropy - grad_logprob) * inv_temperature
        b = entropy_weight * inv_temperature * 0.6931471805599453
        # log2 p = (x - maximum)·scale - log2(total), the second part moved into the logit that it is taken from
        write_gradient(
            b_last, p_row, p_grad + row * grad_stride, target, V, maximum, log_total / inv_temperature, scale, a, b,
            grad_logprob * inv_temperature, BLOCK, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(p_x, stride, size, p_factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows on the grid's first axis; the programs of the second share the `size` elements of each."""
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
    """What the loss knows of N tokens of S samples, besides their logits. float32 and int64, contiguous."""

    targets: Tensor  # [N]
    sample: Tensor  # [N]
    advantages: Tensor  # [S]
    norm: Tensor  # [S], n_t of a sample's tokens
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
    kl: int  # the estimator's number; 0 without KL
    correct_kl: bool

    def arguments(self) -> tuple[Any, ...]:
        """The last arguments of the ops below."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def part(self, tokens: slice) -> Terms:
        """Those of a slice of the tokens."""
        names = ("targets", "sample", "old", "ref", "sampling", "token_weight")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value[tokens] for name, value in given.items()})


# "Tensor targets, …, Tensor? old, …, float beta, …": the end of each op's schema
_TERMS = ", ".join(f"{field.type} {field.name}".replace(" | None", "?") for field in fields(Terms))


def launch_rows(logits: Tensor, terms: Terms, impl: str, rows: Tensor, grad: Tensor | None) -> None:
    """Fill rows [len(ROWS), N] and, unless None, grad [N, V], which may be `logits` itself."""
    t, (N, V) = terms, logits.shape
    optional = (t.old, t.ref if t.kl else None, t.sampling, t.token_weight)
    if impl == "native":
        run = native.function(f"bicot_grpo_rows_{NATIVE_DTYPES[logits.dtype]}", *_NATIVE)
        *addresses, weight = [None if x is None else x.data_ptr() for x in optional]
        numbers = (ctypes.c_double * 6)(t.beta, t.low, t.high, t.delta, t.clip_max, float(t.entropy_weight))
        gradient = (None, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
        per_sample = (t.sample.data_ptr(), t.advantages.data_ptr(), t.norm.data_ptr())
        run(
            *native_rows(logits, t.targets, t.temperature), *per_sample, *addresses, ctypes.addressof(numbers),
            t.cispo, t.kl, t.correct_kl, rows.data_ptr(), rows.stride(0), *gradient, weight,
        )  # fmt: skip
    elif N:
        pointers = [t.norm if x is None else x for x in optional]  # any pointer serves where none is read
        target = logits if grad is None else grad
        launch(
            _rows_kernel, (N,), logits, logits.stride(0), t.targets, V, 1 / t.temperature, t.sample, t.advantages,
            t.norm, *pointers, t.entropy_weight, t.beta, t.low, t.high, t.delta, t.clip_max, rows, rows.stride(0),
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
    """-> rows [len(ROWS), N], gradient of the logits (empty unless `gradient`)."""
    given = Terms(*terms)
    check_targets(given.targets, logits.shape[1])
    logits = unit_columns(logits) if impl == "native" or not gradient else dense_rows(logits)
    rows, grad = _fake_logits(logits, gradient, impl)
    launch_rows(logits, given, impl, rows, grad if gradient else None)
    return rows, grad


@grpo_logits.register_fake
def _fake_logits(logits: Tensor, gradient: bool, impl: str, *terms: Any) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient else logits.new_empty(0)
    return _new_rows(logits), grad


@torch.library.custom_op(
    "bicot::grpo_logits_", mutates_args=("logits",), schema=f"(Tensor(a!) logits, str impl, {_TERMS}) -> Tensor"
)
def grpo_logits_(logits: Tensor, impl: str, *terms: Any) -> Tensor:
    """The gradient takes the place of the logits. -> rows [len(ROWS), N]."""
    given, rows = Terms(*terms), _new_rows(logits)
    check_targets(given.targets, logits.shape[1])
    launch_rows(logits, given, impl, rows, logits)
    return rows


@grpo_logits_.register_fake
def _fake_logits_(logits: Tensor, impl: str, *terms: Any) -> Tensor:
    return _new_rows(logits)


@torch.library.custom_op(
    "bicot::grpo_linear",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, bool[] needed, str impl, {_TERMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def grpo_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool], impl: str, *terms: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> rows [len(ROWS), N], gradients of hidden, weight and bias where `needed`, else empty."""
    rows, whole = _new_rows(hidden), Terms(*terms)
    check_targets(whole.targets, len(weight))
    gradients = HeadGradients(hidden, weight, needed)
    for chunk in row_chunks(hidden, weight):
        logits = F.linear(hidden[chunk], weight, bias)
        part = whole.part(chunk)
        launch_rows(logits, part, impl, rows[:, chunk], logits if any(needed) else None)
        if any(needed):
            gradients.add(chunk, logits, _active_rows(rows[-1, chunk], part))
        del logits  # before the next chunk's are made
    return rows, *gradients.result()


@grpo_linear.register_fake
def _fake_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool], impl: str, *terms: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_rows(hidden), *empty_gradients(hidden, weight, needed)


def _new_rows(like: Tensor) -> Tensor:
    return like.new_empty(len(ROWS), like.shape[0], dtype=torch.float32)


def _active_rows(grad_logprob: Tensor, terms: Terms) -> Tensor | None:
    """Indices of the tokens with a gradient, or None for all. On a GPU all: the host would wait for their number."""
    if grad_logprob.is_cuda:
        return None
    slopes = grad_logprob if terms.entropy_weight == 0 else terms.token_weight
    return None if slopes is None else slopes.nonzero()[:, 0]


@torch.library.custom_op("bicot::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, impl: str) -> None:
    """x *= factor, without reading x where the factor is 1 and without asking the device whether it is.

    x is contiguous, or [N, V] with rows that are farther apart than V elements; what lies between them stays.
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
    """The loss, whose backward pass hands each input its gradient, already known, times the loss's own.

    The gradients are scaled in place, so a second backward pass is an error.
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
