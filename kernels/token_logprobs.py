"""Log-probability of each target token and entropy of its distribution, from logits.

For one token, z = logits / temperature with lse = log Σ_j exp(z_j) and p_j = exp(z_j - lse):

    logprob = z_t - lse                      d logprob / d logits_j = (1[j = t] - p_j) / temperature
    entropy = -Σ_j p_j log p_j               d entropy / d logits_j = -p_j (log p_j + entropy) / temperature

Shapes: logits [N, V], targets [N], logprob [N], entropy [N]; N packed tokens, V vocabulary.
Floor: forward reads N·V logits once; backward reads them once more and writes their gradient; about 20 FLOPs a logit.
Source: the policy's log-probability in BiCoT-GRPO (arXiv 2505.00703, equation 1).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .dispatch import NATIVE_DTYPES, Impl, choose, launch, tl, triton

NATIVE_LOGITS = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_double,
    ctypes.c_int,
)
_FORWARD = NATIVE_LOGITS + (ctypes.c_void_p,) * 3
_BACKWARD = NATIVE_LOGITS + (ctypes.c_void_p,) * 5 + (ctypes.c_int64,)
_BLOCK = 4096  # logits that a Triton program holds at a time: 16 for each thread of 8 warps


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


# A row of logits may begin at any address, but a 16-byte access begins at a multiple of 16 bytes. So a row is split
# into its `body`, which is read 16 bytes at a time, and its `rim`: up to 7 elements before the body and 7 after it.


@triton.jit
def split_row(p_row, V, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> head, body: how many elements lie before the first multiple of 16 bytes, and how many fill whole 16 bytes."""
    if ALIGNED:
        head, body = 0, V
    else:
        BYTES: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8
        PACK: tl.constexpr = 16 // BYTES
        head = tl.minimum(((16 - p_row.to(tl.int64) % 16) % 16 // BYTES).to(tl.int32), V)
        body = tl.multiple_of((V - head) // PACK * PACK, PACK)
    return head, body


@triton.jit
def rim(V, head, body):  # type: ignore[no-untyped-def]
    """-> offsets and mask [16] of the row's elements outside its body."""
    o_rim = tl.arange(0, 16)
    o_tail = head + body + o_rim - 8
    return tl.where(o_rim < 8, o_rim, o_tail), tl.where(o_rim < 8, o_rim < head, o_tail < V)


@triton.jit
def online_stats(b_x, scale, maximum, total, weighted):  # type: ignore[no-untyped-def]
    """Add a block to the running maximum, Σ 2^d and Σ d·2^d, where d = (x - maximum)·scale."""
    peak = tl.maximum(maximum, tl.max(b_x, 0))
    base = tl.where(peak == float("-inf"), 0.0, peak)  # only -inf so far: no mass, and x - peak would be NaN
    shift = tl.where(maximum == float("-inf"), 0.0, (maximum - base) * scale)
    factor = tl.exp2(shift)
    b_d = (b_x - base) * scale
    b_e = tl.exp2(b_d)
    weighted = (weighted + shift * total) * factor + tl.sum(tl.maximum(b_d, -150.0) * b_e, 0)  # not -inf · 0
    return peak, total * factor + tl.sum(b_e, 0), weighted


@triton.jit
def load_block(p_body, begin, body, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x = begin + tl.arange(0, BLOCK)
    return tl.load(p_body + o_x, mask=o_x < body, other=float("-inf")).to(tl.float32)


@triton.jit
def row_stats(p_row, V, scale, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> maximum, Σ 2^d, Σ d·2^d of a row, and the last block of its body, which is still in registers."""
    head, body = split_row(p_row, V, ALIGNED)
    p_body = tl.multiple_of(p_row + head, 16)
    maximum, total, weighted = float("-inf"), 0.0, 0.0
    b_x = tl.full((BLOCK,), float("-inf"), tl.float32)
    for begin in range(0, body, BLOCK):
        b_x = load_block(p_body, begin, body, BLOCK)
        maximum, total, weighted = online_stats(b_x, scale, maximum, total, weighted)
    if not ALIGNED:
        o_rim, m_rim = rim(V, head, body)
        b_rim = tl.load(p_row + o_rim, mask=m_rim, other=float("-inf")).to(tl.float32)
        maximum, total, weighted = online_stats(b_rim, scale, maximum, total, weighted)
    return maximum, total, weighted, b_x


@triton.jit
def softmax_term(b_x, high, low, scale, a, b):  # type: ignore[no-untyped-def]
    """p·(a + b·log2 p), the gradient without the target's own term; log2 p = (x - high - low)·scale."""
    b_d = ((b_x - high) - low) * scale
    return tl.exp2(b_d) * (a + b * tl.maximum(b_d, -150.0))


@triton.jit
def last_block(p_row, V, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block that `row_stats` returns, for a kernel that does not call it."""
    head, body = split_row(p_row, V, ALIGNED)
    last = tl.maximum(tl.cdiv(body, BLOCK) - 1, 0)  # the body of a short row is empty
    return load_block(tl.multiple_of(p_row + head, 16), last * BLOCK, body, BLOCK)


@triton.jit
def write_gradient(  # type: ignore[no-untyped-def]
    b_x, p_row, p_grad, target, V, high, low, scale, a, b, label, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    """Write the gradient of a row. `p_grad` may be `p_row`; both have the same offset from a multiple of 16 bytes.

    The last block, `b_x`, comes first: after a forward sweep it is in registers, and the blocks before it are in cache.
    """
    head, body = split_row(p_row, V, ALIGNED)
    p_body, p_grad_body = tl.multiple_of(p_row + head, 16), tl.multiple_of(p_grad + head, 16)
    blocks = tl.cdiv(body, BLOCK)
    for i in range(blocks):
        begin = (blocks - 1 - i) * BLOCK
        if i > 0:
            b_x = load_block(p_body, begin, body, BLOCK)
        o_x = begin + tl.arange(0, BLOCK)
        b_g = softmax_term(b_x, high, low, scale, a, b) + tl.where(head + o_x == target, label, 0.0)
        tl.store(p_grad_body + o_x, b_g.to(p_grad.dtype.element_ty), mask=o_x < body)
    if not ALIGNED:
        o_rim, m_rim = rim(V, head, body)
        b_rim = tl.load(p_row + o_rim, mask=m_rim, other=float("-inf")).to(tl.float32)
        b_g = softmax_term(b_rim, high, low, scale, a, b) + tl.where(o_rim == target, label, 0.0)
        tl.store(p_grad + o_rim, b_g.to(p_grad.dtype.element_ty), mask=m_rim)


@triton.jit
def write_zeros(p_grad, V, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fill the gradient of a row with zeros."""
    head, body = split_row(p_grad, V, ALIGNED)
    p_body = tl.multiple_of(p_grad + head, 16)
    for begin in range(0, body, BLOCK):
        o_x = begin + tl.arange(0, BLOCK)
        tl.store(p_body + o_x, tl.zeros((BLOCK,), p_grad.dtype.element_ty), mask=o_x < body)
    if not ALIGNED:
        o_rim, m_rim = rim(V, head, body)
        tl.store(p_grad + o_rim, tl.zeros((16,), p_grad.dtype.element_ty), mask=m_rim)


@triton.jit(do_not_specialize=["p_targets"])  # slices of tokens begin at any address
def _forward_kernel(  # type: ignore[no-untyped-def]
    p_logits, stride, p_targets, V, inv_temperature, p_logprob, p_entropy, p_lse,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    p_row = p_logits + token * stride
    maximum, total, weighted, _ = row_stats(p_row, V, inv_temperature * 1.4426950408889634, BLOCK, ALIGNED)
    x_target = tl.load(p_row + tl.load(p_targets + token)).to(tl.float32)
    log_total = tl.log(total)
    tl.store(p_logprob + token, (x_target - maximum) * inv_temperature - log_total)
    tl.store(p_entropy + token, log_total - weighted / total * 0.6931471805599453)
    # float64: at an offset of 1e4 a float32 log-sum-exp would cost the backward pass three digits
    tl.store(p_lse + token, maximum.to(tl.float64) * inv_temperature + log_total.to(tl.float64))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    p_logits, stride, p_targets, V, inv_temperature, p_grad_logprob, p_grad_entropy, p_lse, p_entropy, p_grad,
    grad_stride, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    grad_logprob, grad_entropy = tl.load(p_grad_logprob + token), tl.load(p_grad_entropy + token)
    pivot = tl.load(p_lse + token) / inv_temperature  # split in two floats, so that x - pivot keeps float32 precision
    high = pivot.to(tl.float32)
    low = (pivot - high.to(tl.float64)).to(tl.float32)
    a = -(grad_logprob + grad_entropy * tl.load(p_entropy + token)) * inv_temperature
    b = -grad_entropy * inv_temperature * 0.6931471805599453
    p_row = p_logits + token * stride
    write_gradient(
        last_block(p_row, V, BLOCK, ALIGNED), p_row, p_grad + token * grad_stride, tl.load(p_targets + token), V, high,
        low, inv_temperature * 1.4426950408889634, a, b, grad_logprob * inv_temperature, BLOCK, ALIGNED,
    )  # fmt: skip


def row_config(*matrices: Tensor) -> dict[str, Any]:
    """Launch options of a kernel with one program for each row. All matrices have one shape."""
    V = matrices[0].shape[1]
    block = min(triton.next_power_of_2(max(V, 16)), _BLOCK)
    aligned = V % 16 == 0 and all(m.stride(0) % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
    # contraction on: only the draws of cfg_sample need every rounding where it is written
    return {"BLOCK": block, "ALIGNED": aligned, "num_warps": 8 if block > 2048 else 4, "enable_fp_fusion": True}


def contiguous_rows(logits: Tensor) -> Tensor:
    """The logits, or a copy if the elements of a row do not lie side by side."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def contiguous_aligned(logits: Tensor) -> Tensor:
    """The logits, or a copy, with the layout of a new tensor: so their gradient has the same 16-byte boundaries."""
    dense = logits.is_contiguous() and logits.data_ptr() % 16 == 0
    return logits if dense else logits.clone(memory_format=torch.contiguous_format)


def launch_forward(
    logits: Tensor, targets: Tensor, temperature: float, impl: str, logprob: Tensor, entropy: Tensor, lse: Tensor
) -> None:
    """Fill logprob, entropy [N] float32 and lse [N] float64."""
    logits, targets = contiguous_rows(logits), targets.contiguous()
    if impl == "native":
        run = native.function(f"bicot_token_logprobs_{NATIVE_DTYPES[logits.dtype]}", *_FORWARD)
        run(*native_logits(logits, targets, temperature), logprob.data_ptr(), entropy.data_ptr(), lse.data_ptr())
    elif len(logits):
        launch(
            _forward_kernel, (len(logits),), logits, logits.stride(0), targets, logits.shape[1], 1 / temperature,
            logprob, entropy, lse, **row_config(logits),
        )  # fmt: skip


def launch_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    impl: str,
    grad_logits: Tensor,
) -> None:
    """Fill grad_logits, which may be `logits` itself. In both, the elements of a row lie side by side."""
    targets = targets.contiguous()
    per_token = [grad_logprob.contiguous(), grad_entropy.contiguous(), lse, entropy]
    if impl == "native":
        run = native.function(f"bicot_token_logprobs_backward_{NATIVE_DTYPES[logits.dtype]}", *_BACKWARD)
        out = grad_logits.data_ptr(), grad_logits.stride(0)
        run(*native_logits(logits, targets, temperature), *(t.data_ptr() for t in per_token), *out)
    elif len(logits):
        launch(
            _backward_kernel, (len(logits),), logits, logits.stride(0), targets, logits.shape[1], 1 / temperature,
            *per_token, grad_logits, grad_logits.stride(0), **row_config(logits, grad_logits),
        )  # fmt: skip


def native_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[int | float, ...]:
    """The first arguments of every C++ kernel that reads logits."""
    threads = torch.get_num_threads()
    return logits.data_ptr(), logits.stride(0), targets.data_ptr(), *logits.shape, temperature, threads


@torch.library.custom_op("bicot::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy (float32) and lse (float64, for the backward pass)."""
    check_targets(targets, logits.shape[1])
    outputs = _fake_forward(logits)
    launch_forward(logits, targets, temperature, impl, *outputs)
    return outputs


@_forward.register_fake
def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprob = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return logprob, torch.empty_like(logprob), torch.empty_like(logprob, dtype=torch.float64)


@torch.library.custom_op("bicot::token_logprobs_backward", mutates_args=())
def _backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    impl: str,
) -> Tensor:
    logits = contiguous_rows(logits) if impl == "native" else contiguous_aligned(logits)
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch_backward(grad_logprob, grad_entropy, logits, targets, entropy, lse, temperature, impl, grad_logits)
    return grad_logits


@_backward.register_fake
def _fake_backward(grad_logprob: Tensor, grad_entropy: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("bicot::token_logprobs_backward_", mutates_args=("logits",))
def _backward_inplace(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    impl: str,
) -> None:
    """Overwrite the logits with their gradient."""
    launch_backward(grad_logprob, grad_entropy, logits, targets, entropy, lse, temperature, impl, logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, ctx.temperature, ctx.inplace, ctx.impl = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, entropy, lse)


def _autograd_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, *per_token = ctx.saved_tensors
    inputs = (grad_logprob, grad_entropy, logits, *per_token, ctx.temperature, ctx.impl)
    if ctx.inplace:
        _backward_inplace(*inputs)
        return logits.detach(), None, None, None, None
    return _backward(*inputs), None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_save_for_backward)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise for targets outside [0, V), naming the first; on a GPU an assertion, for which the host does not wait."""
    bad = (targets < 0) | (targets >= vocabulary)
    if targets.is_cuda or torch.compiler.is_compiling():  # no host sync, no data-dependent branch
        torch._assert_async(~bad.any(), f"targets must be in [0, {vocabulary})")
    elif bad.any():
        token = int(bad.nonzero()[0])
        raise ValueError(f"targets must be in [0, {vocabulary}): targets[{token}] = {int(targets[token])}")


def check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Raise ValueError for shapes, dtypes, devices or a temperature that do not fit together."""
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


def check_overwritable(logits: Tensor) -> None:
    """Raise ValueError for logits that their gradient cannot overwrite."""
    if any(x is not None and x.is_leaf and x.requires_grad for x in (logits, logits._base)):
        raise ValueError("the gradient cannot overwrite a leaf or a view of one: give the output of a head, or a clone")
    if not (logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]) and logits.numel():
        raise ValueError(f"the gradient cannot overwrite logits of strides {logits.stride()}: give contiguous ones")


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-probability of `targets` and entropy of softmax(logits / temperature), both differentiable.

    Args:
        logits: [N, V], any floating dtype and strides; computed in float32, or in float64 for float64. A logit of -inf
            has probability 0. A row that holds NaN, +inf or only -inf gives NaN.
        targets: [N] int64 in [0, V), on the device of `logits`.
        temperature: divides the logits; positive.
        inplace_backward: the backward pass overwrites `logits` with their gradient and allocates nothing. No other
            operation may need them then; if one does, autograd raises (a linear head does not need its output). The
            PyTorch implementation ignores this option.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run.

    Returns:
        TokenStats(logprob [N], entropy [N]) in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: bad shapes, dtypes, devices, temperature or targets, an `impl` that cannot run, or logits that
            cannot be overwritten. On CUDA, and inside torch.compile with the PyTorch implementation, a target out of
            range fails an assertion on the device (RuntimeError) instead, for which the host does not wait.
        RuntimeError: `impl="native"` and the C++ library is missing.

    Source: arXiv 2505.00703, equation 1.
    """
    check_logits(logits, targets, temperature)
    if inplace_backward:
        check_overwritable(logits)
    chosen = choose(impl, logits.device, logits.dtype)
    if chosen == "torch":
        check_targets(targets, logits.shape[1])
        return token_logprobs_ref(logits, targets, temperature=temperature)
    logprob, entropy, _ = _forward(logits, targets, float(temperature), inplace_backward, chosen)
    return TokenStats(logprob, entropy)
