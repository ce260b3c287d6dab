"""rms_norm: one decode step's norm of Janus-Pro-1B, with the residual add before it.

python -m bicot.bench.bench_rms_norm [--device cpu|cuda] [--output FILE.json]
Floor: x and the residual read, the sum and the norm written, at the rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.rms_norm import rms_norm
from .harness import Case, Outputs, Provider, compiled, expect, kernel, main, short

EPS = 1e-6
Inputs = tuple[Tensor, Tensor, Tensor]  # x, weight, residual


def inputs(N: int, D: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x, residual = torch.randn(2, N, D, generator=generator, device=device).to(dtype)
    return x, torch.linspace(0.5, 1.5, D, device=device).to(dtype), residual


def eager(inputs: Inputs) -> Outputs:
    """transformers' residual add and LlamaRMSNorm; float64 for float64."""
    x, weight, residual = inputs
    residual = residual + x
    hidden = residual.to(torch.promote_types(x.dtype, torch.float32))
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return [weight * hidden.to(x.dtype), residual]


def truth(inputs: Inputs) -> Callable[[Outputs], float]:
    x, weight, residual = (t.double() for t in inputs)
    return expect(eager((x, weight, residual)))


def fresh(inputs: Inputs) -> Inputs:
    x, weight, residual = inputs
    return x, weight, residual.clone()


def case(N: int, D: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)

    def ours(given: Inputs) -> Outputs:
        x, weight, residual = given
        return [rms_norm(x, weight, EPS, residual, impl=impl), residual]

    providers = {
        "ours": Provider(torch.no_grad()(ours), f'impl="{impl}"; adds in place', fresh),
        "eager": Provider(torch.no_grad()(eager), "transformers"),
        "torch.compile": Provider(torch.no_grad()(compiled(eager)), "of eager"),
    }
    make = partial(inputs, N, D, dtype, device)
    return Case({"N": N, "D": D, "dtype": short(dtype)}, dtype, make, truth, providers, 4 * N * D * dtype.itemsize)


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(2, 64)] if tiny else [(16, 2048), (128, 2048)]
    return [case(N, D, dtype, device) for N, D in shapes for dtype in (torch.bfloat16, torch.float32)]


if __name__ == "__main__":
    raise SystemExit(main("rms_norm", __doc__, cases))
