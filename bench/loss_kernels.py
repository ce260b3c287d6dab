"""The cases of the kernels of a loss, for kernels.py: log-probs of logits and of hidden states, and GRPO's loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.grpo_loss import TokenStream, grpo_loss
from ..kernels.linear_logprobs import linear_logprobs
from ..kernels.token_logprobs import token_logprobs
from .harness import Case, Outputs, Provider, Unavailable, against_eager, gpu_only, kernel, normal, notes, short
from .harness import with_gradients as gradients

LOGITS = {"cpu": [(4096, 16384), (512, 102400)], "cuda": [(4608, 16384), (2048, 102400)]}  # N, V
LOGIT_DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
HEADS = {  # N, V, D
    "cpu": [(512, 16384, 512)],
    "cuda": [(4608, 16384, 4096), (2048, 102400, 4096), (4608, 16384, 2048), (2048, 102400, 2048)],
}
HEAD_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SAMPLES, BETA, EPSILON = 8, 0.01, 0.2
IN_PLACE = "overwrites the logits with their gradient"
PASSES = "forward", "forward + backward"


def source(N: int, V: int, D: int | None, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """(logits [N, V], targets [N]), or with D (hidden [N, D], weight [V, D], targets), whose logits are of size 1."""
    targets = torch.randint(V, (N,), generator=torch.Generator(device).manual_seed(0), device=device)
    if D is None:
        return normal((N, V), dtype, device, std=3), targets
    return normal((N, D), dtype, device), normal((V, D), dtype, device, seed=1, std=D**-0.5), targets


def log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def picked(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(-1, targets[:, None]).squeeze(-1)


def eager_stats(x: Any) -> Outputs:
    """Log-prob and entropy."""
    *of, targets = x
    logp = log_softmax(F.linear(*of) if len(of) == 2 else of[0])
    return picked(logp, targets), -(logp.exp() * logp).sum(-1)


def of_logits(device: str, tiny: bool) -> list[Case]:
    """Log-prob and entropy from logits, forward and forward + backward.

    Floor: the logits are read once forward; with backward they are read twice and their gradient is written once.
    The backward pass is that of Σ logprob + 0.01·Σ entropy.
    """
    impl, on_gpu = kernel(device), device == "cuda"

    def trl(x: Any) -> Outputs:
        if on_gpu:
            from trl import kernels  # the Triton kernel that trl.trainer calls, without what else trl.trainer imports

            return kernels.selective_log_softmax_and_entropy(*x)
        from trl.trainer import utils

        return utils.selective_log_softmax_and_entropy(*x)

    def case(N: int, V: int, dtype: torch.dtype, name: str) -> Case:
        backward = name != "forward"
        wrap: Any = partial(gradients, trained=1, weights=(1.0, 0.01)) if backward else torch.no_grad()
        ours = partial(token_logprobs, impl=impl)
        more = {"TRL": Provider(wrap(trl), "its Triton kernel" if on_gpu else "row by row, in the logits' dtype")}
        if backward:
            run = wrap(lambda x: ours(*x, inplace_backward=True))
            more["ours, in place"] = Provider(run, IN_PLACE, lambda x: (x[0].clone(), x[1]))
        return against_eager(
            {"pass": name, "N": N, "V": V, "dtype": short(dtype)},
            dtype,
            partial(source, N, V, None, dtype, device),
            lambda x: ours(*x),
            eager_stats,
            impl,
            wrap=wrap,
            more=more,
            bytes=(3 if backward else 1) * N * V * dtype.itemsize,
        )

    shapes = [(16, 384)] if tiny else LOGITS[device]
    return [case(*shape, dtype, name) for shape in shapes for dtype in LOGIT_DTYPES[device] for name in PASSES]


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    """As TRL's trainers call it, entropy included."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[:2]


def rounds_logits(dtype: torch.dtype) -> str:
    """The note on providers whose matrix product writes the logits in the dtype of the weights."""
    return "" if dtype == torch.float32 else f"rounds the logits to {short(dtype)} before the softmax"


def of_hidden(device: str, tiny: bool) -> list[Case]:
    """Log-prob and entropy from hidden states and a head, forward alone and with both gradients.

    Floor: 2·N·V·D FLOP forward and 4·N·V·D backward (6 together), at the rate of a large square product in the same
    dtype. The backward pass is that of Σ logprob, as in a policy loss without entropy bonus; that also lets peers take
    part which compute no entropy.
    """
    dtype, impl = HEAD_DTYPE[device], kernel(device)
    rounds = rounds_logits(dtype)

    def torch_chunked(x: Any) -> Outputs:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(*x, reduction="none", options=options), None

    def liger(x: Any) -> Outputs:
        gpu_only(x[0])
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return -liger_fused_linear_cross_entropy(*x, reduction="none"), None

    def case(N: int, V: int, D: int, name: str) -> Case:
        backward = name != "forward"
        wrap: Any = partial(gradients, trained=2, weights=(1.0,)) if backward else torch.no_grad()
        again = "computes the logits again in the backward pass" if backward else ""
        low = "" if dtype == torch.float32 else f"returns {short(dtype)}"
        return against_eager(
            {"pass": name, "N": N, "V": V, "D": D, "dtype": short(dtype)},
            dtype,
            partial(source, N, V, D, dtype, device),
            lambda x: linear_logprobs(*x, impl=impl),
            eager_stats,
            impl,
            notes=("", rounds),
            wrap=wrap,
            more={
                "TRL chunked": Provider(wrap(lambda x: trl_chunked(*x)), notes(rounds, again)),
                "F.linear_cross_entropy": Provider(wrap(torch_chunked), notes("chunked; no entropy", low, again)),
                "Liger": Provider(wrap(liger), notes("fused linear cross-entropy; no entropy", rounds, again)),
            },
            flops=(6 if backward else 2) * N * V * D,
        )

    shapes = [(16, 384, 32)] if tiny else HEADS[device]
    return [case(*shape, name) for shape in shapes for name in PASSES]


def terms(N: int, V: int, D: int | None, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """`source`, then old and reference log-probs and the sample of each token [N], and advantages [SAMPLES]."""
    *of, targets = source(N, V, D, dtype, device)
    logprob = picked(log_softmax(F.linear(*of) if D else of[0]), targets)
    noise = torch.rand((2, N), generator=torch.Generator(device).manual_seed(2), device=device)
    advantages = torch.linspace(-0.5, 1.5, SAMPLES, device=device)  # of a sum that does not cancel
    sample = torch.arange(N, device=device) // (N // SAMPLES)
    return *of, targets, *(logprob + 0.1 * noise - 0.05), sample, advantages


def from_logprob(logprob: Tensor, x: Any) -> Outputs:
    """The formula, written plainly."""
    old, ref, sample, advantages = x[-4:]
    ratio, advantage = (logprob - old).exp(), advantages[sample]
    policy = torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    kl = (ref - logprob).exp() - (ref - logprob) - 1
    return ((BETA * kl - policy).mean(),)


def eager_loss(x: Any) -> Outputs:
    *of, targets = x[:-4]
    return from_logprob(picked(log_softmax(F.linear(*of) if len(of) == 2 else of[0]), targets), x)


def our_loss(x: Any, *, impl: Any, inplace: bool = False) -> Outputs:
    *of, targets, old, ref, sample, advantages = x
    named = dict(zip(("hidden", "weight"), of, strict=True)) if len(of) == 2 else {"logits": of[0]}
    stream = TokenStream(targets, sample, old_logprob=old, ref_logprob=ref, **named)
    return (grpo_loss([stream], advantages, beta=BETA, epsilon=EPSILON, impl=impl, inplace=inplace).loss,)


def liger_loss(x: Any, *, inplace: bool) -> Outputs:
    logits, *columns, _, advantages = x
    gpu_only(logits)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    targets, old, ref = (column.view(SAMPLES, -1) for column in columns)
    settings = {"temperature": 1.0, "beta": BETA, "eps_low": EPSILON, "eps_high": EPSILON, "inplace": inplace}
    return triton_grpo_loss(logits, old, ref, targets, advantages, reduce=True, **settings)[:1]


def liger_rows(x: Any) -> Any:
    """A copy of the logits as Liger wants them: one more row a sample, which takes no part."""
    return F.pad(x[0].view(SAMPLES, -1, x[0].shape[-1]), (0, 0, 0, 1)), *x[1:]


def without_liger_rows(run: Callable[[Any], Outputs]) -> Callable[[Any], Outputs]:
    def cut(x: Any) -> Outputs:
        value, gradient = run(x)
        assert gradient is not None
        return value, gradient[:, :-1]

    return cut


def liger_head(x: Any) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight, *columns, _, advantages = x
    targets, old, ref = (column.view(SAMPLES, -1) for column in columns)
    fused = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=EPSILON, epsilon_high=EPSILON)
    tokens = hidden.view(SAMPLES, -1, hidden.shape[-1])
    return (fused(tokens, weight, targets, torch.ones_like(old), advantages, None, ref, old)[0],)


def loss(device: str, tiny: bool) -> list[Case]:
    """The loss and its gradients, from logits and from hidden states and a head.

    8 samples of equal length, loss_type="dapo", beta 0.01, old and reference log-probs given. Ratios stay inside the
    clip range, so that the rounding of a logit cannot flip a clip and no row is without gradient. Floor: from logits,
    they are read once and their gradient is written once; from hidden states, 6·N·V·D FLOP, 4 with a frozen head. Ours
    reports entropies too, which no other provider is asked for.
    """
    impl, dtype = kernel(device), HEAD_DTYPE[device]
    rounds, again = rounds_logits(dtype), "computes the logits twice"
    ours = partial(our_loss, impl=impl)

    def from_logits(N: int, V: int, dtype: torch.dtype) -> Case:
        wrap: Any = partial(gradients, trained=1, weights=(1.0,))
        liger = [without_liger_rows(wrap(partial(liger_loss, inplace=inplace))) for inplace in (False, True)]
        fresh = lambda x: (x[0].clone(), *x[1:])  # noqa: E731
        return against_eager(
            {"input": "logits", "N": N, "V": V, "dtype": short(dtype)},
            dtype,
            partial(terms, N, V, None, dtype, device),
            ours,
            eager_loss,
            impl,
            wrap=wrap,
            more={
                "ours, in place": Provider(wrap(partial(ours, inplace=True)), IN_PLACE, fresh),
                "Liger": Provider(liger[0], "its Triton kernel", liger_rows),
                "Liger, in place": Provider(liger[1], notes("its Triton kernel", IN_PLACE), liger_rows),
            },
            bytes=2 * N * V * dtype.itemsize,
        )

    def from_hidden(N: int, V: int, D: int, frozen: bool) -> Case:
        wrap: Any = partial(gradients, trained=1 if frozen else 2, weights=(1.0,))
        products = "multiplies gradients in float32" if dtype != torch.float32 else ""
        labels = {"input": "hidden", "head": "frozen head" if frozen else "trained head"}
        trl = wrap(lambda x: from_logprob(trl_chunked(*x[:3])[0], x))  # type: ignore[arg-type]
        return against_eager(
            labels | {"N": N, "V": V, "D": D, "dtype": short(dtype)},
            dtype,
            partial(terms, N, V, D, dtype, device),
            ours,
            eager_loss,
            impl,
            notes=("", rounds),
            wrap=wrap,
            more={
                "Liger": Provider(wrap(liger_head), notes("fused linear", rounds, again, products)),
                "TRL chunked": Provider(trl, notes(rounds, again)),
            },
            flops=(4 if frozen else 6) * N * V * D,
        )

    logits, heads = ([(16, 384)], [(16, 384, 32)]) if tiny else (LOGITS[device], HEADS[device])
    found = [from_logits(*shape, dtype) for shape in logits for dtype in LOGIT_DTYPES[device]]
    found += [from_hidden(*shape, False) for shape in heads]
    return found + [from_hidden(*shape, True) for shape in heads if shape[2] == heads[0][2]]  # others differ in FLOPs
