"""The linear layers of a decode step, fused with the RMSNorm, the activation or the residual sum next to them.

    y = x·Wᵀ
    decode_linear:      out = y, or y · rsqrt(Σ squares / K + eps) if squares are given
                        (with silu, W = [gate; up] and out = silu(y_gate) · y_up)
    decode_linear_add:  residual += y,  out = residual · norm_weight,  squares = sums of residual²

RMSNorm divides all numbers of a token by the same root, so the division may follow the next product:
`decode_linear_add` computes the squares of the new residual, and the next `decode_linear` divides. A layer then has six
launches: four of these ops, the rotary embedding and the attention; separate kernels need nine or ten. Sums are
float32. The residual, residual · norm_weight and out are each rounded once; PyTorch also rounds y, the norm and
silu(y_gate).

Shapes: R sequences, K inputs, N outputs (N / 2 with silu), B blocks of outputs; x [R, K], weight [N, K],
squares [R, B]. Floor: the weights are read once, N·K elements; 2·R·N·K FLOPs. The op is for few sequences, where
reading the weights takes longer than multiplying them.

Source: RMSNorm (arXiv 1910.07467); programs that share outputs add their sums as in Stream-K (arXiv 2301.03598).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import INTERPRETED, Impl, choose, forward_only, launch, processors, register, tl, triton
from .silu_mul import silu

MAX_SEQUENCES = 64  # in one tile; for more, cuBLAS is near the floor
BLOCK_OUTPUTS = 64  # outputs of a program; `arrived` has a counter for each block of them


def decode_linear_ref(
    x: Tensor, weight: Tensor, squares: Tensor | None = None, *, eps: float = 0.0, silu: bool = False
) -> Tensor:
    """The formula above in plain PyTorch; float64 in, float64 out."""
    y = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    if squares is not None:
        y = y * torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + eps)
    if silu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y.to(x.dtype)


def decode_linear_add_ref(x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The formula above in plain PyTorch, with B = 1; float64 in, float64 out."""
    residual += F.linear(x, weight)
    wide = residual.to(torch.promote_types(x.dtype, torch.float32))
    return residual * norm_weight, wide.square().sum(1, keepdim=True)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    b_y, p_out, p_residual, p_norm_weight, p_new_squares, o_r, m_r, block, N, blocks,
    SILU: tl.constexpr, ADD: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Finish a program: activation or residual sum of the products b_y, and the stores."""
    dtype = p_out.dtype.element_ty
    if SILU:
        b_gate, b_up = b_y.reshape(b_y.shape[0], OUTPUTS // 2, 2).split()
        b_y = silu(b_gate) * b_up
    WIDTH: tl.constexpr = OUTPUTS // 2 if SILU else OUTPUTS
    o_n = block * WIDTH + tl.arange(0, WIDTH)[None, :]
    size = N // 2 if SILU else N
    o, m = o_r * size + o_n, m_r & (o_n < size)
    if ADD:
        b_residual = (tl.load(p_residual + o, m, other=0).to(tl.float32) + b_y).to(dtype)
        tl.store(p_residual + o, b_residual, m)
        b_y = b_residual.to(tl.float32)
        b_squares = tl.sum(tl.where(m, b_y * b_y, 0), 1, keep_dims=True)
        tl.store(p_new_squares + o_r * blocks + block, b_squares, m_r)
        b_y *= tl.load(p_norm_weight + o_n, o_n < size, other=0).to(tl.float32)
    tl.store(p_out + o, b_y.to(dtype), m)


@triton.jit
def _decode_linear_kernel(  # type: ignore[no-untyped-def]
    p_x, p_weight, p_squares, p_residual, p_norm_weight, p_out, p_new_squares, p_partial, p_arrived, R, N, K, eps,
    SQUARES: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    SEQUENCES: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: all sequences, OUTPUTS outputs, and one of SPLITS splits of the inputs, DEPTH inputs at a time.

    The last program of a block of outputs adds the partial sums of all splits in their order, so the result does not
    depend on which program is last. It resets the counter, so that a CUDA graph can replay the launch. WIDE multiplies
    in float32, because Triton's interpreter cannot multiply bfloat16.
    """
    block, split, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    dtype: tl.constexpr = tl.float32 if WIDE else p_x.dtype.element_ty
    each = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS) * DEPTH
    begin = split * each
    end = tl.minimum(begin + each, K)
    o_r = tl.arange(0, SEQUENCES)[:, None]
    m_r = o_r < R
    o_n = block * OUTPUTS + tl.arange(0, OUTPUTS)
    # with SILU the outputs alternate between gate and up, so that one program has both
    o_w = o_n // 2 + o_n % 2 * (N // 2) if SILU else o_n
    p_w = p_weight + o_w.to(tl.int64)[:, None] * K
    m_w = (o_n < N)[:, None]

    if PDL:
        # No kernel writes weights, so 1 KiB of each output's weights is prefetched while the previous kernel runs.
        o_line = tl.minimum(begin + tl.arange(0, 8)[None, :] * (128 // p_weight.dtype.element_ty.itemsize), K - 1)
        p_line = tl.where(m_w, p_w, p_weight) + o_line
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p_line.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_y = tl.zeros([SEQUENCES, OUTPUTS], tl.float32)
    for first in range(begin, end, DEPTH):
        o_k = first + tl.arange(0, DEPTH)[None, :]
        b_w = tl.load(p_w + o_k, m_w & (o_k < end), other=0).to(dtype)
        b_x = tl.load(p_x + o_r * K + o_k, m_r & (o_k < end), other=0).to(dtype)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")

    if SQUARES > 0:
        o_s = tl.arange(0, triton.next_power_of_2(SQUARES))[None, :]
        b_squares = tl.load(p_squares + o_r * SQUARES + o_s, m_r & (o_s < SQUARES), other=0)
        b_y *= tl.rsqrt(tl.sum(b_squares, 1, keep_dims=True) / K + eps)
    if SPLITS == 1:
        _store(b_y, p_out, p_residual, p_norm_weight, p_new_squares, o_r, m_r, block, N, blocks, SILU, ADD, OUTPUTS)
    else:
        p_sums = p_partial + block * (SPLITS * SEQUENCES * OUTPUTS) + o_r * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
        tl.store(p_sums + split * (SEQUENCES * OUTPUTS), b_y)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(p_arrived + block, 1) == SPLITS - 1:
            b_y = tl.zeros([SEQUENCES, OUTPUTS], tl.float32)
            for i in tl.static_range(SPLITS):
                b_y += tl.load(p_sums + i * (SEQUENCES * OUTPUTS), cache_modifier=".cg")
            _store(b_y, p_out, p_residual, p_norm_weight, p_new_squares, o_r, m_r, block, N, blocks, SILU, ADD, OUTPUTS)
            tl.store(p_arrived + block, 0)


def launch_config(R: int, itemsize: int = 2) -> dict[str, Any]:
    """A multiprocessor holds up to three programs, each of which loads three tiles of 16 KiB of weights ahead."""
    sequences = max(16, triton.next_power_of_2(R))
    return {"SEQUENCES": sequences, "OUTPUTS": BLOCK_OUTPUTS, "DEPTH": 256 // itemsize, "num_warps": 4, "num_stages": 4}


def num_splits(N: int, K: int, processors: int) -> int:
    """A power of two: about one program for each multiprocessor, with 256 inputs at least."""
    wanted = min(processors // triton.cdiv(N, BLOCK_OUTPUTS), K // 256, 8)
    return 1 << max(wanted, 1).bit_length() - 1


def _run(
    x: Tensor, weight: Tensor, squares: Tensor | None, eps: float, silu: bool, residual: Tensor | None,
    norm_weight: Tensor | None, arrived: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> out, squares of the residual (None without one)."""
    (R, K), N = x.shape, len(weight)
    config = launch_config(R, x.element_size())
    blocks, splits = triton.cdiv(N, BLOCK_OUTPUTS), 1
    out, new_squares, partial = x.new_empty(R, N // 2 if silu else N), None, None
    if residual is not None:
        splits = num_splits(N, K, processors(x.device, 4))  # the interpreter also splits
        new_squares = x.new_empty(R, blocks, dtype=torch.float32)
        if splits > 1:
            partial = x.new_empty(blocks * splits * config["SEQUENCES"] * BLOCK_OUTPUTS, dtype=torch.float32)
            arrived = x.new_zeros(blocks, dtype=torch.int32) if arrived is None else arrived
    if R:
        launch(
            _decode_linear_kernel, (blocks, splits), x, weight, squares, residual, norm_weight, out, new_squares,
            partial, arrived, R, N, K, eps, SQUARES=0 if squares is None else squares.shape[1], SILU=silu,
            ADD=residual is not None, SPLITS=splits, WIDE=INTERPRETED, **config,
        )  # fmt: skip
    return out, new_squares


def _launch(x: Tensor, weight: Tensor, squares: Tensor | None, eps: float, silu: bool) -> Tensor:
    return _run(x, weight, squares, eps, silu, None, None, None)[0]


def _fake(x: Tensor, weight: Tensor, squares: Tensor | None, eps: float, silu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if silu else weight.shape[0])


def _launch_add(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, arrived: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, squares = _run(x, weight, None, 0.0, False, residual, norm_weight, arrived)
    assert squares is not None
    return out, squares


def _fake_add(x: Tensor, weight: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), x.new_empty(
        x.shape[0], -(-weight.shape[0] // BLOCK_OUTPUTS), dtype=torch.float32
    )


_op = register("decode_linear", _launch, _fake)
_add_op = register("decode_linear_add", _launch_add, _fake_add, ("residual", "arrived"))


def _check(name: str, impl: Impl, x: Tensor, weight: Tensor, **others: tuple[Tensor | None, torch.dtype, Any]) -> str:
    """Check the arguments -> the implementation that runs. `others`: tensor, dtype, shape (None = any size)."""
    R, K = x.shape if x.ndim == 2 else (0, 0)
    if x.ndim != 2 or R > MAX_SEQUENCES or not x.is_floating_point():
        raise ValueError(f"x must be [R, K] floating point, R up to {MAX_SEQUENCES}, got {[*x.shape]} {x.dtype}")
    N = len(weight) if weight.ndim else 0
    for which, (t, dtype, shape) in {"x": (x, x.dtype, x.shape), "weight": (weight, x.dtype, (N, K)), **others}.items():
        if t is None:
            continue
        fits = t.ndim == len(shape) and all(size in (None, have) for size, have in zip(shape, t.shape, strict=True))
        if not fits or (t.dtype, t.device) != (dtype, x.device) or not t.is_contiguous():
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{which} must be [{sizes}] {dtype} on {x.device} and contiguous, got {[*t.shape]} {t.dtype} on "
                f"{t.device}, strides {t.stride()}"
            )
    forward_only(name, x, weight, *(t for t, _, _ in others.values() if t is not None))
    return choose(impl, x.device, x.dtype, cpp=False)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    squares: Tensor | None = None,
    *,
    eps: float = 0.0,
    silu: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """A linear layer of a few sequences, after the division of an RMSNorm, and with SwiGLU. Not differentiable.

    Args:
        x: [R, K] floating point, R up to 64.
        weight: [N, K]; with `silu`, the weights of gate, then those of up.
        squares: [R, B] float32 (float64 for float64) from `decode_linear_add`: the product is divided by
            sqrt(Σ squares / K + eps). None = no division.
        eps: of the RMSNorm.
        silu: return silu(gate) · up.
        impl: "triton" (CUDA), "torch", or "auto", the first that can run.

    All tensors are contiguous and on one device; all but squares have one dtype.

    Returns:
        [R, N], or with `silu` [R, N / 2], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: a tensor wants a gradient.

    Source: arXiv 1910.07467, 2002.05202.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = _check("decode_linear", impl, x, weight, squares=(squares, wide, (len(x), None)))
    if silu and len(weight) % 2:
        raise ValueError(f"with silu the rows of weight are gate and up, got {len(weight)}")
    if chosen == "torch":
        return decode_linear_ref(x, weight, squares, eps=eps, silu=silu)
    return _op(x, weight, squares, eps, silu)


def decode_linear_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    arrived: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a linear layer of a few sequences to the residual stream, and start its RMSNorm. Not differentiable.

    Args:
        x: [R, K] floating point, R up to 64.
        weight: [N, K].
        residual: [R, N], written in place.
        norm_weight: [N], of the RMSNorm.
        arrived: [⌈N / 64⌉] int32 zeros, which are zeros again at the end: counters of the programs that share outputs.
            None = new counters, which cost a launch.
        impl: "triton" (CUDA), "torch", or "auto", the first that can run.

    All tensors are contiguous and on one device; all but `arrived` have one dtype.

    Returns:
        residual · norm_weight [R, N], and squares of the residual [R, B] float32 (float64 for float64), for
        `decode_linear`. B depends on the implementation.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, or an `impl` that cannot run.
        RuntimeError: a tensor wants a gradient.

    Source: arXiv 1910.07467.
    """
    N, counters = len(weight), -(-len(weight) // BLOCK_OUTPUTS)
    chosen = _check(
        "decode_linear_add", impl, x, weight, residual=(residual, x.dtype, (len(x), N)),
        norm_weight=(norm_weight, x.dtype, (N,)), arrived=(arrived, torch.int32, (counters,)),
    )  # fmt: skip
    if chosen == "torch":
        return decode_linear_add_ref(x, weight, residual, norm_weight)
    return _add_op(x, weight, residual, norm_weight, arrived)
