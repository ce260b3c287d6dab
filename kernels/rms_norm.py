"""LlamaRMSNorm, with the residual add in front of it, forward and backward.

    total = residual + x                                  with a residual, rounded to its dtype; else total = x
    y = total · r,  r = rsqrt(mean(total²) + eps)         in float32, rounded to x's dtype
    out = weight · y                                      rounded once

With g = weight · d_out (rounded to x's dtype), the gradient of x, and of the residual, is

    d_x = d_total + r · (g - y · mean(g · y)),  d_weight = Σ_N d_out · y        in float32, rounded once

The forward pass rounds at the same points as transformers' residual add and LlamaRMSNorm. The backward pass rounds d_x
once; autograd rounds it before and after it adds d_total.

Shapes: x, residual, out [N, D], weight [D]. Floor: 2·N·D elements moved, 4·N·D with a residual, about 5·N·D FLOPs;
backward 3·N·D elements, 4·N·D with d_total. Plain PyTorch needs nine launches forward and about fourteen backward.

Source: RMSNorm (arXiv 1910.07467), transformers' `LlamaRMSNorm`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import (
    NATIVE_DTYPES,
    Impl,
    choose,
    forward_only,
    launch,
    no_second_derivative,
    processors,
    register,
    tl,
    triton,
    wants_gradient,
)

_NATIVE = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 2 + (ctypes.c_double, ctypes.c_int)
_NATIVE_BACKWARD = (ctypes.c_void_p,) * 6 + (ctypes.c_int64,) * 3 + (ctypes.c_double, ctypes.c_int)
_TOKENS_PER_SUM = 64  # consecutive tokens with one partial sum of the weight's gradient


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    p_x, p_weight, p_residual, p_total, p_out, eps, D: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    o_token = tl.program_id(0).to(tl.int64) * D
    o = tl.arange(0, BLOCK)
    m = o < D
    b_x = tl.load(p_x + o_token + o, m, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(p_residual + o_token + o, m, other=0).to(tl.float32)
        b_sum = (b_r + b_x).to(p_total.dtype.element_ty)
        tl.store(p_total + o_token + o, b_sum, m)
        b_x = b_sum.to(tl.float32)
    b_y = (b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)).to(p_out.dtype.element_ty)
    b_w = tl.load(p_weight + o, m, other=0).to(tl.float32)
    tl.store(p_out + o_token + o, (b_w * b_y.to(tl.float32)).to(p_out.dtype.element_ty), m)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    p_total, p_weight, p_dout, p_dtotal, p_dx, p_dweight, size, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_DTOTAL: tl.constexpr, HAS_DWEIGHT: tl.constexpr,
):  # fmt: skip
    """Each program takes every `num_programs`-th token, and sums the weight's gradient over its tokens."""
    dtype = p_dx.dtype.element_ty
    o = tl.arange(0, BLOCK)
    m = o < D
    b_w = tl.load(p_weight + o, m, other=0).to(tl.float32)
    b_dweight = tl.zeros((BLOCK,), tl.float32)
    for o_token in range(tl.program_id(0).to(tl.int64) * D, size, tl.num_programs(0) * D):
        b_x = tl.load(p_total + o_token + o, m, other=0).to(tl.float32)
        b_dout = tl.load(p_dout + o_token + o, m, other=0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
        b_y = b_x * scale
        if HAS_DWEIGHT:
            b_dweight += b_dout * b_y.to(dtype).to(tl.float32)
        b_g = (b_w * b_dout).to(dtype).to(tl.float32)
        b_dx = scale * (b_g - b_y * (tl.sum(b_g * b_y, 0) / D))
        if HAS_DTOTAL:
            b_dx += tl.load(p_dtotal + o_token + o, m, other=0).to(tl.float32)
        tl.store(p_dx + o_token + o, b_dx.to(dtype), m)
    if HAS_DWEIGHT:
        tl.store(p_dweight + tl.program_id(0).to(tl.int64) * D + o, b_dweight, m)


def launch_config(D: int) -> dict[str, Any]:
    """A token is one block, with eight elements a thread if 16 warps are enough."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}


def _run(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, total: Tensor | None, impl: str) -> Tensor:
    """Write residual + x to `total`, which may be `residual`, and return the norm."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    N, D = x.shape
    if impl == "native":
        if total is not None and residual is not None and total is not residual:
            total.copy_(residual)
        added = None if total is None else total.data_ptr()
        run = native.function(f"bicot_rms_norm_{NATIVE_DTYPES[x.dtype]}", *_NATIVE)
        run(x.data_ptr(), weight.data_ptr(), added, out.data_ptr(), N, D, eps, torch.get_num_threads())
    elif N:
        has_residual = residual is not None
        config = launch_config(D)
        launch(_rms_norm_kernel, (N,), x, weight, residual, total, out, eps, D, HAS_RESIDUAL=has_residual, **config)
    return out


def _launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, impl: str) -> Tensor:
    return _run(x, weight, eps, residual, residual, impl)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = register("rms_norm", _launch, _fake, ("residual",))


def _launch_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """-> out, total (empty without a residual)."""
    total = x.new_empty(0 if residual is None else x.shape)
    return _run(x, weight, eps, residual, None if residual is None else total, impl), total


def _fake_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    return _fake(x), x.new_empty(0 if residual is None else x.shape)


def _launch_backward(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, trains: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """-> d_x, d_weight (empty if the weight does not train)."""
    d_out, weight = d_out.contiguous(), weight.contiguous()
    d_total = None if d_total is None else d_total.contiguous()
    N, D = total.shape
    d_x = torch.empty_like(total)
    native_impl = impl == "native"
    # float32 sums, one for each program or for each _TOKENS_PER_SUM tokens, are added in a fixed order
    num_sums = -(-N // _TOKENS_PER_SUM) if native_impl else min(N, 2 * processors(total.device, 2))
    sums = total.new_empty(num_sums, D, dtype=torch.float32) if trains else None
    if native_impl:
        pointers = [None if t is None else t.data_ptr() for t in (total, weight, d_out, d_total, d_x, sums)]
        run = native.function(f"bicot_rms_norm_backward_{NATIVE_DTYPES[total.dtype]}", *_NATIVE_BACKWARD)
        run(*pointers, N, D, _TOKENS_PER_SUM, eps, torch.get_num_threads())
    elif N:
        launch(
            _backward_kernel, (num_sums,), total, weight, d_out, d_total, d_x, sums, N * D, eps, D,
            HAS_DTOTAL=d_total is not None, HAS_DWEIGHT=trains, **launch_config(D),
        )  # fmt: skip
    return d_x, weight.new_empty(0) if sums is None else sums.sum(0).to(weight.dtype)


def _fake_backward(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, eps: float, trains: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total), weight.new_empty(len(weight) if trains else 0)


_add_op = register("add_rms_norm", _launch_add, _fake_add)
_backward_op = register("rms_norm_backward", _launch_backward, _fake_backward)


class _Norm(torch.autograd.Function):
    """An autograd.Function, because autograd registered with the op costs the host three times as much."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        out, total = _add_op(x, weight, eps, residual, impl)
        ctx.save_for_backward(x if residual is None else total, weight)
        ctx.eps, ctx.has_residual, ctx.impl = eps, residual is not None, impl
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative("rms_norm")
        total, weight = ctx.saved_tensors
        d_total = d_total if ctx.has_residual else None
        if d_out is None:
            return d_total, None, None, d_total, None
        trains = ctx.needs_input_grad[1]
        d_x, d_weight = _backward_op(d_out, d_total, total.contiguous(), weight, ctx.eps, trains, ctx.impl)
        return d_x, d_weight if trains else None, None, d_x if ctx.has_residual else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """LlamaRMSNorm of x, or of `residual + x`, which then overwrites the residual.

    Differentiable without a residual; with one, `add_rms_norm` is differentiable.

    Args:
        x: [N, D] floating point.
        weight: [D], dtype and device of x.
        eps: added to the mean square.
        residual: [N, D] contiguous, dtype and device of x: `residual += x` in place, then the norm of the sum.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    Returns:
        [N, D], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: a residual is given and an input wants a gradient, or `impl="native"` and the C++ library is
            missing.

    Source: arXiv 1910.07467.
    """
    if residual is not None:
        forward_only("rms_norm with a residual", x, weight, residual)
    chosen = _check(x, weight, residual, impl)
    if residual is not None and not residual.is_contiguous():
        raise ValueError(f"residual is written in place and must be contiguous, got strides {residual.stride()}")
    if chosen == "torch":
        return rms_norm_ref(x, weight, eps, residual)
    if residual is None and wants_gradient(x, weight):
        return _Norm.apply(x, weight, eps, None, chosen)[0]
    return _op(x, weight, eps, residual, chosen)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum of x and the residual stream, and its LlamaRMSNorm. Differentiable.

    Args:
        x: [N, D] floating point.
        residual: [N, D], dtype and device of x.
        weight: [D], dtype and device of x.
        eps: added to the mean square.
        impl: as for `rms_norm`.

    Returns:
        The norm and the sum, both [N, D], dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an `impl` that cannot run.
        RuntimeError: `impl="native"` and the C++ library is missing.

    Source: arXiv 1910.07467.
    """
    chosen = _check(x, weight, residual, impl)
    if chosen == "torch":
        total = residual + x
        return rms_norm_ref(total, weight, eps), total
    run = _Norm.apply if wants_gradient(x, residual, weight) else _add_op
    return run(x, weight, eps, residual.contiguous(), chosen)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, impl: Impl) -> str:
    """Check the arguments -> the implementation that runs."""
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"x must be [N, D] and weight [D] alike in dtype and device, got {_of(x)} and {_of(weight)}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"residual must be like x, {_of(x)}, got {_of(residual)}")
    return choose(impl, x.device, x.dtype)


def _of(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"
