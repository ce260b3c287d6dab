"""Log-prob and entropy of target tokens from hidden states and a linear head.

    z = (h Wᵀ + b) / temperature;  logprob = z_target - logsumexp(z);  entropy = logsumexp(z) - Σ softmax(z)·z

hidden [N, D], weight [V, D], bias [V] or None, targets [N]. The tokens are computed slice by slice, so that at most
`LOGITS_BYTES` of logits exist at a time. The backward pass computes the logits of a slice again and overwrites them
with their gradient. Floor: 2·N·V·D FLOP forward; 6·N·V·D backward, a third of it for the logits (4·N·V·D with a frozen
weight). `grpo_loss` computes the logits once: 6·N·V·D in all.

Logits have the dtype of the hidden states, as in the model's own forward pass. The weight's gradient is summed over the
slices in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, choose, without_autocast
from .token_logprobs import TokenStats, check_targets, launch_backward, launch_forward, token_logprobs_ref

LOGITS_BYTES = 96 * 2**20  # of all logits that exist at a time


def linear_logprobs_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> TokenStats:
    """The formula above in plain PyTorch, all logits at once."""
    return token_logprobs_ref(F.linear(hidden, weight, bias), targets, temperature=temperature)


def token_slices(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Even slices of the tokens, each with at most LOGITS_BYTES of logits; of 16·n tokens where that is possible."""
    N = len(hidden)
    most = max(1, LOGITS_BYTES // (len(weight) * hidden.element_size()))
    size = -(-N // max(1, -(-N // most)))  # as few slices as possible, evenly filled
    size = min(most, -(-size // 16) * 16)
    return (slice(start, min(start + size, N)) for start in range(0, N, max(1, size)))


class HeadGradients:
    """Gradients of hidden [N, D], weight [V, D] and bias [V] from those of the logits, slice by slice.

    Gradients that are not needed are not computed, and are returned as empty tensors. Sums over tokens are float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needed: list[bool]) -> None:
        self.hidden, self.weight, self.needed = hidden, weight, needed
        self.grad_hidden, self.grad_weight, self.grad_bias = empty_gradients(hidden, weight, needed)
        self.grad_bias.zero_()
        self.first = True

    def add(self, tokens: slice, grad_logits: Tensor, active: Tensor | None = None) -> None:
        """Add a slice. `active`: indices in it of the tokens with a gradient; the others skip the matrix products."""
        hidden = self.hidden[tokens]
        if active is not None and len(active) < len(grad_logits):
            grad_logits, hidden = grad_logits[active], hidden[active]
        if self.needed[0]:
            target = self.grad_hidden[tokens]
            if len(grad_logits) == len(target):
                torch.mm(grad_logits, self.weight, out=target)
            else:
                target.zero_()[active] = grad_logits @ self.weight
        if self.needed[1]:
            into, beta = self.grad_weight, 0 if self.first else 1  # the first slice overwrites
            if grad_logits.is_cuda and grad_logits.dtype != torch.float32:
                torch.addmm(into, grad_logits.T, hidden, out_dtype=torch.float32, beta=beta, out=into)
            else:
                into.addmm_(grad_logits.T.float(), hidden.float(), beta=beta)
            self.first = False
        if self.needed[2]:
            self.grad_bias += grad_logits.sum(0, dtype=torch.float32)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.first:  # no tokens at all
            self.grad_weight.zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias


def empty_gradients(hidden: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of hidden (its dtype), weight and bias (float32), with no elements where not needed."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, torch.float32, torch.float32)
    hidden_, weight_, bias_ = (
        hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needed, strict=True)
    )
    return hidden_, weight_, bias_


@torch.library.custom_op("bicot::linear_logprobs", mutates_args=())
@without_autocast
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy (float32) and lse (float64, for the backward pass)."""
    check_targets(targets, len(weight))
    outputs = _fake_forward(hidden)
    for tokens in token_slices(hidden, weight):
        logits = F.linear(hidden[tokens], weight, bias)
        launch_forward(logits, targets[tokens], temperature, impl, *(t[tokens] for t in outputs))
        del logits  # before those of the next slice are made
    return outputs


@_forward.register_fake
def _fake_forward(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprob = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return logprob, torch.empty_like(logprob), torch.empty_like(logprob, dtype=torch.float64)


@torch.library.custom_op("bicot::linear_logprobs_backward", mutates_args=())
@without_autocast
def _backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    needed: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = HeadGradients(hidden, weight, needed)
    for tokens in token_slices(hidden, weight):
        logits = F.linear(hidden[tokens], weight, bias)
        per_token = (grad_logprob[tokens], grad_entropy[tokens], logits, targets[tokens], entropy[tokens], lse[tokens])
        launch_backward(*per_token, temperature, impl, logits)
        gradients.add(tokens, logits)
        del logits, per_token
    return gradients.result()


@_backward.register_fake
def _fake_backward(
    grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, rest[-2])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, ctx.temperature, ctx.impl = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse)


def _autograd_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    weight = ctx.saved_tensors[1]
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad_logprob, grad_entropy, *ctx.saved_tensors, ctx.temperature, needed, ctx.impl)
    dtypes = (gradients[0].dtype, weight.dtype, weight.dtype)
    cast = [g.to(dtype) if need else None for g, dtype, need in zip(gradients, dtypes, needed, strict=True)]
    return *cast, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float) -> None:
    """Raise ValueError for shapes, dtypes, devices or a temperature that do not fit together."""
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
    if targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(f"targets must be int64 on {hidden.device}, got {targets.dtype} on {targets.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-prob and entropy of `targets` under the head's distribution, both differentiable, without logits [N, V].

    Args:
        hidden: [N, D] floating.
        weight: [V, D], same dtype and device as hidden.
        targets: [N] int64 in [0, V).
        bias: [V] or None.
        temperature: > 0.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch" (all logits at once), or "auto",
            the first that can run.

    Returns:
        TokenStats(logprob [N], entropy [N]), float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an `impl` that cannot run, or a target outside
            [0, V) (on CUDA an assertion on the device, for which the host does not wait).
        RuntimeError: `impl="native"` and the C++ library is missing.
    """
    check_head(hidden, weight, bias, targets, temperature)
    chosen = choose(impl, hidden.device, hidden.dtype)
    if chosen == "torch":
        check_targets(targets, len(weight))
        return linear_logprobs_ref(hidden, weight, targets, bias, temperature)
    logprob, entropy, _ = _forward(hidden, weight, bias, targets, float(temperature), chosen)
    return TokenStats(logprob, entropy)
