"""silu(gate) · up, the activation of a gated feed-forward layer, forward and backward.

    out = silu(gate) · up,  silu(g) = g · s,  s = 1 / (1 + exp(-g))
    d_gate = d_out · up · s · (1 + g · (1 - s)),  d_up = d_out · silu(gate)

gate and up are the halves of the output of a fused gate/up projection. Computed in float32; silu is rounded to the
dtype before it is multiplied, as in `F.silu(gate) * up`. d_gate is rounded once; autograd also rounds d_out · up.

Shapes: gate_up [N, 2·I], out [N, I]. Floor: 3·N·I elements moved, about 5·N·I FLOPs; backward 5·N·I elements.

Source: SwiGLU (arXiv 2002.05202), transformers' `LlamaMLP`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import (
    NATIVE_DTYPES,
    Impl,
    choose,
    launch,
    no_second_derivative,
    register,
    tl,
    triton,
    wants_gradient,
)

_NATIVE = (ctypes.c_void_p,) * 2 + (ctypes.c_int64,) * 2 + (ctypes.c_int,)
_NATIVE_BACKWARD = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 2 + (ctypes.c_int,)
_CONFIG = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}  # eight elements a thread


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def silu(b_x):  # type: ignore[no-untyped-def]
    b_e = tl.exp(-tl.abs(b_x))  # never overflows
    return tl.where(b_x < 0, b_x * b_e, b_x) / (1 + b_e)


@triton.jit
def _silu_mul_kernel(p_gate_up, p_out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):  # type: ignore[no-untyped-def]
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    p_gate = p_gate_up + token * (2 * SIZE) + o
    b_gate = tl.load(p_gate, m, other=0).to(tl.float32)
    b_up = tl.load(p_gate + SIZE, m, other=0).to(tl.float32)
    b_silu = silu(b_gate).to(p_out.dtype.element_ty)
    tl.store(p_out + token * SIZE + o, (b_silu.to(tl.float32) * b_up).to(p_out.dtype.element_ty), m)


@triton.jit
def _backward_kernel(p_gate_up, p_dout, p_dgate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype = p_dgate_up.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    o_gate = token * (2 * SIZE) + o
    b_gate = tl.load(p_gate_up + o_gate, m, other=0).to(tl.float32)
    b_up = tl.load(p_gate_up + o_gate + SIZE, m, other=0).to(tl.float32)
    b_dout = tl.load(p_dout + token * SIZE + o, m, other=0).to(tl.float32)
    b_e = tl.exp(-tl.abs(b_gate))
    b_s = tl.where(b_gate < 0, b_e, 1) / (1 + b_e)
    b_silu = b_gate * b_s
    tl.store(p_dgate_up + o_gate, (b_dout * b_up * (b_s + b_silu * (1 - b_s))).to(dtype), m)
    tl.store(p_dgate_up + o_gate + SIZE, (b_dout * b_silu.to(dtype).to(tl.float32)).to(dtype), m)


def _launch(gate_up: Tensor, impl: str) -> Tensor:
    gate_up = gate_up.contiguous()
    N, width = gate_up.shape
    size = width // 2
    out = gate_up.new_empty(N, size)
    if impl == "native":
        run = native.function(f"bicot_silu_mul_{NATIVE_DTYPES[gate_up.dtype]}", *_NATIVE)
        run(gate_up.data_ptr(), out.data_ptr(), N, size, torch.get_num_threads())
    elif out.numel():
        launch(_silu_mul_kernel, (N, triton.cdiv(size, _CONFIG["BLOCK"])), gate_up, out, size, **_CONFIG)
    return out


def _fake(gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _launch_backward(d_out: Tensor, gate_up: Tensor, impl: str) -> Tensor:
    d_out, gate_up = d_out.contiguous(), gate_up.contiguous()
    d_gate_up = torch.empty_like(gate_up)
    N, size = d_out.shape
    if impl == "native":
        run = native.function(f"bicot_silu_mul_backward_{NATIVE_DTYPES[gate_up.dtype]}", *_NATIVE_BACKWARD)
        run(gate_up.data_ptr(), d_out.data_ptr(), d_gate_up.data_ptr(), N, size, torch.get_num_threads())
    elif d_out.numel():
        grid = (N, triton.cdiv(size, _CONFIG["BLOCK"]))
        launch(_backward_kernel, grid, gate_up, d_out, d_gate_up, size, **_CONFIG)
    return d_gate_up


def _fake_backward(d_out: Tensor, gate_up: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


_op = register("silu_mul", _launch, _fake)
_backward_op = register("silu_mul_backward", _launch_backward, _fake_backward)


class _SiluMul(torch.autograd.Function):
    """An autograd.Function, because autograd registered with the op costs the host three times as much."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.impl = impl
        return _op(gate_up, impl)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        no_second_derivative("silu_mul")
        return _backward_op(d_out, *ctx.saved_tensors, ctx.impl), None


def silu_mul(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) · up for gate_up = [gate, up]. Differentiable.

    Args:
        gate_up: [N, 2·I] floating point.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    Returns:
        [N, I], dtype of gate_up.

    Raises:
        ValueError: another shape, or an `impl` that cannot run.
        RuntimeError: `impl="native"` and the C++ library is missing.

    Source: arXiv 2002.05202.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [N, 2·I], got {list(gate_up.shape)}")
    chosen = choose(impl, gate_up.device, gate_up.dtype)
    if chosen == "torch":
        return silu_mul_ref(gate_up)
    return (_SiluMul.apply if wants_gradient(gate_up) else _op)(gate_up, chosen)
