"""Log-prob and entropy of target tokens from hidden states and a linear head.

    z = (h Wᵀ + b) / temperature;  logprob = z_target - logsumexp(z);  entropy = logsumexp(z) - Σ softmax(z)·z

hidden [N, D], weight [V, D] (frozen or not), bias [V] or None, targets [N]. Floor: 2·N·V·D FLOP forward, twice that
again backward (once if the weight is frozen).

Without gradient (the reference model, old log-probs) the rows go through in chunks, so that no more than
`_CHUNK_ELEMENTS` logits exist at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_logprobs import TokenStats, check_targets, token_logprobs, token_logprobs_ref

_CHUNK_ELEMENTS = 16 * 2**20


def linear_logprobs_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> TokenStats:
    """The formula above in plain PyTorch, all logits at once."""
    return token_logprobs_ref(F.linear(hidden, weight, bias), targets, temperature=temperature)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> TokenStats:
    """Log-prob and entropy of `targets` under the head's distribution.

    Args:
        hidden: [N, D] floating.
        weight: [V, D], same dtype and device as hidden.
        targets: [N] int64 in [0, V).
        bias: [V] or None.
        temperature: > 0.

    Returns:
        TokenStats(logprob [N], entropy [N]), float32 (float64 for float64 input), both differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a target outside [0, V).
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight is {weight.dtype} on {weight.device}: "
            "they must have one dtype and device"
        )
    if bias is not None and (bias.shape, bias.dtype, bias.device) != (weight.shape[:1], weight.dtype, weight.device):
        raise ValueError(
            f"bias must be [{len(weight)}] {weight.dtype} on {weight.device} to match weight, "
            f"got {list(bias.shape)} {bias.dtype} on {bias.device}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{len(hidden)}] to match hidden, got {list(targets.shape)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return token_logprobs(F.linear(hidden, weight, bias), targets, temperature=temperature)
    check_targets(targets, len(weight))  # here, so that its message counts rows of the whole and not of a chunk
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    stats = [
        token_logprobs(F.linear(h, weight, bias), t, temperature=temperature)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenStats(torch.cat([s.logprob for s in stats]), torch.cat([s.entropy for s in stats]))
