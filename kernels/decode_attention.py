"""Attention of one query token per sequence over keys and values in a pool of slots, forward only.

The keys of sequence r fill two segments of slots: a prefix, which sequences may share, and its own keys. Key j is in
slot `prefix_start + j` if j < prefix_length, else in slot `start + j - prefix_length`. Query head h reads key and value
head h // (Hq // Hkv):

    out_rh = Σ_j p_rhj·v_j,   p_rh = softmax_j(scale · q_rh·k_j)

In a pool of float8_e4m3fn, k_j = key_scale_j · stored number, and v_j likewise, with one float32 scale for each token
and head. The scale multiplies the score or the probability instead of the E numbers.

Shapes: q [R, Hq, E] for R sequences, keys and values [P, Hkv, E], scales [P, Hkv], the output [R, Hq·E]; starts and
lengths [R]. Floor: the keys and values of each sequence are read once, 2·Hkv·E numbers a key; 4·Hq·E FLOPs a key.
PyTorch first gathers all sequences into a padded rectangle, so it reads the keys, writes them, and reads them again.

Source: Flash-Decoding (Dao et al., 2023), which also combines the partial softmaxes of split keys.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, forward_only, launch, processors, register, tl, triton
from .kv_pool import check_contiguous, check_pool, choose_for_pool

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_NATIVE = (_POINTER, _INTEGER, *(_POINTER,) * 8, *(_INTEGER,) * 5, ctypes.c_double, ctypes.c_int, *(_POINTER,) * 2)
_SEGMENTS = ("prefix_start", "prefix_length", "start", "length")
_LOG2E = 1.4426950408889634
_MAX_DIM = 256
_MAX_SPLITS = 64
_SPLIT_KEYS = 256  # the fewest keys of a program that shares a sequence: eight tiles of Janus's heads


def decode_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The formula above in plain PyTorch, on sequences gathered into a rectangle; float64 in, float64 out.

    The rectangle is as wide as the longest sequence, whose length the host reads from the device. torch.compile cannot
    do that, and makes the rectangle P wide.
    """
    R, Hq, E = q.shape
    P, Hkv, _ = keys.shape
    total = prefix_length + length
    width = P if torch.compiler.is_compiling() or not R else int(total.amax())
    j = torch.arange(width, device=q.device)
    inside = j < total[:, None]
    slots = j + torch.where(j < prefix_length[:, None], prefix_start[:, None], (start - prefix_length)[:, None])
    slots = slots.where(inside, 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (pool[slots].to(wide) for pool in (keys, values))  # [R, width, Hkv, E]
    if key_scales is not None and value_scales is not None:
        k, v = k * key_scales[slots][..., None], v * value_scales[slots][..., None]
    scores = torch.einsum("rhge,rjhe->rhgj", q.view(R, Hkv, Hq // Hkv, E).to(wide), k) * scale
    p = scores.masked_fill(~inside[:, None, None], -torch.inf).softmax(-1)
    v = v.masked_fill(~inside[..., None, None], 0)  # slot 0 may hold anything, and 0·NaN is NaN
    return torch.einsum("rhgj,rjhe->rhge", p, v).reshape(R, Hq * E).to(q.dtype)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    p_q, q_stride, p_keys, p_values, p_key_scales, p_value_scales, p_prefix_start, p_prefix_length, p_start, p_length,
    p_out, p_top, p_sum, scale, HKV: tl.constexpr, G: tl.constexpr, E: tl.constexpr, GB: tl.constexpr,
    EB: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: one sequence, GB of the G query heads of a key head, and all keys of the sequence or one split.

    A tile has T keys. Each of its T positions has its own running softmax, so in the loop threads exchange only the sum
    over E; the T softmaxes are combined after the loop. A thread holds 16 bytes of a key. There are too few queries for
    tensor cores.

    Without SPLIT, write the output [R, Hq, E]; with SPLIT, the maximum and the sum of each split [R, Hq, splits] and
    its sum of weighted values [R, Hq, splits, E].
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (G + GB - 1) // GB
    sequence, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv = block // BLOCKS
    prefix_length = tl.load(p_prefix_length + sequence)
    total = (prefix_length + tl.load(p_length + sequence)).to(tl.int32)
    prefix_start = tl.load(p_prefix_start + sequence)
    start = tl.load(p_start + sequence) - prefix_length
    share = tl.cdiv(tl.cdiv(total, tl.num_programs(2)), T) * T
    begin = split * share
    end = tl.minimum(begin + share, total)

    o_g = block % BLOCKS * GB + tl.arange(0, GB)[:, None, None]
    o_t = tl.arange(0, T)[None, :, None]
    o_e = tl.arange(0, EB)[None, None, :]
    o_head = sequence * (HKV * G) + kv * G + o_g  # of the output
    m_q = (o_g < G) & (o_e < E)
    b_q = tl.load(p_q + sequence * q_stride + (kv * G + o_g) * E + o_e, m_q, other=0).to(tl.float32) * scale
    # finite, so that no difference is NaN; a key beyond the end has the score -inf and adds nothing
    b_top = tl.full([GB, T, 1], -3.4e38, tl.float32)
    b_sum = tl.zeros([GB, T, 1], tl.float32)
    b_acc = tl.zeros([GB, T, EB], tl.float32)
    for first in range(begin, end, T):
        j = first + o_t
        m_j = j < end
        o_key = (tl.where(j < prefix_length, prefix_start, start) + j) * HKV + kv
        m = m_j & (o_e < E)
        b_k = tl.load(p_keys + o_key * E + o_e, m, other=0.0).to(tl.float32)
        b_v = tl.load(p_values + o_key * E + o_e, m, other=0.0).to(tl.float32)
        b_s = tl.sum(b_q * b_k, 2, keep_dims=True)
        if p_key_scales is not None:
            b_s *= tl.load(p_key_scales + o_key, m_j, other=0)
        b_s = tl.where(m_j, b_s, float("-inf"))
        b_new = tl.maximum(b_top, b_s)
        b_rescale = tl.exp2(b_top - b_new)
        b_p = tl.exp2(b_s - b_new)
        b_sum = b_sum * b_rescale + b_p
        if p_value_scales is not None:
            b_p *= tl.load(p_value_scales + o_key, m_j, other=0)
        b_acc = b_acc * b_rescale + b_p * b_v
        b_top = b_new
    b_max = tl.max(b_top, 1, keep_dims=True)
    b_weight = tl.exp2(b_top - b_max)
    b_total = tl.sum(b_sum * b_weight, 1, keep_dims=True)
    b_out = tl.sum(b_acc * b_weight, 1, keep_dims=True)
    if SPLIT:
        o_split = o_head * tl.num_programs(2) + split
        tl.store(p_top + o_split, b_max, o_g < G)
        tl.store(p_sum + o_split, b_total, o_g < G)
        tl.store(p_out + o_split * E + o_e, b_out, m_q)
    else:
        tl.store(p_out + o_head * E + o_e, (b_out / b_total).to(p_out.dtype.element_ty), m_q)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    p_top, p_sum, p_partial, p_out, E: tl.constexpr, EB: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr = False
):
    """One program combines the splits of one head of a sequence. A split without keys has a maximum of -3.4e38."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    o_s = head * SPLITS + tl.arange(0, SPLITS)
    o_e = tl.arange(0, EB)
    b_top = tl.load(p_top + o_s)
    b_weight = tl.exp2(b_top - tl.max(b_top, 0))
    b_total = tl.sum(tl.load(p_sum + o_s) * b_weight, 0)
    b_partial = tl.load(p_partial + o_s[:, None] * E + o_e[None, :], o_e[None, :] < E, other=0)
    b_out = tl.sum(b_partial * b_weight[:, None], 0) / b_total
    tl.store(p_out + head * E + o_e, b_out.to(p_out.dtype.element_ty), o_e < E)


def launch_config(G: int, E: int) -> dict[str, Any]:
    """A tile has 4096 products of a query and a key element, 32 a thread. Programs of one key head share keys in L2."""
    GB, EB = min(triton.next_power_of_2(G), 4), triton.next_power_of_2(E)
    return {"GB": GB, "EB": EB, "T": max(4096 // (GB * EB), 4), "num_warps": 4, "enable_fp_fusion": True}


def num_splits(programs: int, P: int, processors: int) -> int:
    """A power of two: enough splits for two programs on each multiprocessor, if a sequence can have enough keys.

    More splits are slower: on an H200, 512 programs of 608 keys take 40.2 µs; split in two, 44.8 and 1.9 to combine.
    """
    wanted = min(triton.cdiv(2 * processors, programs), triton.cdiv(P, _SPLIT_KEYS), _MAX_SPLITS)
    return int(triton.next_power_of_2(max(wanted, 1)))


def _launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    impl: str,
) -> Tensor:
    R, Hq, E = q.shape
    P, Hkv, _ = keys.shape
    out = q.new_empty(R, Hq * E)
    segments = (prefix_start, prefix_length, start, length)
    if impl == "native":
        fp8 = "" if key_scales is None else "_float8"
        run = native.function(f"bicot_decode_attention_{NATIVE_DTYPES[q.dtype]}{fp8}", *_NATIVE)
        pointers = (x if x is None else x.data_ptr() for x in (keys, values, key_scales, value_scales, *segments))
        outside = _INTEGER()
        run(
            q.data_ptr(), q.stride(0), *pointers, R, Hq, Hkv, E, P, scale, torch.get_num_threads(), out.data_ptr(),
            ctypes.byref(outside),
        )  # fmt: skip
        if (r := outside.value) < R:
            lies = ", ".join(f"{name} {int(x[r])}" for name, x in zip(_SEGMENTS, segments, strict=True))
            raise IndexError(f"sequence {r} has no key, or one outside the {P} slots of the pool: {lies}")
    elif R:
        config = launch_config(Hq // Hkv, E)
        blocks = Hkv * triton.cdiv(Hq // Hkv, config["GB"])
        splits = num_splits(R * blocks, P, processors(q.device, 1))
        partial = top = sums = out
        if splits > 1:
            partial = q.new_empty(R * Hq * splits * E, dtype=torch.float32)
            top, sums = q.new_empty(2, R * Hq * splits, dtype=torch.float32)
        launch(
            _attend_kernel, (R, blocks, splits), q, q.stride(0), keys, values, key_scales, value_scales, *segments,
            partial, top, sums, scale * _LOG2E, Hkv, Hq // Hkv, E, SPLIT=splits > 1, **config,
        )  # fmt: skip
        if splits > 1:
            launch(
                _combine_kernel, (R * Hq,), top, sums, partial, out, E, config["EB"], splits, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


_op = register("decode_attention", _launch, _fake)


def _check(q: Tensor, pools: tuple[Tensor | None, ...], segments: tuple[Tensor, ...]) -> None:
    keys, values, *scales = pools
    assert keys is not None and values is not None
    if q.ndim != 3 or not 0 < q.shape[2] <= _MAX_DIM or not q.is_floating_point():
        raise ValueError(f"q must be [R, Hq, E] floating point, E up to {_MAX_DIM}, got {[*q.shape]} {q.dtype}")
    R, Hq, E = q.shape
    check_pool(q.dtype, keys, values, *scales)
    if keys.shape[2] != E or not keys.shape[1] or Hq % keys.shape[1]:
        raise ValueError(f"keys and values must be [P, Hkv, {E}], Hkv a divisor of {Hq}, got {[*keys.shape]}")
    for name, x in zip(_SEGMENTS, segments, strict=True):
        if x.shape != (R,) or x.dtype != torch.int64:
            raise ValueError(f"{name} must be [{R}] int64, got {[*x.shape]} {x.dtype}")
    if q.numel() and (q.stride(2) != 1 or (q.stride(1) != E and Hq > 1)):
        raise ValueError(f"only the first dimension of q may be strided, got strides {q.stride()}")
    check_contiguous(q.device, pools, **dict(zip(_SEGMENTS, segments, strict=True)))


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float | None = None,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of one query token per sequence over its prefix and its own keys in the pool. Not differentiable.

    The launches depend only on shapes, so a CUDA graph can replay them for other sequences.

    Args:
        q: [R, Hq, E] floating point, E up to 256. It may be a slice of q, k and v together: stride(0) is free.
        keys, values: [P, Hkv, E], Hkv a divisor of Hq, of q's dtype, or float8_e4m3fn with scales.
        prefix_start, prefix_length: [R] int64, first slot and length of the prefix, which may be empty.
        start, length: [R] int64, first slot and length of the sequence's own keys. A sequence has at least one key.
        scale: factor of the scores; default E ** -0.5.
        key_scales, value_scales: [P, Hkv] float32, factors of the stored numbers of a float8 pool.
        impl: "triton" (CUDA; a float8 pool needs a GPU of compute capability 8.9), "native" (C++ on the CPU, float32
            or bfloat16), "torch", or "auto", the first that can run. Computed in float32, or float64 for float64.

    All tensors are on one device, and all but q contiguous.

    Returns:
        [R, Hq·E], dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        IndexError: the C++ kernel found a sequence without a key, or with a key outside the pool. A GPU does not check
            this, because it would cost a launch.
        RuntimeError: q, keys or values want a gradient, or `impl="native"` and the C++ library is missing.

    Source: Flash-Decoding (Dao et al., 2023).
    """
    forward_only("decode_attention", q, keys, values)
    segments = (prefix_start, prefix_length, start, length)
    _check(q, (keys, values, key_scales, value_scales), segments)
    chosen = choose_for_pool(impl, q.device, q.dtype, fp8=key_scales is not None, native_fp8=True)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if chosen == "torch":
        return decode_attention_ref(q, keys, values, *segments, scale, key_scales, value_scales)
    return _op(q, keys, values, *segments, scale, key_scales, value_scales, chosen)
