"""The Triton kernel of `cfg_sample`: one launch, one program a row. The formulas are those of cfg_sample.py.

A program walks over its row a block at a time, first for the maxima, then for the sums; from the second walk on the
row comes out of L1 or L2. It remembers the weight of each block, so that the draw looks into one block alone.
Truncation needs no sort: bisection finds the smallest logit that stays, some 10 to 20 more walks.

Rows may begin anywhere and V may be anything. Loads are 16 bytes wide where V, the row strides (in elements) and the
pointers are multiples of 16, which the launch finds out by itself, and one element wide otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from torch import Tensor

from . import dispatch
from .dispatch import tl, triton

BLOCK = 4096  # columns a program holds at a time: 16 a thread of 8 warps


@triton.jit
def _load(p_c, p_u, o_v, V, guidance, GUIDED: tl.constexpr):  # type: ignore[no-untyped-def]
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
def _exp2(b_d):  # type: ignore[no-untyped-def]
    """2^d for d <= 0, 2^-126 below it, by the operations of `exp2_nonpositive` in csrc/simd.h."""
    b_d = tl.where(b_d < -126.0, -126.0, b_d)
    b_n = b_d + 12582912.0  # 1.5·2^23: rounds d to an integer, and leaves it in the low bits
    b_r = b_d - (b_n - 12582912.0)
    b_p = 0.000154531634 * b_r + 0.00133908633
    b_p = b_p * b_r + 0.00961808302
    b_p = b_p * b_r + 0.0555035695
    b_p = b_p * b_r + 0.240226507
    b_p = b_p * b_r + 0.693147182
    b_p = b_p * b_r + 1.0
    b_bits = b_p.to(tl.int32, bitcast=True) + (b_n.to(tl.int32, bitcast=True) << 23)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _weigh(b_z, top, scale):  # type: ignore[no-untyped-def]
    return (_exp2((b_z - top) * scale) * 1099511627776.0).to(tl.int64)  # 2^40


@triton.jit
def _measure(b_z, o_v, top, scale, cut, last, TIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 for each logit equal to `cut`, or the weights of the tokens that stay."""
    if TIES:
        b_m = (b_z == cut).to(tl.int64)
    else:
        b_m = tl.where((b_z > cut) | ((b_z == cut) & (o_v <= last)), _weigh(b_z, top, scale), 0)
    return b_m


@triton.jit
def _block_sums(  # type: ignore[no-untyped-def]
    p_c, p_u, V, guidance, top, scale, cut, last, GUIDED: tl.constexpr, TIES: tl.constexpr, BLOCK: tl.constexpr
):
    """The measure of each block of the row; V < 2^17."""
    BLOCKS: tl.constexpr = 131072 // BLOCK
    o_block = tl.arange(0, BLOCKS)
    b_sums = tl.zeros([BLOCKS], tl.int64)
    for i in range(tl.cdiv(V, BLOCK)):
        o_v = i * BLOCK + tl.arange(0, BLOCK)
        _, _, b_z = _load(p_c, p_u, o_v, V, guidance, GUIDED)
        b_sums += tl.where(o_block == i, tl.sum(_measure(b_z, o_v, top, scale, cut, last, TIES), 0), 0)
    return b_sums


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    b_sums,
    target,
    p_c,
    p_u,
    V,
    guidance,
    top,
    scale,
    cut,
    last,
    GUIDED: tl.constexpr,
    TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first column whose inclusive cumulative measure is above `target`; b_sums are the measures of the blocks."""
    BLOCKS: tl.constexpr = 131072 // BLOCK
    i = tl.sum((tl.cumsum(b_sums, 0) <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, BLOCKS) < i, b_sums, 0), 0)
    o_v = i * BLOCK + tl.arange(0, BLOCK)
    _, _, b_z = _load(p_c, p_u, o_v, V, guidance, GUIDED)
    b_m = _measure(b_z, o_v, top, scale, cut, last, TIES)
    return i * BLOCK + tl.sum((before + tl.cumsum(b_m, 0) <= target).to(tl.int32), 0)


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """An int64 that orders like the float32 x; 0 for both zeros."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return tl.where(key < 0, -2147483648 - key, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    p_c, p_u, V, guidance, top, scale, lowest, limit, GUIDED: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """-> the largest logit x for which the logits >= x number (or weigh, if MASS) at least `limit`, and the number (or
    weight) of those above it. It is not below `lowest`.

    Bisection: measure(>= lo) >= limit > measure(>= hi). Each step moves lo or hi to a logit of the row, so it ends when
    one value is left. The first steps halve the interval of values, which is quick for the logits of a model; the rest
    halve that of keys, which is never slow.
    """
    lo, hi = _key(lowest), _key(top) + 1
    above = tl.zeros([], tl.int64)
    step = 0
    while hi - lo > 1:
        halfway = 0.5 * _value(lo) + 0.5 * _value(hi - 1)
        middle = tl.where(step < 16, _key(halfway), (lo + hi) >> 1)
        pivot = _value(tl.minimum(tl.maximum(middle, lo + 1), hi - 1))
        b_measure = tl.zeros([BLOCK], tl.int64 if MASS else tl.int32)
        b_next = tl.full([BLOCK], float("inf"), tl.float32)  # the smallest logit >= pivot
        b_previous = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest below it
        for begin in range(0, V, BLOCK):
            _, _, b_z = _load(p_c, p_u, begin + tl.arange(0, BLOCK), V, guidance, GUIDED)
            inside = b_z >= pivot
            b_next = tl.minimum(b_next, tl.where(inside, b_z, float("inf")))
            b_previous = tl.maximum(b_previous, tl.where(inside, float("-inf"), b_z))
            if MASS:
                b_measure += tl.where(inside, _weigh(b_z, top, scale), 0)
            else:
                b_measure += inside.to(tl.int32)
        measure = tl.sum(b_measure, 0).to(tl.int64)
        enough = measure >= limit
        lo = tl.where(enough, _key(tl.min(b_next, 0)), lo)
        hi = tl.where(enough, hi, _key(tl.max(b_previous, 0)) + 1)
        above = tl.where(enough, above, measure)
        step += 1
    return _value(lo), above


@triton.jit(do_not_specialize=["top_k", "top_p_bits"])
def cfg_sample_kernel(  # type: ignore[no-untyped-def]
    p_cond,
    p_uncond,
    p_seed,
    p_offset,
    p_token,
    p_logp_cond,
    p_logp_guided,
    V,
    cond_stride,
    uncond_stride,
    guidance,
    inverse_temperature,
    scale,
    top_k,
    top_p_bits,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. A row without an answer (NaN or +inf in it, or every token masked) gets NaN log-probs and token 0."""
    row = tl.program_id(0).to(tl.int64)
    p_c = p_cond + row * cond_stride
    p_u = p_uncond + row * uncond_stride
    o_v = tl.arange(0, BLOCK)
    NAN: tl.constexpr = tl.PropagateNan.ALL

    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_top_c = b_top
    b_top_u = b_top
    for begin in range(0, V, BLOCK):
        b_c, b_u, b_z = _load(p_c, p_u, begin + o_v, V, guidance, GUIDED)
        b_top = tl.maximum(b_top, b_z, propagate_nan=NAN)
        if GUIDED:
            b_top_c = tl.maximum(b_top_c, b_c, propagate_nan=NAN)
            b_top_u = tl.maximum(b_top_u, b_u, propagate_nan=NAN)
    finite = b_top < float("inf")  # false for NaN
    if GUIDED:
        finite = finite & (b_top_c < float("inf")) & (b_top_u < float("inf"))
    top = tl.max(b_top, 0)
    top_c = tl.max(b_top_c, 0)
    good = (tl.min(finite.to(tl.int32), 0) > 0) & (top > float("-inf"))
    top = tl.where(good, top, 0.0)

    BLOCKS: tl.constexpr = 131072 // BLOCK
    o_block = tl.arange(0, BLOCKS)
    b_sums = tl.zeros([BLOCKS], tl.int64)
    b_sum_c = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(V, BLOCK)):
        b_c, b_u, b_z = _load(p_c, p_u, i * BLOCK + o_v, V, guidance, GUIDED)
        b_sums += tl.where(o_block == i, tl.sum(_weigh(b_z, top, scale), 0), 0)
        if GUIDED:
            b_sum_c += _exp2((b_c - top_c) * scale)
    total = tl.sum(b_sums, 0)

    # what stays: every logit above `cut`, and of those equal to it the first `ties`, which end at column `last`
    lowest = tl.full([], float("-inf"), tl.float32)
    cut = lowest
    last = 0
    ties = tl.full([], 1, tl.int64)
    mass = total
    if GREEDY:
        cut = top
    if TOP_K:
        cut, above = _select(p_c, p_u, V, guidance, top, scale, lowest, top_k, GUIDED, False, BLOCK)
        ties = top_k - above
    if TOP_P:
        if TOP_K:
            lowest = cut
            mass = tl.sum(_block_sums(p_c, p_u, V, guidance, top, scale, cut, -1, GUIDED, False, BLOCK), 0)
            mass += ties * _weigh(cut, top, scale)
        top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
        # below the mass: top_p <= 1 - 2^-53 takes off at least what rounding the mass to float64 may have added
        limit = tl.maximum((mass.to(tl.float64) * top_p).to(tl.int64), 1)
        cut, above = _select(p_c, p_u, V, guidance, top, scale, lowest, limit, GUIDED, True, BLOCK)
        ties = tl.cdiv(limit - above, tl.maximum(_weigh(cut, top, scale), 1))
    if GREEDY or TOP_K or TOP_P:
        b_ties = _block_sums(p_c, p_u, V, guidance, top, scale, cut, last, GUIDED, True, BLOCK)
        last = _find(b_ties, ties - 1, p_c, p_u, V, guidance, top, scale, cut, last, GUIDED, True, BLOCK)
    token = last
    if not GREEDY:
        if TOP_K or TOP_P:
            b_sums = _block_sums(p_c, p_u, V, guidance, top, scale, cut, last, GUIDED, False, BLOCK)
        mass = tl.sum(b_sums, 0)
        counter = tl.load(p_offset + row)
        word, _, _, _ = tl.philox(tl.load(p_seed), counter.to(tl.uint32), (counter >> 32).to(tl.uint32), 0, 0)
        odd = (word >> 8).to(tl.int64) * 2 + 1
        target = odd * (mass >> 25) + ((odd * (mass & 0x1FFFFFF)) >> 25)
        token = _find(b_sums, target, p_c, p_u, V, guidance, top, scale, cut, last, GUIDED, False, BLOCK)
    token = tl.where(good, token, 0)

    c, _, z = _load(p_c, p_u, token, V, guidance, GUIDED)
    log_total = tl.log(total.to(tl.float64) * 9.094947017729282e-13)  # 2^-40
    logp = (z - top).to(tl.float64) * inverse_temperature - log_total
    logp_c = logp
    if GUIDED:
        logp_c = (c - top_c).to(tl.float64) * inverse_temperature - tl.log(tl.sum(b_sum_c, 0).to(tl.float64))
    tl.store(p_token + row, token.to(tl.int64))
    tl.store(p_logp_cond + row, tl.where(good, logp_c, float("nan")).to(tl.float32))
    tl.store(p_logp_guided + row, tl.where(good, logp, float("nan")).to(tl.float32))


def launch(
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    inverse_temperature: float,
    scale: float,
    greedy: bool,
    top_k: int,
    top_p: float,
    seed: Tensor,
    offset: Tensor,
    draw: Sequence[Tensor],
) -> None:
    """Fill draw = (token, logp_cond, logp_guided), [B] each.

    Columns of the logits are adjacent, `offset` is contiguous, 0 <= top_k < V."""
    B, V = cond.shape
    other = cond if uncond is None else uncond
    truncates = top_p < 1 and not greedy
    dispatch.launch(
        cfg_sample_kernel,
        (B,),
        cond,
        other,
        seed,
        offset,
        *draw,
        V,
        cond.stride(0),
        other.stride(0),
        guidance,
        inverse_temperature,
        scale,
        top_k,
        struct.unpack("q", struct.pack("d", top_p))[0],  # a float argument would be rounded to float32
        GUIDED=uncond is not None,
        GREEDY=greedy,
        TOP_K=top_k > 0 and not greedy,
        TOP_P=truncates,
        BLOCK=BLOCK,
        num_warps=8,
        maxnreg=168 if truncates else None,  # else ptxas spills for more programs at a time
        enable_fp_fusion=False,  # the weights of all implementations are the same only if every operation is rounded
    )
