"""Shared code of the ops on a pool of keys and values: float8 quantization, choice of the implementation, checks.

keys and values are [P, Hkv, E], where each of P slots holds one token. A float8_e4m3fn pool also has one float32 scale
for each token and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import Impl, choose

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# A smaller scale is too coarse to divide by. It is replaced by 1, so that the head is stored as 0.
_TINY = torch.finfo(torch.float32).tiny


def converts_fp8(device: torch.device) -> bool:
    """Whether Triton compiles conversions from and to FP8 for this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., E] -> stored numbers in float8_e4m3fn and scales [...] in float32: x is about stored · scale."""
    amax = x.float().abs().amax(-1)
    # division by a tensor: by a Python number, a GPU would multiply by the rounded reciprocal
    scale = amax / amax.new_full((), FP8_MAX)
    scale = scale.where(scale >= _TINY, 1.0)
    return (x.float() / scale[..., None]).to(FP8), scale


def choose_for_pool(impl: Impl, device: torch.device, dtype: torch.dtype, *, fp8: bool, native_fp8: bool) -> str:
    """`choose` for an op on activations of `dtype` and a pool of that dtype or float8.

    Triton takes a float8 pool from compute capability 8.9 on, C++ in ops with `native_fp8`. Without either, "auto" is
    PyTorch.

    Raises:
        ValueError, RuntimeError: as `choose`, and for an implementation that cannot take a float8 pool here.
    """
    if fp8 and device.type == "cuda" and not converts_fp8(device):
        obstacle, refused = "this GPU converts no float8", "triton"
    elif fp8 and device.type != "cuda" and not native_fp8:
        obstacle, refused = "it takes no float8 pool", "native"
    else:
        return choose(impl, device, dtype)
    if impl == refused:
        raise ValueError(f'impl="{impl}" cannot run here: {obstacle}; use impl="torch"')
    return choose("torch" if impl == "auto" else impl, device, dtype)


def check_pool(
    dtype: torch.dtype, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None
) -> None:
    """ValueError unless keys and values are [P, Hkv, E] of `dtype`, or float8 with both scales [P, Hkv] float32."""
    if keys.ndim != 3 or values.shape != keys.shape:
        raise ValueError(f"keys and values must be [P, Hkv, E], got {[*keys.shape]} and {[*values.shape]}")
    if (key_scales is None) != (value_scales is None):
        raise ValueError("give both key_scales and value_scales, or neither")
    scaled, expected = ("without", dtype) if key_scales is None else ("with", FP8)
    if keys.dtype != expected or values.dtype != expected:
        raise ValueError(f"keys and values {scaled} scales must be {expected}, got {keys.dtype} and {values.dtype}")
    for scales in (key_scales, value_scales):
        if scales is not None and (scales.shape != keys.shape[:2] or scales.dtype != torch.float32):
            raise ValueError(f"scales must be {[*keys.shape[:2]]} float32, got {[*scales.shape]} {scales.dtype}")


def check_contiguous(device: torch.device, pools: Sequence[Tensor | None], **others: Tensor) -> None:
    """ValueError unless all tensors are contiguous and on this device. `pools` are those of `check_pool`."""
    named = zip(("keys", "values", "key_scales", "value_scales"), pools, strict=True)
    for name, t in (*named, *others.items()):
        if t is not None and (t.device != device or not t.is_contiguous()):
            raise ValueError(f"{name} must be contiguous on {device}, got strides {t.stride()} on {t.device}")
