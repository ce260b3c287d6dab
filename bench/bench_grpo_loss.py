"""grpo_loss: the loss and its gradients, from logits and from hidden states and a head.

python -m bicot.bench.bench_grpo_loss [--device cpu|cuda] [--output FILE.json]
8 samples of equal length, loss_type="dapo", beta 0.01, old and reference log-probs given. Ratios stay inside the clip
range, so that the rounding of a logit cannot flip a clip and no row is without gradient. Floor: from logits, they are
read once and their gradient is written once; from hidden states, 6·N·V·D FLOP, 4 with a frozen head. Ours reports
entropies too, which no other provider is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.dispatch import Impl
from ..kernels.grpo_loss import TokenStream, grpo_loss
from .bench_linear_logprobs import DTYPE as HEAD_DTYPE
from .bench_linear_logprobs import SHAPES as HEAD_SHAPES
from .bench_linear_logprobs import head, rounds_logits, trl_chunked
from .bench_token_logprobs import DTYPES as LOGITS_DTYPES
from .bench_token_logprobs import SHAPES as LOGITS_SHAPES
from .harness import IN_PLACE, Case, Outputs, Provider, compiled, expect, gpu_only, kernel, main, notes, short

SAMPLES, BETA, EPSILON = 8, 0.01, 0.2


class Inputs(NamedTuple):
    """`source` is (logits [N, V],) or (hidden [N, D], weight [V, D]); then per-token columns [N], advantages [S]."""

    source: tuple[Tensor, ...]
    targets: Tensor
    old: Tensor
    ref: Tensor
    sample: Tensor
    advantages: Tensor

    def per_sample(self) -> list[Tensor]:
        """targets, old and ref as [S, L]."""
        return [column.view(SAMPLES, -1) for column in (self.targets, self.old, self.ref)]


Loss = Callable[[Inputs], Tensor]


def logprob_of(x: Inputs) -> Tensor:
    logits = x.source[0] if len(x.source) == 1 else F.linear(*x.source)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, x.targets[:, None]).squeeze(-1)


def inputs(N: int, V: int, D: int | None, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(2)
    hidden, weight, targets = head(N, V, D or 1, dtype, device)
    source: tuple[Tensor, ...] = (hidden, weight)
    if D is None:
        source = ((torch.randn(N, V, generator=generator, device=device) * 3).to(dtype),)
    advantages = torch.linspace(-0.5, 1.5, SAMPLES, device=device)  # of a sum that does not cancel
    sample = torch.arange(N, device=device) // (N // SAMPLES)
    x = Inputs(source, targets, targets, targets, sample, advantages)
    logprob = logprob_of(x)
    old, ref = (logprob + 0.1 * torch.rand(N, generator=generator, device=device) - 0.05 for _ in range(2))
    return x._replace(old=old, ref=ref)


def from_logprob(logprob: Tensor, x: Inputs) -> Tensor:
    """The formula, written plainly."""
    ratio, advantage = (logprob - x.old).exp(), x.advantages[x.sample]
    policy = torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    kl = (x.ref - logprob).exp() - (x.ref - logprob) - 1
    return (BETA * kl - policy).mean()


def eager(x: Inputs) -> Tensor:
    return from_logprob(logprob_of(x), x)


def trl(x: Inputs) -> Tensor:
    hidden, weight = x.source
    return from_logprob(trl_chunked(hidden, weight, x.targets)[0], x)


def ours(x: Inputs, *, impl: Impl, inplace: bool = False) -> Tensor:
    stream = TokenStream(x.targets, x.sample, old_logprob=x.old, ref_logprob=x.ref)
    if len(x.source) == 1:
        stream = replace(stream, logits=x.source[0])
    else:
        stream = replace(stream, hidden=x.source[0], weight=x.source[1])
    return grpo_loss([stream], x.advantages, beta=BETA, epsilon=EPSILON, impl=impl, inplace=inplace).loss


def liger_logits(x: Inputs, *, inplace: bool) -> Tensor:
    (logits,), (targets, old, ref) = x.source, x.per_sample()
    gpu_only(logits)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    settings = {"temperature": 1.0, "beta": BETA, "eps_low": EPSILON, "eps_high": EPSILON, "inplace": inplace}
    return triton_grpo_loss(logits, old, ref, targets, x.advantages, reduce=True, **settings)[0]


def liger_rows(x: Inputs) -> Inputs:
    """A copy of the logits as Liger wants them: one more row a sample, which takes no part."""
    (logits,) = x.source
    return x._replace(source=(F.pad(logits.view(SAMPLES, -1, logits.shape[-1]), (0, 0, 0, 1)),))


def without_liger_rows(run: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    def cut(x: Inputs) -> Outputs:
        loss, grad = run(x)
        return loss, None if grad is None else grad[:, :-1]

    return cut


def liger_head(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    (hidden, weight), (targets, old, ref) = x.source, x.per_sample()
    loss = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=EPSILON, epsilon_high=EPSILON)
    tokens = hidden.view(SAMPLES, -1, hidden.shape[-1])
    return loss(tokens, weight, targets, torch.ones_like(old), x.advantages, None, ref, old)[0]


def gradients(loss: Loss, frozen: bool = False) -> Callable[[Inputs], Outputs]:
    """The loss and the gradients of its source, of hidden alone where the head is frozen."""

    def run(x: Inputs) -> Outputs:
        leaves = [t.detach().requires_grad_() for t in (x.source[:1] if frozen else x.source)]
        trained = tuple(t.view_as(t) for t in leaves)  # what overwrites its logits refuses a leaf
        value = loss(x._replace(source=trained + x.source[len(trained) :]))
        return value, *torch.autograd.grad(value, trained)

    return run


def truth(x: Inputs, *, frozen: bool) -> Callable[[Outputs], float]:
    return expect(gradients(eager, frozen)(x._replace(source=tuple(t.double() for t in x.source))))


def logits_case(N: int, V: int, dtype: torch.dtype, device: str) -> Case:
    impl = kernel(device)
    liger = [without_liger_rows(gradients(partial(liger_logits, inplace=inplace))) for inplace in (False, True)]
    return Case(
        {"input": "logits", "N": N, "V": V, "dtype": short(dtype)},
        dtype,
        partial(inputs, N, V, None, dtype, device),
        partial(truth, frozen=False),
        {
            "ours": Provider(gradients(partial(ours, impl=impl)), f'impl="{impl}"'),
            "ours, in place": Provider(
                gradients(partial(ours, impl=impl, inplace=True)),
                IN_PLACE,
                lambda x: x._replace(source=(x.source[0].clone(),)),
            ),
            "eager": Provider(gradients(eager)),
            "torch.compile": Provider(gradients(compiled(eager))),
            "Liger": Provider(liger[False], "its Triton kernel", liger_rows),
            "Liger, in place": Provider(liger[True], notes("its Triton kernel", IN_PLACE), liger_rows),
        },
        bytes=2 * N * V * dtype.itemsize,
    )


def head_case(N: int, V: int, D: int, frozen: bool, device: str) -> Case:
    dtype, impl = HEAD_DTYPE[device], kernel(device)
    rounds, again = rounds_logits(dtype), "computes the logits twice"
    low = dtype != torch.float32
    return Case(
        {
            "input": "hidden",
            "head": "frozen head" if frozen else "trained head",
            "N": N,
            "V": V,
            "D": D,
            "dtype": short(dtype),
        },
        dtype,
        partial(inputs, N, V, D, dtype, device),
        partial(truth, frozen=frozen),
        {
            "ours": Provider(gradients(partial(ours, impl=impl), frozen), f'impl="{impl}"'),
            "eager": Provider(gradients(eager, frozen), rounds),
            "torch.compile": Provider(gradients(compiled(eager), frozen), rounds),
            "Liger": Provider(
                gradients(liger_head, frozen),
                notes("fused linear", rounds, again, "multiplies gradients in float32" if low else ""),
            ),
            "TRL chunked": Provider(gradients(trl, frozen), notes(rounds, again)),
        },
        flops=(4 if frozen else 6) * N * V * D,
    )


def cases(device: str, tiny: bool) -> list[Case]:
    """The head is frozen at the first width alone: the others differ in their number of FLOPs."""
    logits = [(16, 384)] if tiny else LOGITS_SHAPES[device]
    heads = [(16, 384, 32)] if tiny else HEAD_SHAPES[device]
    found = [logits_case(N, V, dtype, device) for N, V in logits for dtype in LOGITS_DTYPES[device]]
    found += [head_case(*shape, False, device) for shape in heads]
    return found + [head_case(*shape, True, device) for shape in heads if shape[2] == heads[0][2]]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
