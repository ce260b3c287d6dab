"""token_logprobs: log-prob and entropy from logits, forward and forward + backward.

python -m bicot.bench.bench_token_logprobs [--device cpu|cuda] [--output FILE.json]
Floor: the logits are read once forward; with backward they are read twice and their gradient is written once.
The backward pass is that of Σ logprob + 0.01·Σ entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.token_logprobs import token_logprobs, token_logprobs_ref
from .harness import IN_PLACE, Case, Outputs, Provider, compiled, expect, kernel, main, short

SHAPES = {"cpu": [(4096, 16384), (512, 102400)], "cuda": [(4608, 16384), (2048, 102400)]}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    logits: Tensor
    targets: Tensor


def inputs(N: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, generator=generator, device=device) * 3
    return Inputs(logits.to(dtype), torch.randint(0, V, (N,), generator=generator, device=device))


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        from trl import kernels  # the Triton kernel that trl.trainer calls, without what else trl.trainer imports

        return kernels.selective_log_softmax_and_entropy(logits, targets)
    from trl.trainer import utils

    return utils.selective_log_softmax_and_entropy(logits, targets)


def forward(formula: Formula) -> Callable[[Inputs], Outputs]:
    return torch.no_grad()(lambda x: formula(x.logits, x.targets))


def with_backward(formula: Formula) -> Callable[[Inputs], Outputs]:
    def run(x: Inputs) -> Outputs:
        leaf = x.logits.detach().requires_grad_()
        logits = leaf.view_as(leaf)  # what overwrites its logits refuses a leaf
        logprob, entropy = formula(logits, x.targets)
        (grad,) = torch.autograd.grad(logprob.sum() + 0.01 * entropy.sum(), logits)
        return logprob, entropy, grad

    return run


def case(N: int, V: int, dtype: torch.dtype, backward: bool, device: str) -> Case:
    impl = kernel(device)
    wrap = with_backward if backward else forward

    def truth(x: Inputs) -> Callable[[Outputs], float]:
        return expect(wrap(token_logprobs_ref)(x._replace(logits=x.logits.double())))

    providers = {
        "ours": Provider(wrap(partial(token_logprobs, impl=impl)), f'impl="{impl}"'),
        "eager": Provider(wrap(eager)),
        "torch.compile": Provider(wrap(compiled(token_logprobs_ref))),
        "TRL": Provider(wrap(trl), "its Triton kernel" if device == "cuda" else "row by row, in the logits' dtype"),
    }
    if backward:
        in_place = wrap(partial(token_logprobs, impl=impl, inplace_backward=True))
        providers["ours, in place"] = Provider(in_place, IN_PLACE, lambda x: x._replace(logits=x.logits.clone()))
    return Case(
        {"pass": "forward + backward" if backward else "forward", "N": N, "V": V, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, V, dtype, device),
        truth,
        providers,
        bytes=(3 if backward else 1) * N * V * dtype.itemsize,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(16, 384)] if tiny else SHAPES[device]
    every = product(shapes, DTYPES[device], (False, True))
    return [case(N, V, dtype, backward, device) for (N, V), dtype, backward in every]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
