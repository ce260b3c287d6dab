"""Rotary embedding of packed tokens, copied to their places in the input of attention; and the adjoint.

A token that several sequences share has a place in each of them. `rope_spread` rotates each query or key head x of a
token, split in halves (a, b), and writes it to every place of the token. Values are copied.

    rotate(x) = (a·cos - b·sin, b·cos + a·sin)                         in float32, rounded once

`rope_gather`, the adjoint, sums the gradients at the places of a token in a fixed order, then rotates back, all in
float32, and rounds once:

    d_x = rotate⁻¹(Σ_places d_place),  rotate⁻¹(a, b) = (a·cos + b·sin, b·cos - a·sin)

qkv holds Hq query heads, then Hkv key heads, then Hkv value heads of each token.

Shapes: N tokens, M places, Hq query and Hkv key/value heads of E elements. qkv [N, (Hq + 2·Hkv)·E], cos and sin
[N, E/2], queries [M, Hq, E], keys and values [M, Hkv, E]. Floor: (N + M)·(Hq + 2·Hkv)·E elements moved, in both ops.
Plain PyTorch rotates in eight launches, copies in three, and sums in the tensors' dtype.

Source: RoFormer (arXiv 2104.09864) in the layout of transformers' `rotate_half`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, choose, forward_only, launch, register, tl, triton
from .rope_kv_write import launch_config


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_spread_ref(qkv: Tensor, cos: Tensor, sin: Tensor, token_at: Tensor, kv_heads: int) -> list[Tensor]:
    """`rope_spread` in plain PyTorch; float64 in, float64 out."""
    E = 2 * cos.shape[1]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.view(len(qkv), qkv.shape[1] // E, E).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    c, s = (table[:, None].to(wide) for table in (cos, sin))
    turned = (_rotate(x.to(wide), c, s).to(qkv.dtype) for x in (q, k))
    return [x.index_select(0, token_at) for x in (*turned, v)]


def rope_gather_ref(
    queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, places: Tensor
) -> Tensor:
    """`rope_gather` in plain PyTorch; float64 in, float64 out."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    token = torch.repeat_interleave(starts.diff())
    c, s = (table[:, None].to(wide) for table in (cos, sin))

    def summed(x: Tensor) -> Tensor:
        total = x.new_zeros(len(cos), *x.shape[1:], dtype=wide)
        return total.index_add_(0, token, x.index_select(0, places).to(wide))

    each = (_rotate(summed(queries), c, -s), _rotate(summed(keys), c, -s), summed(values))
    return torch.cat(list(each), dim=1).to(queries.dtype).flatten(1)


@triton.jit
def _heads(block, HQ: tl.constexpr, HKV: tl.constexpr, HB: tl.constexpr):  # type: ignore[no-untyped-def]
    """For a block of HB heads -> role (0 query, 1 key, 2 value), indices of the heads in it, number of heads in it."""
    Q_BLOCKS: tl.constexpr = (HQ + HB - 1) // HB
    KV_BLOCKS: tl.constexpr = (HKV + HB - 1) // HB
    role, count, heads = 0, block, HQ
    if block >= Q_BLOCKS + KV_BLOCKS:
        role, count, heads = 2, block - Q_BLOCKS - KV_BLOCKS, HKV
    elif block >= Q_BLOCKS:
        role, count, heads = 1, block - Q_BLOCKS, HKV
    return role, count * HB + tl.arange(0, HB), heads


@triton.jit(do_not_specialize=["p_token_at"])  # part of a larger tensor, so its alignment differs between passes
def _spread_kernel(  # type: ignore[no-untyped-def]
    p_qkv, p_cos, p_sin, p_token_at, p_q, p_k, p_v,
    HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, HB: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program takes HB query heads, key heads or value heads of one place."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(p_token_at + place)
    role, o_h, heads = _heads(tl.program_id(1), HQ, HKV, HB)
    o_e = tl.arange(0, EB)[None, :]
    m = (o_h < heads)[:, None] & (o_e < HALF)
    first = tl.where(role == 0, 0, tl.where(role == 1, HQ, HQ + HKV))
    p_a = p_qkv + (token * (HQ + 2 * HKV) + first + o_h[:, None]) * (2 * HALF) + o_e
    b_a = tl.load(p_a, m, other=0).to(tl.float32)
    b_b = tl.load(p_a + HALF, m, other=0).to(tl.float32)
    if role < 2:
        o_table = tl.broadcast_to(token * HALF + o_e, (HB, EB))
        b_cos = tl.load(p_cos + o_table, m, other=0).to(tl.float32)
        b_sin = tl.load(p_sin + o_table, m, other=0).to(tl.float32)
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
    o_out = (place * heads + o_h[:, None]) * (2 * HALF) + o_e
    b_a, b_b = b_a.to(p_q.dtype.element_ty), b_b.to(p_q.dtype.element_ty)
    if role == 0:
        tl.store(p_q + o_out, b_a, m)
        tl.store(p_q + o_out + HALF, b_b, m)
    elif role == 1:
        tl.store(p_k + o_out, b_a, m)
        tl.store(p_k + o_out + HALF, b_b, m)
    else:
        tl.store(p_v + o_out, b_a, m)
        tl.store(p_v + o_out + HALF, b_b, m)


@triton.jit(do_not_specialize=["p_starts", "p_places"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    p_q, p_k, p_v, p_cos, p_sin, p_starts, p_places, p_qkv,
    HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, HB: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program takes HB query heads, key heads or value heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    role, o_h, heads = _heads(tl.program_id(1), HQ, HKV, HB)
    o_e = tl.arange(0, EB)[None, :]
    m = (o_h < heads)[:, None] & (o_e < HALF)
    o_head = o_h[:, None] * (2 * HALF) + o_e
    b_a = tl.zeros((HB, EB), tl.float32)
    b_b = tl.zeros((HB, EB), tl.float32)
    for i in range(tl.load(p_starts + token), tl.load(p_starts + token + 1)):
        o_in = tl.load(p_places + i) * heads * (2 * HALF) + o_head
        if role == 0:
            b_a += tl.load(p_q + o_in, m, other=0).to(tl.float32)
            b_b += tl.load(p_q + o_in + HALF, m, other=0).to(tl.float32)
        elif role == 1:
            b_a += tl.load(p_k + o_in, m, other=0).to(tl.float32)
            b_b += tl.load(p_k + o_in + HALF, m, other=0).to(tl.float32)
        else:
            b_a += tl.load(p_v + o_in, m, other=0).to(tl.float32)
            b_b += tl.load(p_v + o_in + HALF, m, other=0).to(tl.float32)
    if role < 2:
        o_table = tl.broadcast_to(token * HALF + o_e, (HB, EB))
        b_cos = tl.load(p_cos + o_table, m, other=0).to(tl.float32)
        b_sin = tl.load(p_sin + o_table, m, other=0).to(tl.float32)
        b_a, b_b = b_a * b_cos + b_b * b_sin, b_b * b_cos - b_a * b_sin
    first = tl.where(role == 0, 0, tl.where(role == 1, HQ, HQ + HKV))
    p_a = p_qkv + (token * (HQ + 2 * HKV) + first) * (2 * HALF) + o_head
    tl.store(p_a, b_a.to(p_qkv.dtype.element_ty), m)
    tl.store(p_a + HALF, b_b.to(p_qkv.dtype.element_ty), m)


def _run(
    impl: str, name: str, kernel: Any, count: int, q_heads: int, kv_heads: int, half: int, *tensors: Tensor
) -> None:
    """Run the Triton kernel, or the C++ function `name`, for `count` places or tokens."""
    if impl == "native":
        types = (ctypes.c_void_p,) * len(tensors) + (ctypes.c_int64,) * 4 + (ctypes.c_int,)
        run = native.function(f"bicot_{name}_{NATIVE_DTYPES[tensors[0].dtype]}", *types)
        run(*(t.data_ptr() for t in tensors), count, q_heads, kv_heads, half, torch.get_num_threads())
        return
    config = launch_config(half)
    blocks = triton.cdiv(q_heads, config["HB"]) + 2 * triton.cdiv(kv_heads, config["HB"])
    if count:
        launch(kernel, (count, blocks), *tensors, q_heads, kv_heads, half, **config)


def _spread(qkv: Tensor, cos: Tensor, sin: Tensor, token_at: Tensor, kv_heads: int, impl: str) -> list[Tensor]:
    out = _fake_spread(qkv, cos, sin, token_at, kv_heads, impl)
    M, q_heads, E = out[0].shape
    _run(impl, "rope_spread", _spread_kernel, M, q_heads, kv_heads, E // 2, qkv, cos, sin, token_at, *out)
    return out


def _gather(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    places: Tensor,
    out: Tensor,
    impl: str,
) -> None:
    tensors = (queries, keys, values, cos, sin, starts, places, out)
    heads = (queries.shape[1], keys.shape[1])
    _run(impl, "rope_gather", _gather_kernel, len(out), *heads, cos.shape[1], *tensors)


def _fake_spread(qkv: Tensor, cos: Tensor, sin: Tensor, token_at: Tensor, kv_heads: int, impl: str) -> list[Tensor]:
    M, E = token_at.shape[0], 2 * cos.shape[1]  # len() would make torch.compile compile again for every M
    return [qkv.new_empty(M, n, E) for n in (qkv.shape[1] // E - 2 * kv_heads, kv_heads, kv_heads)]


_spread_op = register("rope_spread", _spread, _fake_spread)
_gather_op = register("rope_gather", _gather, lambda *_: None, ("out",))


def rope_spread(
    qkv: Tensor, cos: Tensor, sin: Tensor, token_at: Tensor, kv_heads: int, *, impl: Impl = "auto"
) -> list[Tensor]:
    """Rotate the queries and keys of each token, and copy its heads to all places of the token.

    Not differentiable by itself: `rope_gather` is its adjoint.

    Args:
        qkv: [N, (Hq + 2·Hkv)·E] floating point.
        cos, sin: [N, E/2], dtype of qkv.
        token_at: [M] int64 in [0, N), the token at each place; not checked.
        kv_heads: Hkv.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    All tensors are contiguous and on one device.

    Returns:
        Queries [M, Hq, E], keys and values [M, Hkv, E], dtype of qkv.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: qkv wants a gradient, or `impl="native"` and the C++ library is missing.

    Source: arXiv 2104.09864.
    """
    forward_only("rope_spread", qkv)
    E = 2 * cos.shape[-1]
    if qkv.ndim != 2 or not 0 < E <= 256 or qkv.shape[1] % E or qkv.shape[1] <= 2 * kv_heads * E:
        raise ValueError(f"qkv must be [N, (Hq + 2·{kv_heads})·{E}] for cos {[*cos.shape]}, got {[*qkv.shape]}")
    _check([qkv], [token_at], cos, sin, len(qkv))
    chosen = choose(impl, qkv.device, qkv.dtype)
    if chosen == "torch":
        return rope_spread_ref(qkv, cos, sin, token_at, kv_heads)
    return list(_spread_op(qkv, cos, sin, token_at, kv_heads, chosen))


def rope_gather(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    places: Tensor,
    out: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The adjoint of `rope_spread`: gradients at the places -> gradients of the tokens.

    Args:
        queries: [M, Hq, E] floating point.
        keys, values: [M, Hkv, E], dtype of queries.
        cos, sin: [N, E/2], dtype of queries.
        starts: [N + 1] int64, the index in `places` where the places of each token begin.
        places: int64 in [0, M), the places of each token, in the order in which they are added; not checked.
        out: [N, (Hq + 2·Hkv)·E], dtype of queries; overwritten.
        impl: as for `rope_spread`.

    All tensors are contiguous and on one device.

    Returns:
        out.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: an input wants a gradient, or `impl="native"` and the C++ library is missing.
    """
    forward_only("rope_gather", queries, keys, values)
    N, E = out.shape[0], 2 * cos.shape[-1]
    M, width = len(queries), (queries.shape[1] + 2 * keys.shape[1]) * E
    if queries.shape[2:] != (E,) or keys.shape != (M, keys.shape[1], E) or values.shape != keys.shape:
        shapes = [[*t.shape] for t in (queries, keys, values)]
        raise ValueError(f"queries must be [M, Hq, {E}], keys and values [M, Hkv, {E}], got {shapes}")
    if out.shape != (N, width) or starts.shape != (N + 1,):
        raise ValueError(f"out must be [N, {width}] and starts [N + 1], got {[*out.shape]} and {[*starts.shape]}")
    _check([queries, keys, values, out], [starts, places], cos, sin, N)
    chosen = choose(impl, queries.device, queries.dtype)
    if chosen == "torch":
        return out.copy_(rope_gather_ref(queries, keys, values, cos, sin, starts, places))
    _gather_op(queries, keys, values, cos, sin, starts, places, out, chosen)
    return out


def _check(x: Sequence[Tensor], indices: Sequence[Tensor], cos: Tensor, sin: Tensor, N: int) -> None:
    if cos.ndim != 2 or len(cos) != N or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [N, E/2] of {N} tokens, got {[*cos.shape]} and {[*sin.shape]}")
    like = x[0]
    for dtype, tensors in ((like.dtype, (*x, cos, sin)), (torch.int64, indices)):
        for t in tensors:
            if t.dtype != dtype or t.device != like.device or not t.is_contiguous():
                raise ValueError(
                    f"tensors must be {dtype}, contiguous and on {like.device}, got "
                    f"{[*t.shape]} {t.dtype} with strides {t.stride()} on {t.device}"
                )
