"""The Triton kernels of `cfg_sample`, whose steps are explained in cfg_sample.py.

Both launches have a program for each BLOCK of columns. The first computes the maximum and the softmax sum of its
columns, and resets the counters of the second, so that a CUDA graph can replay them. The second finds the token of its
columns that wins the race, and the last program of a row writes the draw. Results do not depend on the programs' order.
Truncation is one launch between these two, with a program for each row.

Loads are 16 bytes wide where V, the row strides (in elements) and the pointers are multiples of 16, which the launch
finds out by itself, and one element wide otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import tl, triton

BLOCK = 2048  # columns of a program of the two launches: 32 per thread of 2 warps
TRUNCATE_BLOCK = 4096  # columns that the truncating program holds at a time: 16 per thread of 8 warps
GROUP: Any = tl.constexpr(64) if dispatch.HAS_TRITON else None  # adjacent columns, whose maximum is stored to truncate


class Options(NamedTuple):
    """The kernels' numbers, in the order of `Options` in csrc/cfg_sample.cpp."""

    guidance: float
    inverse_temperature: float
    scale: float  # log2 e / temperature
    greedy: bool
    top_k: int  # below V; 0 = all, as in a greedy draw
    top_p: float  # 1 = all, as in a greedy draw


@triton.jit
def _mix(p_c, p_u, o_v, V, guidance, GUIDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> conditional, unconditional and guided logits at columns o_v, -inf beyond the row."""
    b_c = tl.load(p_c + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
    b_u = b_c
    b_z = b_c
    if GUIDED:
        b_u = tl.load(p_u + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        masked = (b_c == float("-inf")) | (b_u == float("-inf"))
        b_z = tl.where(masked, float("-inf"), b_u + guidance * (b_c - b_u))
    return b_c, b_u, b_z


@triton.jit
def _exp2(b_x):  # type: ignore[no-untyped-def]
    """2^x for |x| <= 126, by the operations of `exp2_near_zero` in csrc/simd.h."""
    b_n = b_x + 12582912.0  # 1.5·2^23: rounds x to an integer, and leaves it in the low bits
    b_r = b_x - (b_n - 12582912.0)
    b_p = ((0.000154531634 * b_r + 0.00133908633) * b_r + 0.00961808302) * b_r + 0.0555035695
    b_p = ((b_p * b_r + 0.240226507) * b_r + 0.693147182) * b_r + 1.0
    b_bits = b_p.to(tl.int32, bitcast=True) + (b_n.to(tl.int32, bitcast=True) << 23)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _weigh(b_z, top, scale):  # type: ignore[no-untyped-def]
    return (_exp2(tl.maximum((b_z - top) * scale, -60.0)) * 1099511627776.0).to(tl.int64)  # 2^40


@triton.jit
def _measure(b_z, scale):  # type: ignore[no-untyped-def]
    """Maximum and softmax sum of one part; 0 is the sum of nothing."""
    top = tl.max(b_z, 0)
    return top, tl.sum(tl.exp2((b_z - tl.where(top > float("-inf"), top, 0.0)) * scale), 0)


@triton.jit
def _reduce(p_top, p_sum, parts, scale):  # type: ignore[no-untyped-def]
    """Maximum and softmax sum of a row from those of its parts."""
    o_part = tl.arange(0, 128)
    top = tl.full([], float("-inf"), tl.float32)
    for begin in range(0, parts, 128):
        top = tl.maximum(top, tl.max(tl.load(p_top + begin + o_part, begin + o_part < parts, float("-inf")), 0))
    b_sum = tl.zeros([128], tl.float32)
    for begin in range(0, parts, 128):
        b_top = tl.load(p_top + begin + o_part, begin + o_part < parts, float("-inf"))
        b_sum += tl.load(p_sum + begin + o_part, begin + o_part < parts, 0.0) * tl.exp2((b_top - top) * scale)
    return top, tl.sum(b_sum, 0)


@triton.jit
def measure_kernel(  # type: ignore[no-untyped-def]
    p_cond, p_uncond, p_parts, p_first, p_arrived, p_good, p_max, V, cond_stride, uncond_stride, guidance, scale,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Maximum and softmax sum of one part of a row; the maximum is +inf where a logit is NaN or +inf. If p_max is
    given, also the maximum of each group of columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    all_parts = tl.num_programs(0) * tl.num_programs(1)
    p_part = p_parts + row * tl.num_programs(1) + part
    o_v = part * BLOCK + tl.arange(0, BLOCK)
    b_c, b_u, b_z = _mix(p_cond + row * cond_stride, p_uncond + row * uncond_stride, o_v, V, guidance, GUIDED)
    b_good = (b_z < float("inf")) & (b_c < float("inf")) & (b_u < float("inf"))  # false for NaN
    b_z = tl.where(b_good, b_z, float("inf"))
    top, total = _measure(b_z, scale)
    if p_max is not None:
        o_group = part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        groups = tl.cdiv(V, GROUP)
        tl.store(p_max + row * groups + o_group, tl.max(tl.reshape(b_z, [BLOCK // GROUP, GROUP]), 1), o_group < groups)
    tl.store(p_part, top)
    tl.store(p_part + all_parts, total)
    if GUIDED:
        top_c, total_c = _measure(b_c, scale)
        tl.store(p_part + 2 * all_parts, top_c)
        tl.store(p_part + 3 * all_parts, total_c)
    if part == 0:
        tl.store(p_first + row, 0x7FFFFFFFFFFFFFFF)
        tl.store(p_arrived + row, 0)
        tl.store(p_good, 1)  # by every row alike


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """An int64 that orders like the float32 x; 0 for both zeros."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return tl.where(key < 0, -2147483648 - key, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _list(p_max, p_group, groups, lowest, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the groups with a maximum >= lowest, in order -> their number."""
    size = 0
    for begin in range(0, groups, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        b_listed = (tl.load(p_max + o, o < groups, 0.0) >= lowest) & (o < groups)
        b_end = size + tl.cumsum(b_listed.to(tl.int32), 0)
        tl.store(p_group + b_end - 1, o, b_listed)
        size = tl.max(b_end, 0)
    tl.debug_barrier()  # the threads read what others wrote
    return size


@triton.jit
def _columns(p_group, begin, size, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK / GROUP, GROUP] columns of the listed groups from the `begin`-th on; all groups are listed if p_group is
    None."""
    o = begin + tl.arange(0, BLOCK // GROUP)
    b_group = o if p_group is None else tl.load(p_group + o, o < size, V)
    return b_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _probe(  # type: ignore[no-untyped-def]
    p_c, p_u, p_group, size, V, guidance, top, scale, pivot, GUIDED: tl.constexpr, MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The number (or weight, if MASS) of the logits >= pivot, the smallest of them, and the largest below it."""
    b_amount = tl.zeros([BLOCK // GROUP, GROUP], tl.int64 if MASS else tl.int32)
    b_next = tl.full([BLOCK // GROUP, GROUP], float("inf"), tl.float32)
    b_previous = tl.full([BLOCK // GROUP, GROUP], float("-inf"), tl.float32)
    for begin in range(0, size, BLOCK // GROUP):
        b_z = _mix(p_c, p_u, _columns(p_group, begin, size, V, BLOCK), V, guidance, GUIDED)[2]
        b_inside = b_z >= pivot
        b_amount += tl.where(b_inside, _weigh(b_z, top, scale) if MASS else 1, 0)
        b_next = tl.minimum(b_next, tl.where(b_inside, b_z, float("inf")))
        b_previous = tl.maximum(b_previous, tl.where(b_inside, float("-inf"), b_z))
    return tl.sum(b_amount).to(tl.int64), tl.min(b_next), tl.max(b_previous)


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    p_c, p_u, p_group, size, V, guidance, top, scale, lowest, limit, GUIDED: tl.constexpr, MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """-> cut, not below `lowest`, and the number (or weight, if MASS) of the logits above it."""
    lo, hi = _key(lowest), _key(top) + 1
    above = tl.zeros([], tl.int64)
    step = 0
    while hi - lo > 1:
        halfway = 0.5 * _value(lo) + 0.5 * _value(hi - 1)
        middle = tl.where(step < 16, _key(halfway), (lo + hi) >> 1)
        pivot = _value(tl.minimum(tl.maximum(middle, lo + 1), hi - 1))
        amount, following, previous = _probe(
            p_c, p_u, p_group, size, V, guidance, top, scale, pivot, GUIDED, MASS, BLOCK
        )
        enough = amount >= limit
        lo = tl.where(enough, _key(following), lo)
        hi = tl.where(enough, hi, _key(previous) + 1)
        above = tl.where(enough, above, amount)
        step += 1
    return _value(lo), above


@triton.jit(do_not_specialize=["top_k", "top_p_bits", "parts"])
def truncate_kernel(  # type: ignore[no-untyped-def]
    p_cond, p_uncond, p_parts, p_max, p_group, p_cut, p_last, V, parts, cond_stride, uncond_stride, guidance, scale,
    top_k, top_p_bits,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """-> cut, last: every logit above `cut` stays, and of those equal to it the first, up to column `last`.

    The k-th largest maximum of a group is at most the k-th largest logit, so groups below it are not read again.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    p_c = p_cond + row * cond_stride
    p_u = p_uncond + row * uncond_stride
    p_top = p_parts + row * parts
    groups = tl.cdiv(V, GROUP)
    p_max += row * groups
    p_group += row * groups
    top = _reduce(p_top, p_top, parts, scale)[0]
    if tl.abs(top) < float("inf"):
        cut = tl.full([], float("-inf"), tl.float32)
        ties = tl.full([], 0, tl.int64)
        if TOP_K:
            size = tl.cdiv(groups, GROUP)
            cut = _select(p_max, p_max, None, size, groups, 1.0, top, scale, cut, top_k, False, False, BLOCK)[0]
        size = _list(p_max, p_group, groups, cut, BLOCK)
        if TOP_K:
            cut, above = _select(p_c, p_u, p_group, size, V, guidance, top, scale, cut, top_k, GUIDED, False, BLOCK)
            ties = top_k - above
        if TOP_P:
            pivot = _value(_key(cut) + 1)
            mass = _probe(p_c, p_u, p_group, size, V, guidance, top, scale, pivot, GUIDED, True, BLOCK)[0]
            mass += ties * _weigh(cut, top, scale)
            top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
            # below the mass: top_p <= 1 - 2^-53 takes off at least what rounding the mass to float64 may have added
            limit = tl.maximum((mass.to(tl.float64) * top_p).to(tl.int64), 1)
            cut, above = _select(p_c, p_u, p_group, size, V, guidance, top, scale, cut, limit, GUIDED, True, BLOCK)
            ties = tl.cdiv(limit - above, tl.maximum(_weigh(cut, top, scale), 1))
        last = 0  # the column of the last tie that stays
        seen = tl.full([], 0, tl.int64)
        for begin in range(0, size, BLOCK // GROUP):
            o_v = _columns(p_group, begin, size, V, BLOCK)
            b_tie = tl.reshape(_mix(p_c, p_u, o_v, V, guidance, GUIDED)[2] == cut, [BLOCK])
            b_seen = seen + tl.cumsum(b_tie.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(b_tie & (b_seen <= ties), tl.reshape(o_v, [BLOCK]), 0), 0))
            seen = tl.max(b_seen, 0)
        tl.store(p_cut + row, cut)
        tl.store(p_last + row, last)


@triton.jit
def _exponential(b_word):  # type: ignore[no-untyped-def]
    """-ln(1 - u), by the operations of `exponential` in cfg_sample.py."""
    b_u = tl.minimum((b_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    b_rest = 1.0 - b_u
    b_bits = b_rest.to(tl.int32, bitcast=True)
    b_halvings = tl.maximum(126 - (b_bits >> 23), 0)
    b_m = (b_bits + (b_halvings << 23)).to(tl.float32, bitcast=True)
    b_q = tl.where(b_halvings == 0, b_u, 1.0 - b_m)
    b_p = ((b_q * 1.16061389 - 1.03616726) * b_q + 0.75161618) * b_q + 0.0508236513
    b_p = (((b_p * b_q + 0.269662917) * b_q + 0.33212924) * b_q + 0.500024617) * b_q + 1.0
    return b_q * b_p + b_halvings.to(tl.float32) * 0.693147182


@triton.jit
def race_kernel(  # type: ignore[no-untyped-def]
    p_cond, p_uncond, p_seed, p_offset, p_cut, p_last, p_parts, p_first, p_arrived, p_good, p_token, p_logp_cond,
    p_logp_guided, V, cond_stride, uncond_stride, guidance, inverse_temperature, scale,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first token of one part to come in, and, from the last part of a row, the draw. A row without an answer (NaN
    or +inf in it, or every token masked) gets NaN log-probs and token 0."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    all_parts = tl.num_programs(0) * parts
    p_c = p_cond + row * cond_stride
    p_u = p_uncond + row * uncond_stride
    p_top = p_parts + row * parts
    top, total = _reduce(p_top, p_top + all_parts, parts, scale)

    o_chunk, o_lane = tl.arange(0, BLOCK // 256)[:, None], tl.arange(0, 64)[None, :]
    o_v = part * BLOCK + 256 * o_chunk + o_lane
    if not GREEDY:
        counter = tl.load(p_offset + row)
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        o_call = part * (BLOCK // 4) + 64 * o_chunk + o_lane
        b_words = tl.philox(tl.load(p_seed), low, high, o_call.to(tl.uint32), 0, 7)
    if TRUNCATED:
        cut, last = tl.load(p_cut + row), tl.load(p_last + row)
    b_time = tl.full([BLOCK // 256, 64], float("inf"), tl.float32)
    b_first = o_v
    for i in tl.static_range(4):
        b_z = _mix(p_c, p_u, o_v + 64 * i, V, guidance, GUIDED)[2]
        b_t = tl.abs(top - b_z)  # -0 - 0 is -0, whose bits come before all others
        if not GREEDY:
            b_t = _exponential(b_words[i]) * _exp2(tl.minimum(b_t * scale, 64.0))
        if TRUNCATED:
            b_t = tl.where((b_z > cut) | ((b_z == cut) & (o_v + 64 * i <= last)), b_t, float("inf"))
        sooner = b_t < b_time
        b_time = tl.where(sooner, b_t, b_time)
        b_first = tl.where(sooner, o_v + 64 * i, b_first)
    # positive floats order like their bits; among equals the smallest id is first
    b_arrival = (b_time.to(tl.int32, bitcast=True).to(tl.int64) << 32) | b_first
    tl.atomic_min(p_first + row, tl.min(b_arrival))
    if tl.atomic_add(p_arrived + row, 1) == parts - 1:
        good = tl.abs(top) < float("inf")
        token = tl.where(good, (tl.atomic_min(p_first + row, 0x7FFFFFFFFFFFFFFF) & 0x7FFFFFFF).to(tl.int32), 0)
        picked = _mix(p_c, p_u, token, V, guidance, GUIDED)
        logp = (picked[2] - top).to(tl.float64) * inverse_temperature - tl.log(total.to(tl.float64))
        logp_c = logp
        if GUIDED:
            top_c, total_c = _reduce(p_top + 2 * all_parts, p_top + 3 * all_parts, parts, scale)
            logp_c = (picked[0] - top_c).to(tl.float64) * inverse_temperature - tl.log(total_c.to(tl.float64))
        tl.store(p_token + row, token.to(tl.int64))
        tl.store(p_logp_cond + row, tl.where(good, logp_c, float("nan")).to(tl.float32))
        tl.store(p_logp_guided + row, tl.where(good, logp, float("nan")).to(tl.float32))
        if not good:
            tl.store(p_good, 0)


def launch(
    cond: Tensor, uncond: Tensor | None, options: Options, seed: Tensor, offset: Tensor, draw: Sequence[Tensor]
) -> Tensor:
    """Fill draw = (token, logp_cond, logp_guided), [B] each -> whether every row had an answer, one bool.

    Columns of the logits are adjacent, `offset` is contiguous, B > 0."""
    guidance, inverse_temperature, scale, greedy, top_k, top_p = options
    B, V = cond.shape
    parts = -(-V // BLOCK)
    other = cond if uncond is None else uncond
    truncated = top_k > 0 or top_p < 1
    statistics = cond.new_empty((4, B, parts), dtype=torch.float32)
    # each at a multiple of 16 bytes: Triton compiles anew for pointers that are not
    first, arrived, last = cond.new_empty((3, B + B % 2), dtype=torch.int64)
    good, cut = cond.new_empty((), dtype=torch.uint8), cond.new_empty(B, dtype=torch.float32)
    strides = (cond.stride(0), other.stride(0))
    # every operation rounded: only so do all implementations draw the same tokens
    config = {"GUIDED": uncond is not None, "enable_fp_fusion": False}
    counted, maxima, groups = (statistics, first, arrived, good), None, None
    if truncated:
        maxima = statistics.new_empty((B, triton.cdiv(V, GROUP.value)))
        groups = torch.empty_like(maxima, dtype=torch.int32)
    dispatch.launch(
        measure_kernel, (B, parts), cond, other, *counted, maxima, V, *strides, guidance, scale,
        **config, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    if truncated:
        bits = struct.unpack("q", struct.pack("d", top_p))[0]  # a float argument would be rounded to float32
        dispatch.launch(
            truncate_kernel, (B,), cond, other, statistics, maxima, groups, cut, last, V, parts, *strides, guidance,
            scale, top_k, bits, **config, TOP_K=top_k > 0, TOP_P=top_p < 1, BLOCK=TRUNCATE_BLOCK, num_warps=8,
            maxnreg=168,  # else ptxas spills for more programs at a time
        )  # fmt: skip
    dispatch.launch(
        race_kernel, (B, parts), cond, other, seed, offset, cut, last, *counted, *draw, V, *strides, guidance,
        inverse_temperature, scale, **config, GREEDY=greedy, TRUNCATED=truncated, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return good.view(torch.bool)
