"""Causal attention of packed prompts over their keys and values in a pool of slots, forward only.

Token n attends to tokens first_n to n, which are the tokens of its prompt up to itself. Key and value of a token are in
its slot. Query head h reads key and value head h // (Hq // Hkv):

    out_nh = Σ_j p_nhj·v_j,   p_nh = softmax_j(q_nh·k_j / √E),   first_n <= j <= n

The launch depends only on N, not on the number or lengths of the prompts, so a CUDA graph can hold it.

Shapes: N tokens, q [N, Hq, E], keys and values [P, Hkv, E], scales [P, Hkv] of a float8 pool, slots and first [N], the
output [N, Hq·E]. Floor: 4·Hq·E FLOPs a pair of token and key. PyTorch first gathers queries, keys and values into a
padded rectangle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import INTERPRETED, Impl, forward_only, launch, tl, triton
from .kv_pool import check_contiguous, check_pool, choose_for_pool

_LOG2E = 1.4426950408889634


def prefill_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    first: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """PyTorch's attention on a rectangle of prompts. The host reads the longest length from the device."""
    lengths = first.unique_consecutive(return_counts=True)[1]
    offsets = torch.arange(int(lengths.max()), device=q.device)
    # padding repeats the last token of a prompt: no earlier token attends to it, and its output is dropped
    packed = (lengths.cumsum(0) - lengths)[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    caches = (keys, key_scales), (values, value_scales)
    key, value = (_read(cache, scales, slots, q.dtype)[packed].transpose(1, 2) for cache, scales in caches)
    grouped = q.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(q[packed].transpose(1, 2), key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)[offsets < lengths[:, None]]


def _read(cache: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values at `slots`; those of a float8 pool are scaled."""
    if scales is None:
        return cache[slots]
    return (cache[slots].float() * scales[slots][..., None]).to(dtype)


@triton.jit
def _load_tile(p_pool, p_scales, o_head, o_e, m_t, E: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """[T, EB] keys or values of one head, as `dtype`."""
    b = tl.load(p_pool + o_head[:, None] * E + o_e[None, :], m_t[:, None] & (o_e < E)[None, :], other=0.0)
    if p_scales is not None:
        b = b.to(tl.float32) * tl.load(p_scales + o_head, m_t, other=0.0)[:, None]
    return b.to(dtype)


@triton.jit
def _prefill_attention_kernel(  # type: ignore[no-untyped-def]
    p_q, q_stride, p_keys, p_values, p_key_scales, p_value_scales, p_slots, p_first, p_out, N, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: M tokens of one query head, T keys at a time, from the first token of their first prompt on.

    WIDE multiplies in float32, because Triton's interpreter cannot multiply bfloat16.
    """
    head = tl.program_id(1)
    kv = head // (HQ // HKV)
    dtype: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    o_e = tl.arange(0, EB)
    m_m = o_m < N
    m_q = m_m[:, None] & (o_e < E)[None, :]
    o_token = o_m.to(tl.int64)[:, None]
    b_q = tl.load(p_q + o_token * q_stride + head * E + o_e[None, :], m_q, other=0.0).to(dtype)
    b_first = tl.load(p_first + o_m, m_m, other=N)
    begin = tl.load(p_first + tl.program_id(0) * M).to(tl.int32)
    end = tl.minimum(tl.program_id(0) * M + M, N)
    # finite, so that no difference is NaN; a key outside the prompt has the score -inf and adds nothing
    b_top = tl.full([M], -3.4e38, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, EB], tl.float32)
    for j in range(begin, end, T):
        o_t = j + tl.arange(0, T)
        m_t = o_t < end
        o_head = tl.load(p_slots + o_t, m_t, other=0) * HKV + kv
        b_k = _load_tile(p_keys, p_key_scales, o_head, o_e, m_t, E, dtype)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        seen = (o_t[None, :] <= o_m[:, None]) & (o_t[None, :] >= b_first[:, None])
        b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_rescale = tl.exp2(b_top - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = _load_tile(p_values, p_value_scales, o_head, o_e, m_t, E, dtype)
        b_acc = b_acc * b_rescale[:, None] + tl.dot(b_p.to(dtype), b_v, input_precision="ieee")
        b_top = b_new
    b_out = b_acc / tl.where(m_m, b_sum, 1)[:, None]
    tl.store(p_out + o_token * (HQ * E) + head * E + o_e[None, :], b_out.to(p_out.dtype.element_ty), m_q)


def launch_config(E: int, itemsize: int) -> dict[str, Any]:
    """Tiles that fit the registers. With heads of 128 16-bit numbers, a multiprocessor holds three programs or more."""
    EB = max(16, triton.next_power_of_2(E))
    if itemsize == 4:  # no tensor core
        return {"EB": EB, "M": 32, "T": 16, "num_warps": 8, "num_stages": 1}
    return {"EB": EB, "M": 64 if EB <= 128 else 32, "T": 32, "num_warps": 4, "num_stages": 2}


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    first: Tensor,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Causal attention of packed prompts, after their keys and values were written to the pool. Not differentiable.

    Args:
        q: [N, Hq, E] floating point. It may be a slice of q, k and v together: stride(0) is free.
        keys, values: [P, Hkv, E], Hkv a divisor of Hq, of q's dtype, or float8_e4m3fn with scales.
        slots: [N] int64, the slot of each token's key and value.
        first: [N] int64 in [0, N), the index of the first token of each token's prompt.
        key_scales, value_scales: [P, Hkv] float32, factors of the stored numbers of a float8 pool.
        impl: "triton" (CUDA), "torch", or "auto": Triton on a GPU, and else PyTorch.

    All tensors are on one device, and all but q contiguous.

    Returns:
        [N, Hq·E], dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: q, keys or values want a gradient.

    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    forward_only("prefill_attention", q, keys, values)
    check_pool(q.dtype, keys, values, key_scales, value_scales)
    N, Hq, E = q.shape
    if keys.shape[2] != E or Hq % keys.shape[1]:
        raise ValueError(f"keys and values must be [P, Hkv, {E}], Hkv a divisor of {Hq}, got {[*keys.shape]}")
    for name, x in (("slots", slots), ("first", first)):
        if x.shape != (N,) or x.dtype != torch.int64:
            raise ValueError(f"{name} must be [{N}] int64, got {[*x.shape]} {x.dtype}")
    if N and (q.stride(2) != 1 or (q.stride(1) != E and Hq > 1)):
        raise ValueError(f"only the first dimension of q may be strided, got strides {q.stride()}")
    check_contiguous(q.device, (keys, values, key_scales, value_scales), slots=slots, first=first)
    if impl == "native":
        raise ValueError('impl="native" cannot run here: there is no C++ kernel; use impl="torch"')
    if not N:
        return q.new_empty(0, Hq * E)
    if choose_for_pool(impl, q.device, q.dtype, fp8=key_scales is not None, native_fp8=True) != "triton":
        return prefill_attention_ref(q, keys, values, slots, first, key_scales, value_scales)
    out = q.new_empty(N, Hq * E)
    config = launch_config(E, q.itemsize)
    launch(
        _prefill_attention_kernel, (triton.cdiv(N, config["M"]), Hq), q, q.stride(0), keys, values, key_scales,
        value_scales, slots, first, out, N, E**-0.5 * _LOG2E, Hq, keys.shape[1], E, WIDE=INTERPRETED, **config,
    )  # fmt: skip
    return out
