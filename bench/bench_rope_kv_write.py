"""rope_kv_write: rotate and store the tokens of one decode step of Janus-Pro-1B, 16 heads of 128.

python -m bicot.bench.bench_rope_kv_write [--device cpu|cuda] [--output FILE.json]
Floor: queries, keys and values read and written, at the rate of a large copy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..kernels.rope_kv_write import rope_kv_write
from .harness import Case, Outputs, against_eager, kernel, main, short

HEADS, E, CONTEXT = 16, 128, 800
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # as rope_kv_write takes them


def inputs(N: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(N, 3 * HEADS * E, generator=generator, device=device).to(dtype)
    angles = torch.arange(CONTEXT, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, E // 2, device=device)
    positions = torch.randint(0, CONTEXT, (N,), generator=generator, device=device)
    slots = torch.randperm(2 * N, generator=generator, device=device)[:N]
    keys, values = torch.zeros(2, 2 * N, HEADS, E, dtype=dtype, device=device)
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), positions, slots, keys, values


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat([-x[..., E // 2 :], x[..., : E // 2]], dim=-1)


def eager(inputs: Inputs) -> Outputs:
    """transformers' apply_rotary_pos_emb, and a write to the same pool."""
    qkv, cos, sin, positions, slots, keys, values = inputs
    q, k, v = qkv.view(len(qkv), 3, HEADS, E).unbind(1)
    cos, sin = (torch.cat([table, table], dim=-1)[positions][:, None] for table in (cos, sin))
    keys[slots], values[slots] = k * cos + rotate_half(k) * sin, v
    return [q * cos + rotate_half(q) * sin, keys, values]


def case(N: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)
    return against_eager(
        {"N": N, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, dtype, device),
        lambda x: [rope_kv_write(*x, impl=impl), *x[5:]],
        eager,
        impl,
        notes=("rotates in place", "transformers"),
        fresh=lambda x: (x[0].clone(), *x[1:]),
        floor=2 * 3 * N * HEADS * E * dtype.itemsize,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    return [case(N, dtype, device) for N in ([2] if tiny else [16, 128]) for dtype in (torch.bfloat16, torch.float32)]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
