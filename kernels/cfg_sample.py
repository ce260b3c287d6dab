"""Classifier-free guidance, truncation, one draw, and the log-probs of what was drawn.

    z = z_u + w·(z_c - z_u)                       the guided logits (z = z_c without an unconditional row, or at w = 1)
    q = top-p of top-k of softmax(z / temperature)          what is drawn from, in that order
    token = the first v with Σ_{v' <= v} q_v' > u·Σ q       inverse transform, u uniform in (0, 1)
    logp_cond = log_softmax(z_c / temperature)[token],  logp_guided = log_softmax(z / temperature)[token]

The log-probs are those of the whole distributions, before truncation: what a training forward computes again.
Temperature 0 is greedy (the smallest id among equals); the log-probs are then those of temperature 1. A logit of -inf
masks its token: one that either row masks is never drawn.

u comes from Philox4x32-10 (Salmon et al., SC'11) with key `seed` and counter `offset`, one counter a row: a row draws
the same token wherever and with whomever it is sampled. u has 24 bits, so that a float32 kernel can hold it exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


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


def _truncate(logits: Tensor, scale: float, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside top-k, then top-p at `scale`, at -inf. Ties go to the smaller ids."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    dropped = (rank >= top_k) if top_k else torch.zeros_like(rank, dtype=torch.bool)
    values = values.masked_fill(dropped, -torch.inf)
    if top_p < 1:
        probs = (values * scale).softmax(-1)
        # a token stays while the mass before it is below top_p; the first always does
        values = values.masked_fill((probs.cumsum(-1) - probs >= top_p) & (rank > 0), -torch.inf)
    return torch.empty_like(values).scatter_(-1, order, values)


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
    """The formulas above in plain PyTorch; log-probs in float32, or float64 for float64 logits."""
    cond = cond if cond.dtype == torch.float64 else cond.float()
    guided = cond
    if uncond is not None and guidance != 1:
        masked = (cond == -torch.inf) | (uncond == -torch.inf)  # where the formula gives inf - inf
        guided = torch.lerp(uncond.to(cond.dtype), cond, guidance).masked_fill(masked, -torch.inf)
    scale = 1.0 / temperature if temperature else 1.0
    if temperature == 0:
        token = guided.argmax(-1)
    else:
        truncated = 0 < top_k < guided.shape[-1] or top_p < 1
        kept = _truncate(guided, scale, top_k, top_p) if truncated else guided
        probs = (kept * scale).double().softmax(-1)
        cdf = probs.cumsum(-1)
        threshold = philox_uniform(seed, offset)[:, None] * cdf[:, -1:]
        # a parallel cumsum may step up by a rounding error where the probability is 0
        token = ((cdf > threshold) & (probs > 0)).byte().argmax(-1)
    picked = token[:, None]
    logp_cond = (cond * scale).log_softmax(-1).gather(-1, picked)[:, 0]
    logp_guided = logp_cond if guided is cond else (guided * scale).log_softmax(-1).gather(-1, picked)[:, 0]
    return Draw(token, logp_cond, logp_guided)


def _require(finite: Tensor, name: str) -> None:
    if finite.is_cuda:
        torch._assert_async(finite.all(), f"cfg_sample: a row of {name} logits is not finite")
    elif not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"{name} logits of row {row} are not finite (NaN, or +inf, or every token masked by -inf)")


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
) -> Draw:
    """Draw one token a row from guided logits.

    Args:
        cond, uncond: [B, V] logits of the conditional and unconditional rows; no `uncond` = no guidance.
        guidance: w; 1 is the conditional distribution.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the smallest set of likeliest tokens with this mass; in (0, 1], 1 = all.
        seed: Philox key, int or int64 scalar tensor.
        offset: [B] int64 Philox counters, one a row and draw.

    Raises:
        ValueError: shapes that differ, an option out of range, or a row (named) with a logit that is NaN or +inf or
            with no token left unmasked; for these rows, on a GPU a device-side assertion, which costs no
            synchronisation.
    """
    if cond.ndim != 2 or (uncond is not None and uncond.shape != cond.shape) or offset.shape != cond.shape[:1]:
        other = None if uncond is None else tuple(uncond.shape)
        raise ValueError(f"cond [B, V] {tuple(cond.shape)}, uncond {other} and offset [B] {tuple(offset.shape)} differ")
    if offset.dtype != torch.int64:
        raise ValueError(f"offset must be int64 counters, got {offset.dtype}")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or not math.isfinite(guidance):
        raise ValueError(
            f"out of range: guidance={guidance} (finite), temperature={temperature} (>= 0, finite), "
            f"top_k={top_k} (>= 0), top_p={top_p} (0, 1]"
        )
    for name, logits in (("cond", cond), ("uncond", uncond)):
        if logits is not None:
            _require(logits.amax(-1).isfinite(), name)  # NaN and +inf spread through max; -inf is a masked token
    draw = cfg_sample_ref(cond, uncond, guidance, temperature, top_k, top_p, seed, offset)
    _require(draw.logp_guided.isfinite(), "guided")  # not where the two rows leave no token unmasked
    return draw
