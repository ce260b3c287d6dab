"""Classifier-free guidance, truncation, one draw, and the log-probs of what was drawn.

    z = z_u + w·(z_c - z_u)                       the guided logits (z = z_c without an unconditional row, or at w = 1)
    q = top-p of top-k of softmax(z / temperature)          what is drawn from, in that order
    token = argmin E_v / q_v,  E_v ~ Exp(1)                 the exponential race: argmax of log q_v + Gumbel noise
    logp_cond = log_softmax(z_c / temperature)[token],  logp_guided = log_softmax(z / temperature)[token]

The log-probs are those of the whole distributions, before truncation: what a training forward computes again.
Temperature 0 is greedy (the smallest id among equals), with the log-probs of temperature 1. A logit of -inf masks its
token: one that either row masks is never drawn. A `mask` is an unconditional row of 0 and -inf, at w = 1.

PyTorch, Triton and C++ have the same steps by the same names, and draw the same token, bit for bit. They compute in
float32 and round each operation on its own (no fused multiply-add):

    mix         z as above, -inf where masked
    exp2        2^d by a polynomial, d = (z - max z)·(log2 e / temperature)
    weigh       ⌊2^40·2^d⌋: sums of weights are exact in int64, in any order, as V < 2^23
    truncate    top-k keeps the k largest z, ties to the smaller ids; of these in that order, top-p keeps a token while
                the weight before it is < ⌊top_p·total⌋ (a float64 product), and always the first
    philox      four words of 32 random bits by Philox4x32-7 (Salmon et al., SC'11: 7 rounds are the fewest that pass
                BigCrush), key `seed`, counter (offset, call): token v has word ⌊v / 64⌋ mod 4 of call
                64·⌊v / 256⌋ + v mod 64, so neighbouring tokens are lanes of a vector
    exponential E = -ln(1 - u) by a polynomial, u = (word + 1/2) / 2^32, at most 1 - 2^-24; right to 3e-7 of itself
    race        token = argmin E·2^-d, 2^-d at most 2^64; the smallest id among equals

A row's token depends on its own offset, not on the other rows. E is between 2^-33 and 17, so the most probable token
has E·2^-d below 17. A masked token has at least 2^31, and is never drawn. A token that is 2^38 times less probable than
the most probable one is never drawn either.

PyTorch sorts to truncate. The kernels look for the smallest logit that stays, `cut`: the largest x such that the count
(top-k) or the total weight (top-p) of the logits >= x reaches a limit. `select` bisects between lo, which reaches the
limit, and hi, which does not; each `probe` of a pivot between them reads the row once and moves one of them to a logit
of the row, so some 10 to 20 probes leave one value. The first 16 steps halve the interval of values, which is quick for
the logits of a model; the rest halve that of `key`, an integer that orders like the float, which is never slow. Of the
logits equal to `cut` the first stay, up to column `last`.

For top-k, the Triton kernel first selects the k-th largest among the maxima of groups of 64 columns. It is at most the
k-th largest logit, so the probes read only the groups whose maximum is not below it: about k of 1,600.

Shapes: cond and uncond [B, V], the rest [B]. Floor: 2·B·V logits read once (B·V without guidance); about 100 operations
a logit. PyTorch makes some 30 passes.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cfg_sample_triton, native
from .cfg_sample_triton import Options
from .dispatch import NATIVE_DTYPES, Impl, choose

_MASK = 0xFFFFFFFF
_FLOAT = torch.finfo(torch.float32)
_WHY = "not finite (NaN, or +inf, or every token masked by -inf)"


class Draw(NamedTuple):
    """token [B] int64; logp_cond [B] and logp_guided [B] float32."""

    token: Tensor
    logp_cond: Tensor
    logp_guided: Tensor


def _mix(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """The guided logits z; -inf where either row masks, where the formula gives inf - inf."""
    if uncond is None:
        return cond
    masked = (cond == -torch.inf) | (uncond == -torch.inf)
    return (uncond + guidance * (cond - uncond)).masked_fill(masked, -torch.inf)


def _exp2(x: Tensor) -> Tensor:
    """2^x for float32 |x| <= 126."""
    n = x.round()
    r = x - n
    p = r * 0.000154531634 + 0.00133908633
    for coefficient in (0.00961808302, 0.0555035695, 0.240226507, 0.693147182, 1.0):
        p = p * r + coefficient
    return (p.view(torch.int32) + (n.int() << 23)).view(torch.float32)


def _weigh(d: Tensor) -> Tensor:
    return (_exp2(d.clamp(min=-60)) * 2**40).long()


def _truncate(z: Tensor, d: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens stay."""
    order = z.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(z.shape[-1], device=z.device)
    stays = (rank < (top_k or len(rank))).expand_as(order)
    if top_p < 1:
        weights = _weigh(d).gather(-1, order) * stays
        limit = (weights.sum(-1, keepdim=True).double() * top_p).long()
        stays = stays & ((weights.cumsum(-1) - weights < limit) | (rank == 0))
    return torch.zeros_like(stays).scatter_(-1, order, stays)


def philox(seed: int | Tensor, offset: Tensor, call: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, as int64 of the shape that offset (int64) and call (int64 in [0, 2^32)) span."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=offset.device)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = offset & _MASK, (offset >> 32) & _MASK, call, torch.zeros_like(call)
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around: the bits are those of the unsigned product
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ key0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ key1, p0 & _MASK
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def exponential(word: Tensor) -> Tensor:
    """-ln(1 - u) as float32, u = (word + 1/2) / 2^32: small ones, which win, as finely as 32 bits can say."""
    u = ((word.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    rest = 1 - u
    m, exponent = rest.frexp()
    q = torch.where(rest >= 0.5, u, 1 - m)  # 1 - u = (1 - q)·2^exponent, with q in [0, 1/2] exact
    p = q * 1.16061389 - 1.03616726
    for coefficient in (0.75161618, 0.0508236513, 0.269662917, 0.33212924, 0.500024617, 1.0):
        p = p * q + coefficient
    return q * p - exponent.clamp(max=0) * 0.693147182


def _race(d: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
    """When each token comes in: the first is drawn. d [B, V] float32 <= 0."""
    V = d.shape[1]
    call = torch.arange(-(-V // 256) * 64, device=d.device)
    words = torch.stack(philox(seed, offset[:, None], call), dim=1).unflatten(-1, (-1, 64))  # [B, 4, chunks, 64]
    return exponential(words.transpose(1, 2).flatten(1)[:, :V]) * _exp2((-d).clamp(max=64))


def cfg_sample_ref(cond: Tensor, uncond: Tensor | None, options: Options, seed: Tensor, offset: Tensor) -> Draw:
    """The formulas above in plain PyTorch; float64 logits are mixed, and their log-probs computed, in float64.

    A row without an answer (NaN or +inf in it, or every token masked) gets NaN log-probs.
    """
    guidance, inverse_temperature, scale, greedy, top_k, top_p = options
    cond = cond.to(torch.promote_types(cond.dtype, torch.float32))
    uncond = None if uncond is None else uncond.to(cond.dtype)
    z = _mix(cond, uncond, guidance)
    # NaN and +inf spread through max; -inf is a masked token
    good = torch.stack([x.amax(-1).isfinite() for x in (cond, uncond, z) if x is not None]).all(0)
    below_top = z - z.amax(-1, keepdim=True)
    d = (below_top * scale).float()
    times = -below_top if greedy else _race(d, seed, offset)
    if top_k or top_p < 1:
        times = times.masked_fill(~_truncate(z, d, top_k, top_p), torch.inf)
    token = times.argmin(-1)

    def logp(logits: Tensor) -> Tensor:
        below_top = (logits - logits.amax(-1, keepdim=True)) * inverse_temperature
        return below_top.log_softmax(-1).gather(-1, token[:, None])[:, 0].masked_fill(~good, torch.nan)

    return Draw(token, logp(cond), logp(z))


def _options(V: int, guidance: float, temperature: float, top_k: int, top_p: float) -> Options:
    """The numbers of a draw, those of the temperature within float32; a greedy one needs no truncation."""
    greedy = temperature == 0
    inverse, scale = (min(max(x / (temperature or 1.0), _FLOAT.tiny), _FLOAT.max) for x in (1.0, math.log2(math.e)))
    return Options(guidance, inverse, scale, greedy, 0 if greedy or top_k >= V else top_k, 1.0 if greedy else top_p)


def _native(cond: Tensor, uncond: Tensor | None, options: Options, *tensors: Tensor) -> None:
    pointer, integer, real, double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
    types = (pointer, integer) * 2 + (integer,) * 2 + (real, double, real, ctypes.c_int, integer, double)
    run = native.function(f"bicot_cfg_sample_{NATIVE_DTYPES[cond.dtype]}", *types, *(pointer,) * 5, ctypes.c_int)
    rows = [part for x in (cond, uncond) for part in ((None, 0) if x is None else (x.data_ptr(), x.stride(0)))]
    run(*rows, *cond.shape, *options, *(x.data_ptr() for x in tensors), torch.get_num_threads())


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
    options = _options(cond.shape[1], guidance, temperature, top_k, top_p)
    cond = cond if cond.stride(1) == 1 else cond.contiguous()
    uncond = uncond if uncond is None or uncond.stride(1) == 1 else uncond.contiguous()
    draw, offset = Draw(*_fake(cond)), offset.contiguous()
    if impl == "triton" and len(cond):
        good = cfg_sample_triton.launch(cond, uncond, options, seed, offset, draw)
    else:
        if impl == "native":
            _native(cond, uncond, options, seed, offset, *draw)
        else:
            draw = cfg_sample_ref(cond, uncond, options, seed, offset)
        good = draw.logp_guided.isnan().logical_not().all()
    if cond.is_cuda:
        torch._assert_async(good, f"cfg_sample: a row of logits is {_WHY}")  # no host sync
    elif not good:
        for name, x in (("cond", cond), ("uncond", uncond), ("guided", draw.logp_guided[:, None])):
            if x is not None and len(bad := x.amax(-1).isfinite().logical_not().nonzero()):
                raise ValueError(f"{name} logits of row {int(bad[0])} are {_WHY}")
    return draw.token, draw.logp_cond, draw.logp_guided


@_op.register_fake
def _fake(cond: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    token = cond.new_empty(cond.shape[0], dtype=torch.int64)
    dtype = torch.promote_types(cond.dtype, torch.float32)
    return token, torch.empty_like(token, dtype=dtype), torch.empty_like(token, dtype=dtype)


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
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Draw:
    """Draw one token a row from guided logits. Not differentiable; the same tokens from every implementation.

    Args:
        cond, uncond: [B, V] logits of the conditional and unconditional rows, V < 2^23, of one floating dtype; no
            `uncond` = no guidance. Rows may be strided.
        guidance: w; 1 is the conditional distribution, and `uncond` is not read.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the smallest set of likeliest tokens with this mass; in (0, 1], 1 = all.
        seed: Philox key, int or int64 scalar tensor.
        offset: [B] int64 Philox counters, one a row and draw. With `seed` a tensor too, a CUDA graph can replay the
            call: nothing is made on the host.
        mask: [V], dtype of `cond`, instead of `uncond`: 0, or -inf for a token that is never drawn. `logp_cond` is that
            without it.
        impl: "triton" is two launches on a GPU, three to truncate; "native" the C++ kernel on a CPU (float32 or
            bfloat16); "torch" plain PyTorch; "auto" the first that takes the logits. Float64 is PyTorch's.

    Raises:
        ValueError: shapes, dtypes or devices that differ, V or an option out of range, an `impl` that cannot take these
            logits, or a row (named) with a logit that is NaN or +inf or with no token left unmasked; for these rows, on
            a GPU, an assertion on the device, which costs no synchronisation.
        RuntimeError: `impl="native"` and the C++ library is missing.
    """
    if mask is not None and (uncond is not None or mask.shape != cond.shape[1:]):
        raise ValueError(f"mask must be [V] = {list(cond.shape[1:])}, without uncond, got {list(mask.shape)}")
    uncond = uncond if mask is None else mask.expand_as(cond)
    rows = [cond] if uncond is None else [cond, uncond]
    if cond.ndim != 2 or rows[-1].shape != cond.shape or offset.shape != cond.shape[:1]:
        other = None if uncond is None else tuple(uncond.shape)
        raise ValueError(f"cond [B, V] {tuple(cond.shape)}, uncond {other} and offset [B] {tuple(offset.shape)} differ")
    if not 0 < cond.shape[1] < 2**23:
        raise ValueError(f"a vocabulary has 1 to {2**23 - 1} tokens, got V = {cond.shape[1]}")
    if not cond.is_floating_point() or rows[-1].dtype != cond.dtype:
        raise ValueError(f"cond and uncond must share a floating dtype, got {[x.dtype for x in rows]}")
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=cond.device)  # a fill, where a copy would wait
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int or one int64, got {tuple(seed.shape)} {seed.dtype}")
    if offset.dtype != torch.int64:
        raise ValueError(f"offset must be int64 counters, got {offset.dtype}")
    devices = {x.device for x in (*rows, seed, offset)}
    if len(devices) > 1:
        raise ValueError(f"cond, uncond, seed and offset must share a device, got {sorted(map(str, devices))}")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or not math.isfinite(guidance):
        raise ValueError(
            f"out of range: guidance={guidance} (finite), temperature={temperature} (>= 0, finite), "
            f"top_k={top_k} (>= 0), top_p={top_p} (0, 1]"
        )
    chosen = choose(impl, cond.device, cond.dtype)
    if mask is not None:
        guidance = 1.0
    elif guidance == 1:
        uncond = None
    options = (float(guidance), float(temperature), top_k, float(top_p))
    return Draw(*_op(cond.detach(), uncond if uncond is None else uncond.detach(), *options, seed, offset, chosen))
