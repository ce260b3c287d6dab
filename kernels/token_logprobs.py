"""Log-probability of each row's target token and entropy of each row, from logits.

For a row z = logits / temperature with lse = log Σ_j exp(z_j) and p_j = exp(z_j - lse):

    logprob = z_t - lse                      d logprob / d logits_j = (1[j = t] - p_j) / temperature
    entropy = -Σ_j p_j log p_j               d entropy / d logits_j = -p_j (log p_j + entropy) / temperature

Shapes: logits [N, V], targets [N], logprob [N], entropy [N]; N packed tokens, V vocabulary.
Floor: forward reads N·V logits once, backward reads them once more and writes as many; about 20 FLOPs a logit.
Source: the policy's log-probability in BiCoT-GRPO (arXiv 2505.00703, equation 1).
"""

import ctypes
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import native

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ROWS = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_double,
    ctypes.c_int,
)
_FORWARD = _ROWS + (ctypes.c_void_p,) * 3
_BACKWARD = _ROWS + (ctypes.c_void_p,) * 5


class TokenStats(NamedTuple):
    """Per-token results in nats: logprob [N] and entropy [N], float32 (float64 for float64 logits)."""

    logprob: Tensor
    entropy: Tensor


def token_logprobs_ref(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenStats:
    """`token_logprobs` in plain PyTorch, for any floating dtype and device, without checks."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)  # 0 log 0 = 0, in the gradient too
    return TokenStats(logp.gather(-1, targets[:, None]).squeeze(-1), entropy)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    bad = (targets < 0) | (targets >= vocabulary)
    if targets.is_cuda or torch.compiler.is_compiling():  # no host sync, no data-dependent branch
        torch._assert_async(~bad.any(), f"targets must be in [0, {vocabulary})")
    elif bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"targets must be in [0, {vocabulary}): targets[{row}] = {int(targets[row])}")


def _row_args(logits: Tensor, targets: Tensor, temperature: float) -> tuple[int | float, ...]:
    rows, vocabulary = logits.shape
    threads = torch.get_num_threads()
    return logits.data_ptr(), logits.stride(0), targets.data_ptr(), rows, vocabulary, temperature, threads


def _unit_columns(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@torch.library.custom_op("bicot::token_logprobs", mutates_args=(), device_types="cpu")
def _native_forward(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy (float32) and lse (float64, for the backward pass)."""
    _check_targets(targets, logits.shape[1])
    run = native.function(f"bicot_token_logprobs_{_NATIVE_DTYPES[logits.dtype]}", *_FORWARD)
    logits, targets = _unit_columns(logits), targets.contiguous()
    logprob, entropy, lse = _fake_forward(logits, targets, temperature)
    run(*_row_args(logits, targets, temperature), logprob.data_ptr(), entropy.data_ptr(), lse.data_ptr())
    return logprob, entropy, lse


@_native_forward.register_fake
def _fake_forward(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logprob = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return logprob, torch.empty_like(logprob), torch.empty_like(logprob, dtype=torch.float64)


@torch.library.custom_op("bicot::token_logprobs_backward", mutates_args=(), device_types="cpu")
def _native_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
) -> Tensor:
    run = native.function(f"bicot_token_logprobs_backward_{_NATIVE_DTYPES[logits.dtype]}", *_BACKWARD)
    logits, targets = _unit_columns(logits), targets.contiguous()
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    per_row = [grad_logprob.contiguous(), grad_entropy.contiguous(), lse, entropy]
    run(*_row_args(logits, targets, temperature), *(t.data_ptr() for t in per_row), grad_logits.data_ptr())
    return grad_logits


@_native_backward.register_fake
def _fake_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, ctx.temperature = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, entropy, lse)


def _autograd_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    grad = _native_backward(grad_logprob, grad_entropy, *ctx.saved_tensors, ctx.temperature)
    return grad, None, None


_native_forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be [N, V] floating point, got {list(logits.shape)} {logits.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets must be [N] = [{logits.shape[0]}] to match logits, got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(f"logits and targets must share a device, got {logits.device} and {targets.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    impl: Literal["auto", "native", "torch"] = "auto",
) -> TokenStats:
    """Log-probability of `targets` and entropy of every row of `logits / temperature`, both differentiable.

    Args:
        logits: [N, V], any floating dtype; computed in float32, or in float64 for float64. Rows may be strided; -inf
            entries have probability 0. A row that holds NaN, +inf or only -inf gives NaN.
        targets: [N] int64 in [0, V), on the device of `logits`.
        temperature: divides the logits; positive.
        impl: "native" is the C++ kernel (CPU, float32 or bfloat16), "torch" plain PyTorch, "auto" the native one
            where it can run.

    Returns:
        TokenStats(logprob [N], entropy [N]) in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: bad shapes, dtypes, devices, temperature or targets, or `impl="native"` for logits it cannot take.
            On CUDA, and inside torch.compile with the PyTorch implementation, a target out of range is a device
            assertion (RuntimeError) instead, which costs no sync.
        RuntimeError: `impl="native"` and the C++ library is missing.

    Source: arXiv 2505.00703, equation 1.
    """
    _check(logits, targets, temperature)
    if impl not in ("auto", "native", "torch"):
        raise ValueError(f'impl must be "auto", "native" or "torch", got {impl!r}')
    takes = logits.device.type == "cpu" and logits.dtype in _NATIVE_DTYPES
    if impl == "native" and not takes:
        where = f"{logits.dtype} on {logits.device.type}"
        raise ValueError(f'impl="native" takes float32 or bfloat16 logits on the CPU, got {where}; use impl="torch"')
    if impl == "native" or (impl == "auto" and takes and native.available()):
        logprob, entropy, _ = _native_forward(logits, targets, float(temperature))
        return TokenStats(logprob, entropy)
    _check_targets(targets, logits.shape[1])
    return token_logprobs_ref(logits, targets, temperature=temperature)
