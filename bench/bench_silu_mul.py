"""silu_mul: the gated activation of Janus-Pro-1B, of one decode step and of training.

python -m bicot.bench.bench_silu_mul [--device cpu|cuda] [--output FILE.json]
Training is forward and backward. Floor, at the rate of a large copy: gate and up read, their product written; in
training also gate, up and the product's gradient read, and theirs written.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.silu_mul import silu_mul
from .harness import Case, Outputs, against_eager, kernel, main, short


def inputs(N: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(N, 2 * size, generator=generator, device=device).to(dtype)]


def eager(x: list[Tensor]) -> Outputs:
    """transformers' expression, after one projection for both."""
    gate, up = x[0].chunk(2, dim=-1)
    return [F.silu(gate) * up]


def case(N: int, size: int, dtype: torch.dtype, device: str, training: bool = False) -> Case:
    impl = kernel(device)
    return against_eager(
        ({"what": "forward and backward"} if training else {}) | {"N": N, "I": size, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, size, dtype, device),
        lambda x: [silu_mul(x[0], impl=impl)],
        eager,
        impl,
        backward=training,
        floor=(8 if training else 3) * N * size * dtype.itemsize,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    shapes = [(2, 64)] if tiny else [(16, 5632), (128, 5632)]
    trained = [(3, 64)] if tiny else [(11_000 if device == "cuda" else 512, 5632)]
    decoded = [case(*shape, dtype, device) for shape in shapes for dtype in dtypes]
    return decoded + [case(*shape, dtype, device, training=True) for shape in trained for dtype in dtypes]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
