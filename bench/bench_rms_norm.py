"""rms_norm: a norm of Janus-Pro-1B with the residual add before it, of one decode step and of training.

python -m bicot.bench.bench_rms_norm [--device cpu|cuda] [--output FILE.json]
Training is forward and backward, with the gradient of the weight. Floor, at the rate of a large copy: x and the
residual read, the sum and the norm written; in training also the sum and both gradients read, and one written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.rms_norm import add_rms_norm, rms_norm
from .harness import Case, Outputs, Provider, compiled, expect, kernel, main, short, with_gradients

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


def training(N: int, D: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)

    def ours(inputs: Inputs) -> Outputs:
        x, weight, residual = inputs
        return add_rms_norm(x, residual, weight, EPS, impl=impl)

    providers = {
        "ours": Provider(with_gradients(ours), f'impl="{impl}"'),
        "eager": Provider(with_gradients(eager), "transformers"),
        "torch.compile": Provider(with_gradients(compiled(eager)), "of eager"),
    }

    def exact(inputs: Inputs) -> Callable[[Outputs], float]:
        return expect(with_gradients(eager)([t.double() for t in inputs]))

    make = partial(inputs, N, D, dtype, device)
    labels = {"what": "forward and backward", "N": N, "D": D, "dtype": short(dtype)}
    return Case(labels, dtype, make, exact, providers, 8 * N * D * dtype.itemsize)


def cases(device: str, tiny: bool) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    shapes = [(2, 64)] if tiny else [(16, 2048), (128, 2048)]
    trained = [(3, 64)] if tiny else [(11_000 if device == "cuda" else 1024, 2048)]
    decoded = [case(N, D, dtype, device) for N, D in shapes for dtype in dtypes]
    return decoded + [training(N, D, dtype, device) for N, D in trained for dtype in dtypes]


if __name__ == "__main__":
    raise SystemExit(main("rms_norm", __doc__, cases))
