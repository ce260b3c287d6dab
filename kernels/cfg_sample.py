"""Classifier-free guidance, truncation, one draw, and the log-probs of what was drawn.

    z = z_u + w·(z_c - z_u)                       the guided logits (z = z_c without an unconditional row, or at w = 1)
    q = top-p of top-k of softmax(z / temperature)          what is drawn from, in that order
    token = the first v with Σ_{v' <= v} q_v' > u·Σ q       inverse transform, u uniform in (0, 1)
    logp_cond = log_softmax(z_c / temperature)[token],  logp_guided = log_softmax(z / temperature)[token]

The log-probs are those of the whole distributions, before truncation: what a training forward computes again.
Temperature 0 is greedy (the smallest id among equals); the log-probs are then those of temperature 1. A logit of -inf
masks its token: one that either row masks is never drawn.

u comes from Philox4x32-10 (Salmon et al., SC'11) with key `seed` and counter `offset`, one counter a row: a row draws
the same token wherever and with whomever it is sampled.

Every implementation draws the same token, bit for bit, because none sums floats. In float32, each operation rounded on
its own (no fused multiply-add):

    z = z_u + w·(z_c - z_u),  d = (z - max z)·(log2 e / temperature)
    weight = ⌊2^40·2^d⌋, 2^d by the polynomial of `exp2_nonpositive` (csrc/simd.h): exact in float32, and an integer
    top-k: the k largest z, ties to the smaller ids
    top-p: in that order, a token stays while the weight before it is < ⌊top_p·total⌋ (a float64 product), or is first
    token = the first v with Σ_{v' <= v} weight_v' > T,  T = ⌊(2r + 1)·total / 2^25⌋,  u = (r + 1/2) / 2^24

V < 2^17, so a total is below 2^57 and sums of weights are exact in int64, in any order. T < total because
(2r + 1) / 2^25 < 1, and the most likely token weighs 2^40, so some v passes T; the first one does with its own weight,
which is therefore positive: a masked token is never drawn. What the integers cost: a token less likely than 2^-40 times
the most likely one is never drawn, and the log-prob of the whole moves by 2^-23 at most.

Shapes: cond and uncond [B, V], the rest [B]. Floor: 2·B·V logits read once (B·V without guidance); about 50 FLOPs a
logit. PyTorch makes some 30 passes, and sorts to truncate.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cfg_sample_triton, native
from .dispatch import NATIVE_DTYPES, Impl, choose

_MASK = 0xFFFFFFFF
_FLOAT_MAX = torch.finfo(torch.float32).max
_BAD_ROW = "cfg_sample: a row of logits is not finite (NaN, or +inf, or every token masked by -inf)"


class Draw(NamedTuple):
    """token [B] int64; logp_cond [B] and logp_guided [B] float32."""

    token: Tensor
    logp_cond: Tensor
    logp_guided: Tensor


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for 32-bit values held in int64 (which a 64-bit product would overflow)."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_uniform(seed: int | Tensor, offset: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), one for each counter.

    Args:
        seed: 64-bit key, int or int64 scalar tensor.
        offset: int64 tensor of counters, any shape.

    Returns:
        float64 of the same shape: (the 24 high bits of the first Philox word + 1/2) / 2^24.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=offset.device)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros_like(offset)
    c0, c1, c2, c3 = offset & _MASK, (offset >> 32) & _MASK, zero, zero
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return ((c0 >> 8).double() + 0.5) / 2**24


def _scales(temperature: float) -> tuple[float, float]:
    """1 / temperature and log2 e / temperature, kept finite in float32; at temperature 0 those of 1."""
    temperature = temperature or 1.0
    return min(1 / temperature, _FLOAT_MAX), min(math.log2(math.e) / temperature, _FLOAT_MAX)


def _weigh(d: Tensor) -> Tensor:
    """⌊2^40·2^d⌋ as int64, for float32 d <= 0."""
    d = d.clamp(min=-60)  # 0 from -41 on
    n = d.round()
    r = d - n
    p = r * 0.000154531634 + 0.00133908633
    for coefficient in (0.00961808302, 0.0555035695, 0.240226507, 0.693147182, 1.0):
        p = p * r + coefficient
    return ((p * 2**24).long() << 16) >> -n.long()  # p, in [0.7, 1.42], is a multiple of 2^-24


def _truncate(weights: Tensor, logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Weights with those outside top-k, then top-p, at 0. Ties go to the smaller ids."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ranked = weights.gather(-1, order)
    if top_k:
        ranked = ranked.masked_fill(rank >= top_k, 0)
    if top_p < 1:
        before = ranked.cumsum(-1) - ranked
        limit = (ranked.sum(-1, keepdim=True).double() * top_p).long()
        ranked = ranked.masked_fill((before >= limit) & (rank > 0), 0)
    return torch.zeros_like(weights).scatter_(-1, order, ranked)


def cfg_sample_ref(
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | Tensor,
    offset: Tensor,
) -> Draw:
    """The formulas above in plain PyTorch; float64 logits are mixed, and their log-probs computed, in float64.

    A row without an answer (NaN or +inf in it, or every token masked) gets NaN log-probs.
    """
    cond = cond.to(torch.promote_types(cond.dtype, torch.float32))
    good = cond.amax(-1).isfinite()  # NaN and +inf spread through max; -inf is a masked token
    guided = cond
    if uncond is not None and guidance != 1:
        uncond = uncond.to(cond.dtype)
        masked = (cond == -torch.inf) | (uncond == -torch.inf)  # where the formula gives inf - inf
        guided = (uncond + guidance * (cond - uncond)).masked_fill(masked, -torch.inf)
        good = good & uncond.amax(-1).isfinite() & guided.amax(-1).isfinite()
    inverse, scale = _scales(temperature)
    below_top = guided - guided.amax(-1, keepdim=True)
    if temperature == 0:
        token = guided.argmax(-1)
    else:
        weights = _weigh((below_top * scale).float())
        if 0 < top_k < cond.shape[-1] or top_p < 1:
            weights = _truncate(weights, guided, top_k, top_p)
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1]
        odd = (philox_uniform(seed, offset) * 2**25).long()
        threshold = odd * (total >> 25) + (odd * (total & 0x1FFFFFF) >> 25)  # odd·total would overflow
        token = (cumulative > threshold[:, None]).byte().argmax(-1)
    picked = token[:, None]
    logp_guided = (below_top * inverse).log_softmax(-1).gather(-1, picked)[:, 0].masked_fill(~good, torch.nan)
    if guided is cond:
        return Draw(token, logp_guided, logp_guided.clone())
    below_top = cond - cond.amax(-1, keepdim=True)
    logp_cond = (below_top * inverse).log_softmax(-1).gather(-1, picked)[:, 0].masked_fill(~good, torch.nan)
    return Draw(token, logp_cond, logp_guided)


def _require(finite: Tensor, name: str) -> None:
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"{name} logits of row {row} are not finite (NaN, or +inf, or every token masked by -inf)")


def _check_rows(draw: Draw, cond: Tensor, uncond: Tensor | None) -> None:
    """Raise where log-probs are NaN; only then look for the reason."""
    good = draw.logp_guided == draw.logp_guided
    if cond.is_cuda or torch.compiler.is_compiling():  # no host sync, no data-dependent branch
        torch._assert_async(good.all(), _BAD_ROW)
    elif not good.all():
        _require(cond.amax(-1).isfinite(), "cond")
        if uncond is not None:
            _require(uncond.amax(-1).isfinite(), "uncond")
        _require(good, "guided")


def _native(
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
    draw: Draw,
) -> None:
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    rows = (pointer, integer, pointer, integer, integer, integer)
    options = (real, ctypes.c_double, real, ctypes.c_int, integer, ctypes.c_double)
    run = native.function(
        f"bicot_cfg_sample_{NATIVE_DTYPES[cond.dtype]}", *rows, *options, *(pointer,) * 5, ctypes.c_int
    )
    run(
        cond.data_ptr(),
        cond.stride(0),
        None if uncond is None else uncond.data_ptr(),
        0 if uncond is None else uncond.stride(0),
        *cond.shape,
        guidance,
        inverse_temperature,
        scale,
        greedy,
        top_k,
        top_p,
        seed.data_ptr(),
        offset.data_ptr(),
        *(column.data_ptr() for column in draw),
        torch.get_num_threads(),
    )


@torch.library.custom_op("bicot::cfg_sample", mutates_args=())
def _op(
    cond: Tensor,
    uncond: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: Tensor,
    offset: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    cond = cond if cond.stride(1) == 1 else cond.contiguous()
    uncond = uncond if uncond is None or uncond.stride(1) == 1 else uncond.contiguous()
    draw = Draw(*_fake(cond))
    launch = cfg_sample_triton.launch if impl == "triton" else _native
    top_k = top_k if top_k < cond.shape[1] else 0
    options = (guidance, *_scales(temperature), temperature == 0, top_k, top_p)
    launch(cond, uncond, *options, seed, offset.contiguous(), draw)
    _check_rows(draw, cond, uncond)
    return draw.token, draw.logp_cond, draw.logp_guided


@_op.register_fake
def _fake(cond: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    token = cond.new_empty(cond.shape[0], dtype=torch.int64)
    return token, torch.empty_like(token, dtype=torch.float32), torch.empty_like(token, dtype=torch.float32)


def _check(cond: Tensor, uncond: Tensor | None, offset: Tensor) -> None:
    if cond.ndim != 2 or (uncond is not None and uncond.shape != cond.shape) or offset.shape != cond.shape[:1]:
        other = None if uncond is None else tuple(uncond.shape)
        raise ValueError(f"cond [B, V] {tuple(cond.shape)}, uncond {other} and offset [B] {tuple(offset.shape)} differ")
    if not 0 < cond.shape[1] < 2**17:
        raise ValueError(f"a vocabulary has 1 to {2**17 - 1} tokens, got V = {cond.shape[1]}")
    if offset.dtype != torch.int64:
        raise ValueError(f"offset must be int64 counters, got {offset.dtype}")
    if not cond.is_floating_point() or (uncond is not None and uncond.dtype != cond.dtype):
        dtypes = [x.dtype for x in (cond, uncond) if x is not None]
        raise ValueError(f"cond and uncond must share a floating dtype, got {dtypes}")


def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor,
    offset: Tensor,
    impl: Impl = "auto",
) -> Draw:
    """Draw one token a row from guided logits. Not differentiable; the same tokens from every implementation.

    Args:
        cond, uncond: [B, V] logits of the conditional and unconditional rows, V < 2^17, of one floating dtype; no
            `uncond` = no guidance. Rows may be strided.
        guidance: w; 1 is the conditional distribution, and `uncond` is not read.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the smallest set of likeliest tokens with this mass; in (0, 1], 1 = all.
        seed: Philox key, int or int64 scalar tensor.
        offset: [B] int64 Philox counters, one a row and draw. With `seed` a tensor too, a CUDA graph can replay the
            call: nothing is made on the host.
        impl: "triton" is one launch on a GPU, "native" the C++ kernel on a CPU (float32 or bfloat16), "torch" plain
            PyTorch; "auto" is the first that takes the logits. Float64 is PyTorch's.

    Raises:
        ValueError: shapes, dtypes or devices that differ, V or an option out of range, an `impl` that cannot take these
            logits, or a row (named) with a logit that is NaN or +inf or with no token left unmasked; for these rows, on
            a GPU, and inside torch.compile with plain PyTorch, an assertion on the device, which costs no
            synchronisation.
        RuntimeError: `impl="native"` and the C++ library is missing.
    """
    _check(cond, uncond, offset)
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or not math.isfinite(guidance):
        raise ValueError(
            f"out of range: guidance={guidance} (finite), temperature={temperature} (>= 0, finite), "
            f"top_k={top_k} (>= 0), top_p={top_p} (0, 1]"
        )
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=cond.device)  # a fill, where a copy would wait
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int or one int64, got {tuple(seed.shape)} {seed.dtype}")
    devices = {x.device for x in (cond, uncond, seed, offset) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"cond, uncond, seed and offset must share a device, got {sorted(map(str, devices))}")
    chosen = choose(impl, cond.device, cond.dtype)
    cond, uncond = cond.detach(), None if uncond is None or guidance == 1 else uncond.detach()
    if chosen == "torch":
        draw = cfg_sample_ref(cond, uncond, guidance, temperature, top_k, top_p, seed, offset)
        _check_rows(draw, cond, uncond)
        return draw
    options = (float(guidance), float(temperature), top_k, float(top_p))
    return Draw(*_op(cond, uncond, *options, seed, offset, chosen))
