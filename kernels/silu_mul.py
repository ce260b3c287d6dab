"""silu(gate) · up, the activation of a gated feed-forward layer. Forward only: it serves the decoder.

    out = silu(gate) · up,  silu(g) = g / (1 + exp(-g))

gate and up are the halves of one product, as a fused gate/up projection leaves them. float32 inside; silu is rounded
to the dtype before it is multiplied, as `F.silu(gate) * up` does.

Shapes: gate_up [N, 2·I], out [N, I]. Floor: 3·N·I elements moved, about 5·N·I FLOPs.

Source: SwiGLU (arXiv 2002.05202), transformers' `LlamaMLP`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, choose, forward_only, launch, register, tl, triton

_NATIVE = (ctypes.c_void_p,) * 2 + (ctypes.c_int64,) * 2 + (ctypes.c_int,)
_CONFIG = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}  # eight elements a thread


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_mul_kernel(p_gate_up, p_out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    p_gate = p_gate_up + row * (2 * SIZE) + o
    b_gate = tl.load(p_gate, m, other=0).to(tl.float32)
    b_up = tl.load(p_gate + SIZE, m, other=0).to(tl.float32)
    b_e = tl.exp(-tl.abs(b_gate))  # never overflows
    b_silu = (tl.where(b_gate < 0, b_gate * b_e, b_gate) / (1 + b_e)).to(p_out.dtype.element_ty)
    tl.store(p_out + row * SIZE + o, (b_silu.to(tl.float32) * b_up).to(p_out.dtype.element_ty), m)


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


_op = register("silu_mul", _launch, _fake)


def silu_mul(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu of the first half of the columns, times the second half. Not differentiable.

    Args:
        gate_up: [N, 2·I] floating point.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    Returns:
        [N, I], dtype of gate_up.

    Raises:
        ValueError: another shape, or an `impl` that cannot run.
        RuntimeError: gate_up wants a gradient, or `impl="native"` and the C++ library is missing.

    Source: arXiv 2002.05202.
    """
    forward_only("silu_mul", gate_up)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [N, 2·I], got {list(gate_up.shape)}")
    chosen = choose(impl, gate_up.device, gate_up.dtype)
    return silu_mul_ref(gate_up) if chosen == "torch" else _op(gate_up, chosen)
