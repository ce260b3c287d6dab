"""silu_mul: the gated activation of one decode step of Janus-Pro-1B.

python -m bicot.bench.bench_silu_mul [--device cpu|cuda] [--output FILE.json]
Floor: gate and up read, their product written, at the rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.silu_mul import silu_mul
from .harness import Case, Outputs, Provider, compiled, expect, kernel, main, short


def inputs(N: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(N, 2 * size, generator=generator, device=device).to(dtype)


def eager(gate_up: Tensor) -> Outputs:
    """transformers' expression, after one projection for both."""
    gate, up = gate_up.chunk(2, dim=-1)
    return [F.silu(gate) * up]


def truth(gate_up: Tensor) -> Callable[[Outputs], float]:
    return expect(eager(gate_up.double()))


def case(N: int, size: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)
    providers = {
        "ours": Provider(lambda x: [silu_mul(x, impl=impl)], f'impl="{impl}"'),
        "eager": Provider(eager, "transformers"),
        "torch.compile": Provider(compiled(eager), "of eager"),
    }
    make = partial(inputs, N, size, dtype, device)
    return Case(
        {"N": N, "I": size, "dtype": short(dtype)}, dtype, make, truth, providers, 3 * N * size * dtype.itemsize
    )


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(2, 64)] if tiny else [(16, 5632), (128, 5632)]
    return [case(N, size, dtype, device) for N, size in shapes for dtype in (torch.bfloat16, torch.float32)]


if __name__ == "__main__":
    raise SystemExit(main("silu_mul", __doc__, cases))
