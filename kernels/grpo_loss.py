"""The GRPO loss over several token streams that share their advantages and one normaliser.

For token t of sample s with log-prob lp_t, old log-prob lpo_t and reference log-prob lpr_t:

    ratio_t  = exp(lp_t - lpo_t)                    (gspo: exp(mean over the sample's tokens), one for all of them)
    policy_t = min(min(ratio_t, delta)·A_s, clip(ratio_t, 1 - epsilon, 1 + epsilon_high)·A_s)
               (cispo: stop_gradient(min(ratio_t, epsilon_high))·A_s·lp_t)
    weight_t = min(exp(lpo_t - lps_t), importance_sampling_clip_max), lps the sampler's log-prob; 1 without it
    KL_t     = k1: lp - lpr      k2: (lp - lpr)²/2      k3: exp(lpr - lp) - (lpr - lp) - 1
    loss     = Σ_t n_t·(β·KL_t - weight_t·policy_t) - entropy_coef·mean_t(H_t)

    n_t = 1 / tokens of the step (dapo, cispo), 1 / tokens of this call (bnpo),
          1 / (tokens of s · samples) (grpo, gspo), 1 / (samples · max_completion_length) (dr_grpo)

Where lpo is absent it is lp.detach(): one update per rollout. Work with hidden states and a head: 6·N·V·D FLOP a
stream forward and backward (4 with a frozen head).

Source: GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), CISPO (2506.13585), GSPO (2507.18071), the
two-sided bound delta (2505.07291), and T2I-R1 (2505.00703) for the joint loss over text and image tokens. Options bear
the names of TRL's GRPOConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .group_advantages import group_advantages
from .linear_logprobs import linear_logprobs
from .token_logprobs import TokenStats, token_logprobs

LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class TokenStream:
    """N completion tokens of one kind (text or image), packed.

    Give either `logits` [N, V], or `hidden` [N, D] with `weight` [V, D] and perhaps `bias` [V].

    Args:
        targets: [N] int64, the sampled tokens.
        sample: [N] int64, the sample each token belongs to.
        ref_logprob: [N] under the reference model; needed where beta != 0.
        old_logprob: [N] under the policy that the ratio is taken against; None = the current one.
        sampling_logprob: [N] recorded while sampling; given, it turns on truncated importance weights.
        temperature: the sampling temperature.
        name: prefix of this stream's metrics.
    """

    targets: Tensor
    sample: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    ref_logprob: Tensor | None = None
    old_logprob: Tensor | None = None
    sampling_logprob: Tensor | None = None
    temperature: float = 1.0
    name: str = "tokens"

    def stats(self) -> TokenStats:
        """Log-prob and entropy of the targets, differentiable."""
        if self.logits is not None:
            return token_logprobs(self.logits, self.targets, temperature=self.temperature)
        assert self.hidden is not None and self.weight is not None
        return linear_logprobs(self.hidden, self.weight, self.targets, bias=self.bias, temperature=self.temperature)


class GRPOLoss(NamedTuple):
    """loss: scalar; metrics: device scalars, means over each stream's tokens (0 for none); logprobs: [N] a stream."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: tuple[Tensor, ...]


def kl_divergence(logprob: Tensor, ref_logprob: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) (Schulman's k1, k2, k3)."""
    delta = ref_logprob - logprob
    if estimator == "k1":
        return -delta
    if estimator == "k2":
        return delta.square() / 2
    return delta.exp() - delta - 1


def _mean(x: Tensor) -> Tensor:
    """Detached mean, 0 of nothing."""
    return x.detach().float().sum() / max(len(x), 1)


def grpo_loss_ref(
    streams: Sequence[TokenStream],
    advantages: Tensor,
    *,
    beta: float,
    loss_type: LossType,
    kl_estimator: KLEstimator,
    epsilon: float,
    epsilon_high: float,
    delta: float | None,
    entropy_coef: float,
    importance_sampling_clip_max: float,
    max_completion_length: int | None,
    num_tokens: Tensor,
    num_samples: Tensor,
) -> GRPOLoss:
    """The formula above in plain PyTorch."""
    stats = [stream.stats() for stream in streams]
    old = [s.logprob.detach() if t.old_logprob is None else t.old_logprob for t, s in zip(streams, stats, strict=True)]
    log_ratios = [s.logprob - o for s, o in zip(stats, old, strict=True)]
    counts = advantages.new_zeros(len(advantages))
    for stream in streams:
        counts = counts.index_add(0, stream.sample, advantages.new_ones(len(stream.sample)))
    if loss_type == "gspo":
        total = advantages.new_zeros(len(advantages))
        for stream, log_ratio in zip(streams, log_ratios, strict=True):
            total = total.index_add(0, stream.sample, log_ratio.to(total.dtype))
        log_ratios = [(total / counts.clamp(min=1))[stream.sample] for stream in streams]
    per_sample = {
        "grpo": 1 / (counts.clamp(min=1) * num_samples),
        "gspo": 1 / (counts.clamp(min=1) * num_samples),
        "dr_grpo": (1 / (num_samples * (max_completion_length or 1))).expand_as(counts),
        "bnpo": (1 / counts.sum().clamp(min=1)).expand_as(counts),
    }.get(loss_type, (1 / num_tokens.clamp(min=1)).expand_as(counts))

    loss = advantages.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for stream, stat, log_ratio, old_logprob in zip(streams, stats, log_ratios, old, strict=True):
        advantage = advantages[stream.sample]
        ratio = log_ratio.exp()
        if loss_type == "cispo":
            policy = ratio.clamp(max=epsilon_high).detach() * advantage * stat.logprob
        else:
            bounded = ratio if delta is None else ratio.clamp(max=delta)
            policy = torch.min(bounded * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage)
        if stream.sampling_logprob is not None:
            correction = (old_logprob - stream.sampling_logprob).exp()
            policy = policy * correction.clamp(max=importance_sampling_clip_max)
            metrics[f"{stream.name}/sampling_ratio"] = _mean(correction)
        token_loss = -policy
        if beta:
            assert stream.ref_logprob is not None
            kl = kl_divergence(stat.logprob, stream.ref_logprob, kl_estimator)
            token_loss = token_loss + beta * kl
            metrics[f"{stream.name}/kl"] = _mean(kl)
        loss = loss + (token_loss * per_sample[stream.sample]).sum()
        if entropy_coef:
            loss = loss - entropy_coef * stat.entropy.sum() / num_tokens.clamp(min=1)
        detached = ratio.detach()
        metrics[f"{stream.name}/entropy"] = _mean(stat.entropy)
        if loss_type == "cispo":
            metrics[f"{stream.name}/clip_ratio/high"] = _mean(detached > epsilon_high)
        else:
            metrics[f"{stream.name}/clip_ratio/low"] = _mean((detached < 1 - epsilon) & (advantage < 0))
            metrics[f"{stream.name}/clip_ratio/high"] = _mean((detached > 1 + epsilon_high) & (advantage > 0))
        metrics[f"{stream.name}/ratio_max"] = detached.amax() if len(detached) else advantages.new_ones(())
    return GRPOLoss(loss, metrics, tuple(stat.logprob.detach() for stat in stats))


def grpo_loss(
    streams: Sequence[TokenStream],
    rewards_or_advantages: Tensor,
    *,
    group_size: int | None = None,
    beta: float = 0.0,
    loss_type: LossType = "dapo",
    kl_estimator: KLEstimator = "k3",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    entropy_coef: float = 0.0,
    importance_sampling_clip_max: float = 3.0,
    max_completion_length: int | None = None,
    num_tokens: int | Tensor | None = None,
    num_samples: int | Tensor | None = None,
) -> GRPOLoss:
    """The GRPO loss of all streams together, ready for `.loss.backward()`.

    Args:
        streams: token streams (text, image, …) whose `sample` ids index the advantages.
        rewards_or_advantages: with `group_size`, rewards [S] or [S, R]; without, advantages [S].
        group_size: G, the samples of one prompt.
        beta: weight of the KL to the reference; 0 needs no reference log-probs.
        loss_type, kl_estimator: see the formulas at the top of this file.
        epsilon, epsilon_high: clip range; `epsilon_high` defaults to `epsilon` (cispo: the bound on the weight, and
            must be given).
        delta: second upper bound of the ratio, or None.
        entropy_coef: weight of the mean token entropy, which is maximised.
        importance_sampling_clip_max: bound on the truncated importance weights.
        max_completion_length: the constant of dr_grpo; needed there.
        num_tokens, num_samples: of the whole step, where this call is one micro-batch of it; default: of this call.
            A sample's tokens belong into one micro-batch.

    Raises:
        ValueError: names the option or the stream at fault.
    """
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type={loss_type!r} is unknown; use one of {', '.join(get_args(LossType))}")
    if kl_estimator not in get_args(KLEstimator):
        raise ValueError(f"kl_estimator={kl_estimator!r} is unknown; use one of {', '.join(get_args(KLEstimator))}")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' divides by max_completion_length: give it")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("loss_type='cispo' clips its weights at epsilon_high: give it (5.0 is recommended)")
    names = [stream.name for stream in streams]
    if len(set(names)) < len(names):
        raise ValueError(f"streams need names of their own, which tell their metrics apart; got {names}")
    advantages = rewards_or_advantages
    if group_size is not None:
        advantages = group_advantages(rewards_or_advantages, group_size)
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [S], got {tuple(advantages.shape)}; for rewards give group_size too")
    advantages = advantages.to(torch.promote_types(advantages.dtype, torch.float32))  # counts of tokens need float32
    for stream in streams:
        _check(stream, beta, len(advantages))
    tokens = sum(len(stream.targets) for stream in streams) if num_tokens is None else num_tokens
    samples = len(advantages) if num_samples is None else num_samples
    return grpo_loss_ref(
        streams,
        advantages,
        beta=beta,
        loss_type=loss_type,
        kl_estimator=kl_estimator,
        epsilon=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        delta=delta,
        entropy_coef=entropy_coef,
        importance_sampling_clip_max=importance_sampling_clip_max,
        max_completion_length=max_completion_length,
        num_tokens=torch.as_tensor(tokens, dtype=advantages.dtype, device=advantages.device),
        num_samples=torch.as_tensor(samples, dtype=advantages.dtype, device=advantages.device),
    )


def _check(stream: TokenStream, beta: float, num_samples: int) -> None:
    headless = stream.hidden is None and stream.weight is None and stream.bias is None
    if not headless if stream.logits is not None else stream.hidden is None or stream.weight is None:
        raise ValueError(f"stream {stream.name!r} needs either logits, or hidden and weight")
    if beta and stream.ref_logprob is None:
        raise ValueError(f"beta={beta} needs ref_logprob in stream {stream.name!r}")
    for field in ("sample", "ref_logprob", "old_logprob", "sampling_logprob"):
        value = getattr(stream, field)
        if value is not None and value.shape != stream.targets.shape:
            raise ValueError(
                f"stream {stream.name!r}: {field} is {tuple(value.shape)}, targets {tuple(stream.targets.shape)}"
            )
    outside = (stream.sample < 0) | (stream.sample >= num_samples)
    if stream.sample.is_cuda:
        torch._assert_async(outside.any().logical_not(), f"grpo_loss: sample must be in [0, {num_samples})")
    elif outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"stream {stream.name!r}: sample[{row}] = {int(stream.sample[row])}, but there are {num_samples} advantages"
        )
