"""LlamaRMSNorm, with the residual add in front of it. Forward only: it serves the decoder.

    residual := residual + x,  x = residual               with a residual, in place, rounded to its dtype
    y = x · rsqrt(mean(x²) + eps)                         in float32, rounded to x's dtype
    out = weight · y                                      rounded once

The roundings are those of transformers' LlamaRMSNorm after the model's own residual add.

Shapes: x, residual, out [N, D], weight [D]. Floor: 2·N·D elements moved, 4·N·D with a residual, about 5·N·D FLOPs.
Plain PyTorch takes nine launches; a decode step has two norms a layer, and their rows fit a GPU's L2 cache.

Source: RMSNorm (arXiv 1910.07467), transformers' `LlamaRMSNorm`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, choose, forward_only, launch, register, tl, triton

_NATIVE = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 2 + (ctypes.c_double, ctypes.c_int)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    p_x, p_weight, p_residual, p_out, eps, D: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * D
    o = tl.arange(0, BLOCK)
    m = o < D
    b_x = tl.load(p_x + row + o, m, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(p_residual + row + o, m, other=0).to(tl.float32)
        b_sum = (b_r + b_x).to(p_residual.dtype.element_ty)
        tl.store(p_residual + row + o, b_sum, m)
        b_x = b_sum.to(tl.float32)
    b_y = (b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)).to(p_out.dtype.element_ty)
    b_w = tl.load(p_weight + o, m, other=0).to(tl.float32)
    tl.store(p_out + row + o, (b_w * b_y.to(tl.float32)).to(p_out.dtype.element_ty), m)


def launch_config(D: int) -> dict[str, Any]:
    """A row is one block, eight elements a thread as long as 16 warps hold it."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}


def _launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, impl: str) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    N, D = x.shape
    if impl == "native":
        added = None if residual is None else residual.data_ptr()
        run = native.function(f"bicot_rms_norm_{NATIVE_DTYPES[x.dtype]}", *_NATIVE)
        run(x.data_ptr(), weight.data_ptr(), added, out.data_ptr(), N, D, eps, torch.get_num_threads())
    elif N:
        has_residual = residual is not None
        launch(_rms_norm_kernel, (N,), x, weight, residual, out, eps, D, HAS_RESIDUAL=has_residual, **launch_config(D))
    return out


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = register("rms_norm", _launch, _fake, ("residual",))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """LlamaRMSNorm of x, or of `residual + x`, which then takes the residual's place. Not differentiable.

    Args:
        x: [N, D] floating point.
        weight: [D], dtype and device of x.
        eps: added to the mean square.
        residual: [N, D] contiguous, dtype and device of x: `residual += x` in place, and the norm is of that sum.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    Returns:
        [N, D], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: x or weight wants a gradient, or `impl="native"` and the C++ library is missing.

    Source: arXiv 1910.07467.
    """
    forward_only("rms_norm", x, weight)
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"x must be [N, D] and weight [D] alike in dtype and device, got {_of(x)} and {_of(weight)}")
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            raise ValueError(f"residual must be like x, {_of(x)}, got {_of(residual)}")
        if not residual.is_contiguous():
            raise ValueError(f"residual is written in place and must be contiguous, got strides {residual.stride()}")
    chosen = choose(impl, x.device, x.dtype)
    if chosen == "torch":
        return rms_norm_ref(x, weight, eps, residual)
    return _op(x, weight, eps, residual, chosen)


def _of(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"
