"""Rotary embedding of queries and keys, and the write of keys and values to the KV pool. Forward only.

A query or key head x of a token at position p, split in halves (a, b), becomes

    rotate(x) = (a·cos_p - b·sin_p, b·cos_p + a·sin_p)                 in float32, rounded once

qkv holds Hq query heads, then Hkv key heads, then Hkv value heads of each token. Queries are rotated in place; rotated
keys and values are written to the token's slot of the pool. A pool of float8_e4m3fn stores x / scale, rounded to
nearest, with one scale max|x| / 448 for each head of each token.

Shapes: N tokens, Hq query and Hkv key/value heads of E elements, P slots, L positions. qkv [N, (Hq + 2·Hkv)·E], cos
and sin [L, E/2], keys and values [P, Hkv, E], scales [P, Hkv]. Floor: 2·N·(Hq + 2·Hkv)·E elements moved, about
3·N·(Hq + Hkv)·E FLOPs.

Source: RoFormer (arXiv 2104.09864) in the layout of transformers' `rotate_half`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, forward_only, launch, register, tl, triton
from .kv_pool import check_contiguous, check_pool, choose_for_pool, quantize_fp8

_NATIVE = (ctypes.c_void_p,) * 7 + (ctypes.c_int64,) * 6 + (ctypes.c_int, ctypes.c_void_p)


def rope_kv_write_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    _, kv_heads, E = keys.shape
    q, k, v = qkv.view(len(qkv), qkv.shape[1] // E, E).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    c, s = (table[positions][:, None].to(wide) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)

    q.copy_(rotate(q))
    for x, pool, scales in ((rotate(k), keys, key_scales), (v, values, value_scales)):
        if scales is not None:
            x, scales[slots] = quantize_fp8(x)
        pool[slots] = x
    return q


@triton.jit
def _store_head(b_a, b_b, p_pool, p_scales, o_head, o_a, m_head, m_a, HALF: tl.constexpr, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write both halves [HB, EB] of some heads to the pool; with FP8, scale them and write the scales."""
    if FP8:
        b_amax = tl.maximum(tl.max(tl.abs(b_a), 1), tl.max(tl.abs(b_b), 1))
        b_scale = tl.div_rn(b_amax, tl.full(b_amax.shape, 448, tl.float32))
        b_scale = tl.where(b_scale >= 1.1754943508222875e-38, b_scale, 1)
        tl.store(p_scales + o_head, b_scale, m_head)
        b_divisor = tl.broadcast_to(b_scale[:, None], b_a.shape)
        b_a, b_b = tl.div_rn(b_a, b_divisor), tl.div_rn(b_b, b_divisor)
    p_a = p_pool + o_head[:, None] * (2 * HALF) + o_a
    tl.store(p_a, b_a.to(p_pool.dtype.element_ty), m_a)
    tl.store(p_a + HALF, b_b.to(p_pool.dtype.element_ty), m_a)


@triton.jit
def _rope_kv_write_kernel(  # type: ignore[no-untyped-def]
    p_qkv, p_cos, p_sin, p_positions, p_slots, p_keys, p_values, p_key_scales, p_value_scales,
    HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, HB: tl.constexpr, EB: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program takes HB query heads, key heads or value heads of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    Q_BLOCKS: tl.constexpr = (HQ + HB - 1) // HB
    KV_BLOCKS: tl.constexpr = (HKV + HB - 1) // HB
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_e = tl.arange(0, EB)[None, :]
    first, count, heads = 0, block, HQ  # of queries, keys or values: first head, block in them, number of heads
    if block >= Q_BLOCKS + KV_BLOCKS:
        first, count, heads = HQ + HKV, block - Q_BLOCKS - KV_BLOCKS, HKV
    elif block >= Q_BLOCKS:
        first, count, heads = HQ, block - Q_BLOCKS, HKV
    o_h = count * HB + tl.arange(0, HB)
    m_h = o_h < heads
    m = m_h[:, None] & (o_e < HALF)
    p_a = p_qkv + (token * (HQ + 2 * HKV) + first + o_h[:, None]) * (2 * HALF) + o_e
    b_a = tl.load(p_a, m, other=0).to(tl.float32)
    b_b = tl.load(p_a + HALF, m, other=0).to(tl.float32)
    if block < Q_BLOCKS + KV_BLOCKS:
        # every head reads cos and sin again, from L1: to share them, heads would need shared memory
        o_table = tl.broadcast_to(tl.load(p_positions + token) * HALF + o_e, (HB, EB))
        b_cos = tl.load(p_cos + o_table, m, other=0).to(tl.float32)
        b_sin = tl.load(p_sin + o_table, m, other=0).to(tl.float32)
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
    if block < Q_BLOCKS:
        tl.store(p_a, b_a.to(p_qkv.dtype.element_ty), m)
        tl.store(p_a + HALF, b_b.to(p_qkv.dtype.element_ty), m)
    else:
        # rounded first, so that the scale is computed from the numbers that a pool of qkv's dtype would store
        b_a = b_a.to(p_qkv.dtype.element_ty).to(tl.float32)
        b_b = b_b.to(p_qkv.dtype.element_ty).to(tl.float32)
        o_head = tl.load(p_slots + token) * HKV + o_h
        if block < Q_BLOCKS + KV_BLOCKS:
            _store_head(b_a, b_b, p_keys, p_key_scales, o_head, o_e, m_h, m, HALF, FP8)
        else:
            _store_head(b_a, b_b, p_values, p_value_scales, o_head, o_e, m_h, m, HALF, FP8)


def launch_config(half: int) -> dict[str, Any]:
    """One warp takes as many heads as have 256 pairs, so that a thread reads 16 bytes of each half."""
    EB = triton.next_power_of_2(half)
    return {"HB": max(1, min(16, 256 // EB)), "EB": EB, "num_warps": 1, "enable_fp_fusion": True}


def _launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    impl: str,
) -> None:
    N, width = qkv.shape
    P, kv_heads, E = keys.shape
    q_heads, half, L = width // E - 2 * kv_heads, E // 2, len(cos)
    if impl == "native":
        pointers = (t.data_ptr() for t in (qkv, cos, sin, positions, slots, keys, values))
        outside = ctypes.c_int64()
        run = native.function(f"bicot_rope_kv_write_{NATIVE_DTYPES[qkv.dtype]}", *_NATIVE)
        run(*pointers, N, q_heads, kv_heads, half, L, P, torch.get_num_threads(), ctypes.byref(outside))
        if (n := outside.value) < N:
            at = f"positions[{n}] = {int(positions[n])}, slots[{n}] = {int(slots[n])}"
            raise IndexError(f"{at}: there are {L} positions and {P} slots")
    elif N:
        config = launch_config(half)
        blocks = triton.cdiv(q_heads, config["HB"]) + 2 * triton.cdiv(kv_heads, config["HB"])
        launch(
            _rope_kv_write_kernel, (N, blocks), qkv, cos, sin, positions, slots, keys, values, key_scales, value_scales,
            q_heads, kv_heads, half, FP8=key_scales is not None, **config,
        )  # fmt: skip


_WRITTEN = ("qkv", "keys", "values", "key_scales", "value_scales")
_op = register("rope_kv_write", _launch, lambda *_: None, _WRITTEN)


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, pools: tuple[Tensor | None, ...]
) -> None:
    keys, values, *scales = pools
    assert keys is not None and values is not None
    check_pool(qkv.dtype, keys, values, *scales)
    _, kv_heads, E = keys.shape
    if E % 2 or not 0 < E <= 256:
        raise ValueError(f"keys and values must be [P, Hkv, E], E even and up to 256, got {[*keys.shape]}")
    if qkv.ndim != 2 or qkv.shape[1] % E or qkv.shape[1] <= 2 * kv_heads * E:
        raise ValueError(f"qkv must be [N, (Hq + 2·{kv_heads})·{E}] for keys {[*keys.shape]}, got {[*qkv.shape]}")
    if cos.ndim != 2 or cos.shape[1] != E // 2 or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [L, {E // 2}], got {[*cos.shape]} and {[*sin.shape]}")
    if cos.dtype != qkv.dtype or sin.dtype != qkv.dtype:
        raise ValueError(f"cos and sin must be {qkv.dtype} as qkv, got {cos.dtype} and {sin.dtype}")
    for name, x in (("positions", positions), ("slots", slots)):
        if x.shape != qkv.shape[:1] or x.dtype != torch.int64:
            raise ValueError(f"{name} must be [{len(qkv)}] int64, got {[*x.shape]} {x.dtype}")
    check_contiguous(qkv.device, pools, qkv=qkv, cos=cos, sin=sin, positions=positions, slots=slots)


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Rotate queries in place; write rotated keys and values to the pool. Not differentiable.

    Args:
        qkv: [N, (Hq + 2·Hkv)·E] floating point; its queries are overwritten, and its keys may be.
        cos, sin: [L, E/2], dtype of qkv.
        positions: [N] int64 in [0, L).
        slots: [N] int64 in [0, P), distinct; if tokens share a slot, it keeps numbers of any of them.
        keys, values: [P, Hkv, E], dtype of qkv, or float8_e4m3fn with scales.
        key_scales, value_scales: [P, Hkv] float32, for each token and head: max|x| / 448, or 1 if that is not a normal
            number.
        impl: "triton" (CUDA; a float8 pool needs a GPU of compute capability 8.9), "native" (C++ on the CPU, float32
            or bfloat16 pools), "torch", or "auto", the first that can run.

    All tensors are contiguous and on one device.

    Returns:
        The rotated queries [N, Hq, E], a view of qkv.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        IndexError: the C++ kernel found a position or slot out of range; nothing is written. A GPU does not check this,
            because it would cost a launch.
        RuntimeError: qkv, keys or values want a gradient, or `impl="native"` and the C++ library is missing.

    Source: arXiv 2104.09864.
    """
    forward_only("rope_kv_write", qkv, keys, values)
    _check(qkv, cos, sin, positions, slots, (keys, values, key_scales, value_scales))
    chosen = choose_for_pool(impl, qkv.device, qkv.dtype, fp8=key_scales is not None, native_fp8=False)
    if chosen == "torch":
        return rope_kv_write_ref(qkv, cos, sin, positions, slots, keys, values, key_scales, value_scales)
    _op(qkv, cos, sin, positions, slots, keys, values, key_scales, value_scales, chosen)
    _, kv_heads, E = keys.shape
    return qkv.view(len(qkv), qkv.shape[1] // E, E)[:, : -2 * kv_heads]
