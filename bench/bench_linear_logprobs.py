"""linear_logprobs: log-prob and entropy from hidden states and a head, forward alone and with both gradients.

python -m bicot.bench.bench_linear_logprobs [--device cpu|cuda] [--output FILE.json]
Floor: 2·N·V·D FLOP forward and 4·N·V·D backward (6 together), at the rate of a large square product in the same dtype.
The backward pass starts from one gradient a token on the log-prob and none on the entropy, as in a policy loss without
entropy bonus; that also lets peers take part which compute no entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_logprobs import linear_logprobs
from .harness import Case, Outputs, Provider, Unavailable, compiled, expect, gpu_only, kernel, main, notes, short

SHAPES = {
    "cpu": [(512, 16384, 512)],
    "cuda": [(4608, 16384, 4096), (2048, 102400, 4096), (4608, 16384, 2048), (2048, 102400, 2048)],
}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
Stats = tuple[Tensor, Tensor | None]
Formula = Callable[[Tensor, Tensor, Tensor], Stats]


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


def head(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [N, D], weight [V, D] and targets [N]; logits have standard deviation 1."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=generator, device=device) / D**0.5).to(dtype)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator, device=device)


def inputs(N: int, V: int, D: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    return Inputs(*head(N, V, D, dtype, device), torch.randn(N, generator=generator, device=device))


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Stats:
    logits = F.linear(hidden, weight)
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Stats:
    """As TRL's trainers call it, entropy included."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))
    return outputs[0], outputs[1]


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Stats:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Stats:
    gpu_only(hidden)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none"), None


def rounds_logits(dtype: torch.dtype) -> str:
    """The note on providers whose matrix product writes the logits in the dtype of the weights."""
    return "" if dtype == torch.float32 else f"rounds the logits to {short(dtype)} before the softmax"


def forward(formula: Formula) -> Callable[[Inputs], Outputs]:
    return torch.no_grad()(lambda x: formula(x.hidden, x.weight, x.targets))


def with_backward(formula: Formula) -> Callable[[Inputs], Outputs]:
    def run(x: Inputs) -> Outputs:
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        logprob, entropy = formula(hidden, weight, x.targets)
        grads = torch.autograd.grad(logprob, (hidden, weight), x.upstream.to(logprob.dtype))
        return logprob, entropy, *grads

    return run


def case(N: int, V: int, D: int, backward: bool, device: str) -> Case:
    dtype, impl = DTYPE[device], kernel(device)
    wrap = with_backward if backward else forward
    rounds = rounds_logits(dtype)
    low = "" if dtype == torch.float32 else f"returns {short(dtype)}"
    again = "computes the logits again in the backward pass" if backward else ""

    def truth(x: Inputs) -> Callable[[Outputs], float]:
        return expect(wrap(eager)(x._replace(hidden=x.hidden.double(), weight=x.weight.double())))

    return Case(
        {"pass": "forward + backward" if backward else "forward", "N": N, "V": V, "D": D, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, V, D, dtype, device),
        truth,
        {
            "ours": Provider(wrap(partial(linear_logprobs, impl=impl)), f'impl="{impl}"'),
            "eager": Provider(wrap(eager), rounds),
            "torch.compile": Provider(wrap(compiled(eager)), rounds),
            "TRL chunked": Provider(wrap(trl_chunked), notes(rounds, again)),
            "F.linear_cross_entropy": Provider(wrap(torch_chunked), notes("chunked; no entropy", low, again)),
            "Liger": Provider(wrap(liger), notes("fused linear cross-entropy; no entropy", rounds, again)),
        },
        flops=(6 if backward else 2) * N * V * D,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = [(16, 384, 32)] if tiny else SHAPES[device]
    return [case(*shape, backward, device) for shape in shapes for backward in (False, True)]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
