"""rms_norm: a norm of Janus-Pro-1B with the residual add before it, of one decode step and of training.

python -m bicot.bench.bench_rms_norm [--device cpu|cuda] [--output FILE.json]
Training is forward and backward, with the gradient of the weight. Floor, at the rate of a large copy: x and the
residual read, the sum and the norm written; in training also the sum and both gradients read, and one written.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..kernels.rms_norm import add_rms_norm, rms_norm
from .harness import Case, Outputs, against_eager, kernel, main, short

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


def case(N: int, D: int, dtype: torch.dtype, device: str, training: bool = False) -> Case:
    impl = kernel(device)

    def in_place(x: Inputs) -> Outputs:
        return [rms_norm(x[0], x[1], EPS, x[2], impl=impl), x[2]]

    def apart(x: Inputs) -> Outputs:
        return add_rms_norm(x[0], x[2], x[1], EPS, impl=impl)

    return against_eager(
        ({"what": "forward and backward"} if training else {}) | {"N": N, "D": D, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, D, dtype, device),
        apart if training else in_place,
        eager,
        impl,
        notes=("" if training else "adds in place", "transformers"),
        fresh=None if training else lambda x: (*x[:2], x[2].clone()),
        backward=training,
        floor=(8 if training else 4) * N * D * dtype.itemsize,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    shapes = [(2, 64)] if tiny else [(16, 2048), (128, 2048)]
    trained = [(3, 64)] if tiny else [(11_000 if device == "cuda" else 1024, 2048)]
    decoded = [case(*shape, dtype, device) for shape in shapes for dtype in dtypes]
    return decoded + [case(*shape, dtype, device, training=True) for shape in trained for dtype in dtypes]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
