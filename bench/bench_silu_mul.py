"""silu_mul: the gated activation of Janus-Pro-1B, of one decode step and of training.

python -m bicot.bench.bench_silu_mul [--device cpu|cuda] [--output FILE.json]
Training is forward and backward. Floor, at the rate of a large copy: gate and up read, their product written; in
training also gate, up and the product's gradient read, and theirs written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.silu_mul import silu_mul
from .harness import Case, Outputs, Provider, compiled, expect, kernel, main, short, with_gradients


def inputs(N: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(N, 2 * size, generator=generator, device=device).to(dtype)


def eager(gate_up: Tensor) -> Outputs:
    """transformers' expression, after one projection for both."""
    gate, up = gate_up.chunk(2, dim=-1)
    return [F.silu(gate) * up]


def truth(gate_up: Tensor) -> Callable[[Outputs], float]:
    return expect(eager(gate_up.double()))


def exact(gate_up: Tensor) -> Callable[[Outputs], float]:
    return expect(with_gradients(lambda x: eager(x[0]))([gate_up.double()]))


def case(N: int, size: int, dtype: torch.dtype, device: str, training: bool = False) -> Case:
    impl = kernel(device)
    ways: dict[str, tuple[Callable[[Tensor], Outputs], str]] = {
        "ours": (lambda x: [silu_mul(x, impl=impl)], f'impl="{impl}"'),
        "eager": (eager, "transformers"),
        "torch.compile": (compiled(eager), "of eager"),
    }

    def provider(run: Callable[[Tensor], Outputs], note: str) -> Provider:
        trained = with_gradients(lambda x: run(x[0]))
        return Provider(lambda x: trained([x]), note) if training else Provider(run, note)

    labels = {"what": "forward and backward"} if training else {}
    moved = (8 if training else 3) * N * size * dtype.itemsize
    return Case(
        labels | {"N": N, "I": size, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, size, dtype, device),
        exact if training else truth,
        {name: provider(*way) for name, way in ways.items()},
        moved,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    shapes = [(2, 64)] if tiny else [(16, 5632), (128, 5632)]
    trained = [(3, 64)] if tiny else [(11_000 if device == "cuda" else 512, 5632)]
    decoded = [case(N, size, dtype, device) for N, size in shapes for dtype in dtypes]
    return decoded + [case(N, size, dtype, device, training=True) for N, size in trained for dtype in dtypes]


if __name__ == "__main__":
    raise SystemExit(main("silu_mul", __doc__, cases))
