"""The cases of the kernels of a loss, for kernels.py: log-probs of logits and of hidden states, and GRPO's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.grpo_loss import TokenStream, grpo_loss
from ..kernels.linear_logprobs import linear_logprobs
from ..kernels.token_logprobs import token_logprobs
from .harness import Case, Outputs, Provider, Unavailable, against_eager, gpu_only, kernel, normal

LOGITS = {"cpu": [(4096, 16384), (512, 102400)], "cuda": [(4608, 16384), (2048, 102400)]}  # N, V
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}  # of a head the first
HEADS = {  # N, V, D
    "cpu": [(512, 16384, 512)],
    "cuda": [(4608, 16384, 4096), (2048, 102400, 4096), (4608, 16384, 2048), (2048, 102400, 2048)],
}
SAMPLES, BETA, EPSILON = 8, 0.01, 0.2
IN_PLACE = "overwrites the logits with their gradient"
ROUNDS = "rounds the logits to the dtype of the weights before the softmax"
AGAIN = "computes the logits again for the backward pass"


def source(N: int, V: int, D: int | None, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """(logits [N, V], targets [N]), or with D (hidden [N, D], weight [V, D], targets), whose logits are of size 1."""
    targets = torch.randint(V, (N,), generator=torch.Generator(device).manual_seed(0), device=device)
    if D is None:
        return normal((N, V), dtype, device, std=3), targets
    return normal((N, D), dtype, device), normal((V, D), dtype, device, seed=1, std=D**-0.5), targets


def copied(x: Any) -> Any:
    """Copy the logits, for a provider that overwrites them."""
    return x[0].clone(), *x[1:]


def log_softmax(of: Any) -> Tensor:
    """Log-softmax of (logits,) or (hidden, weight), in float32 at least."""
    logits = F.linear(*of) if len(of) == 2 else of[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def picked(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(-1, targets[:, None]).squeeze(-1)


def eager_stats(x: Any) -> Outputs:
    """Log-prob and entropy."""
    *of, targets = x
    logp = log_softmax(of)
    return picked(logp, targets), -(logp.exp() * logp).sum(-1)


def case_of(
    labels: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Callable[..., Any],
    *providers: Any,
    trained: int,
    weights: Sequence[float] = (1.0,),
    passes: int = 0,
) -> Case:
    """The case of logits [N, V], whose floor is `passes` over them, or of a head [N, V, D] with its FLOPs."""
    (N, V), D = shape[:2], shape[2] if len(shape) == 3 else None
    flops, bytes = 2 * (1 + trained) * N * V * (D or 0), passes * N * V * dtype.itemsize
    labels, given = {**labels, **dict(zip("NVD", shape, strict=False))}, partial(inputs, N, V, D, dtype)
    return against_eager(labels, dtype, given, *providers, trained=trained, weights=weights, bytes=bytes, flops=flops)


def of_logits(device: str, tiny: bool) -> list[Case]:
    """Log-prob and entropy from logits, forward and forward + backward.

    Floor: the logits are read once forward; with backward they are read twice and their gradient is written once.
    The backward pass is that of Σ logprob + 0.01·Σ entropy.
    """
    impl, on_gpu = kernel(device), device == "cuda"
    inputs, both = partial(source, device=device), partial(token_logprobs, impl=impl, inplace_backward=True)

    def trl(x: Any) -> Outputs:
        if on_gpu:
            from trl import kernels  # the Triton kernel that trl.trainer calls, without what else trl.trainer imports

            return kernels.selective_log_softmax_and_entropy(*x)
        from trl.trainer import utils

        return utils.selective_log_softmax_and_entropy(*x)

    ours, eager = Provider(lambda x: token_logprobs(*x, impl=impl)), Provider(eager_stats)
    forward = {"TRL": Provider(trl, "its Triton kernel" if on_gpu else "row by row, in the logits' dtype")}
    backward = forward | {"ours, in place": Provider(lambda x: both(*x), IN_PLACE, copied)}
    found = []
    for shape in [(16, 384)] if tiny else LOGITS[device]:
        for dtype in DTYPES[device]:
            for name, more, trained, passes in (("forward", forward, 0, 1), ("forward + backward", backward, 1, 3)):
                given = (shape, dtype, inputs, ours, eager, more)
                found.append(case_of({"pass": name}, *given, trained=trained, weights=(1.0, 0.01), passes=passes))
    return found


def trl_chunked(x: Any) -> Outputs:
    """TRL's kernel as TRL's trainers call it, with the entropy."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    hidden, weight, targets, *_ = x
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[:2]


def of_hidden(device: str, tiny: bool) -> list[Case]:
    """Log-prob and entropy from hidden states and a head, forward alone and with both gradients.

    Floor: 2·N·V·D FLOP forward and 4·N·V·D backward (6 together), at the rate of a large square product in the same
    dtype. The backward pass is that of Σ logprob, as in a policy loss without entropy bonus; so peers that compute no
    entropy can take part.
    """

    def torch_chunked(x: Any) -> Outputs:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(*x, reduction="none", options=options), None

    def liger(x: Any) -> Outputs:
        gpu_only(x[0])
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return -liger_fused_linear_cross_entropy(*x, reduction="none"), None

    peers = {
        "TRL chunked": Provider(trl_chunked, f"{ROUNDS}; {AGAIN}"),
        "F.linear_cross_entropy": Provider(torch_chunked, f"chunked; no entropy; {AGAIN}"),
        "Liger": Provider(liger, f"fused linear cross-entropy; no entropy; {ROUNDS}; {AGAIN}"),
    }
    ours, eager = Provider(lambda x: linear_logprobs(*x, impl=kernel(device))), Provider(eager_stats, ROUNDS)
    given = (partial(source, device=device), ours, eager, peers)
    return [
        case_of({"pass": name}, shape, DTYPES[device][0], *given, trained=trained)
        for shape in ([(16, 384, 32)] if tiny else HEADS[device])
        for name, trained in (("forward", 0), ("forward + backward", 2))
    ]


def terms(N: int, V: int, D: int | None, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Add to `source` old and reference log-probs and the sample of each token [N], and advantages [SAMPLES]."""
    *of, targets = source(N, V, D, dtype, device)
    logprob = picked(log_softmax(of), targets)
    noise = torch.rand((2, N), generator=torch.Generator(device).manual_seed(2), device=device)
    advantages = torch.linspace(-0.5, 1.5, SAMPLES, device=device)  # their sum is not 0
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
    return from_logprob(picked(log_softmax(of), targets), x)


def our_loss(x: Any, *, impl: Any, inplace: bool = False) -> Outputs:
    *of, targets, old, ref, sample, advantages = x
    named = dict(zip(("hidden", "weight"), of, strict=True)) if len(of) == 2 else {"logits": of[0]}
    stream = TokenStream(targets, sample, old_logprob=old, ref_logprob=ref, **named)
    return (grpo_loss([stream], advantages, beta=BETA, epsilon=EPSILON, impl=impl, inplace=inplace).loss,)


def by_sample(x: Any) -> tuple[Tensor, ...]:
    """Targets, old and reference log-probs [SAMPLES, N / SAMPLES]."""
    targets, old, ref = (column.view(SAMPLES, -1) for column in x[-5:-2])
    return targets, old, ref


def liger_loss(x: Any) -> Outputs:
    gpu_only(x[0])
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    targets, old, ref = by_sample(x)
    settings = {"temperature": 1.0, "beta": BETA, "eps_low": EPSILON, "eps_high": EPSILON, "inplace": True}
    return triton_grpo_loss(x[0], old, ref, targets, x[-1], reduce=True, **settings)[:1]


def liger_rows(x: Any) -> Any:
    """Copy the logits and add a row to each sample, which Liger wants and does not use."""
    return F.pad(x[0].view(SAMPLES, -1, x[0].shape[-1]), (0, 0, 0, 1)), *x[1:]


def liger_value(x: Any) -> Outputs:
    """The loss without the gradient, which has more rows than that of the others."""
    return *liger_loss(x), None


def liger_head(x: Any) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    targets, old, ref = by_sample(x)
    fused = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=EPSILON, epsilon_high=EPSILON)
    tokens = x[0].view(SAMPLES, -1, x[0].shape[-1])
    return (fused(tokens, x[1], targets, torch.ones_like(old), x[-1], None, ref, old)[0],)


def trl_loss(x: Any) -> Outputs:
    logprob, _ = trl_chunked(x)
    assert logprob is not None
    return from_logprob(logprob, x)


def loss(device: str, tiny: bool) -> list[Case]:
    """The loss and its gradients, from logits and from hidden states and a head.

    8 samples of equal length, loss_type="dapo", beta 0.01, old and reference log-probs given. Ratios stay inside the
    clip range, so rounding cannot change what is clipped, and every row has a gradient. Floor: from logits, they are
    read once and their gradient is written once; from hidden states, 6·N·V·D FLOP, 4 with a frozen head. Only ours
    reports entropies too.
    """
    inputs, ours = partial(terms, device=device), partial(our_loss, impl=kernel(device))
    from_logits = {
        "ours, in place": Provider(partial(ours, inplace=True), IN_PLACE, copied),
        "Liger": Provider(
            liger_loss, f"its Triton kernel; {IN_PLACE}; only its loss is checked", liger_rows, liger_value
        ),
    }
    from_hidden = {
        "Liger": Provider(liger_head, f"fused linear; {ROUNDS}; {AGAIN}; multiplies gradients in float32"),
        "TRL chunked": Provider(trl_loss, f"{ROUNDS}; {AGAIN}"),
    }
    logits, heads = ([(16, 384)], [(16, 384, 32)]) if tiny else (LOGITS[device], HEADS[device])
    found = []
    for shape in logits:
        for dtype in DTYPES[device]:
            given = (shape, dtype, inputs, Provider(ours), Provider(eager_loss), from_logits)
            found.append(case_of({"input": "logits"}, *given, trained=1, passes=2))
    for head, trained, shapes in (("trained head", 2, heads), ("frozen head", 1, heads[:2])):
        labels, eager = {"input": "hidden", "head": head}, Provider(eager_loss, ROUNDS)
        same = (DTYPES[device][0], inputs, Provider(ours), eager, from_hidden)
        found += [case_of(labels, shape, *same, trained=trained) for shape in shapes]
    return found
