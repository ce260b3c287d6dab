"""The GRPO loss over several token streams with common advantages and one normaliser.

For token t of sample s with log-prob lp_t, old log-prob lpo_t and reference log-prob lpr_t:

    ratio_t  = exp(lp_t - lpo_t)
               (importance_sampling_level sequence: exp(mean of lp - lpo over the sample's tokens), the same for all
               of them; gspo is grpo with these ratios)
    policy_t = min(min(ratio_t, delta)·A_s, clip(ratio_t, 1 - epsilon, 1 + epsilon_high)·A_s)
               (cispo: stop_gradient(min(ratio_t, epsilon_high))·A_s·lp_t)
    weight_t = min(exp(lpo_t - lps_t), importance_sampling_clip_max), lps the sampler's log-prob; 1 without it
    KL_t     = k1: lp - lpr      k2: (lp - lpr)²/2      k3: exp(lpr - lp) - (lpr - lp) - 1
               (use_bias_correction_kl: times ratio_t, so that it estimates the policy's KL off policy too)
    loss     = Σ_t w_t·[n_t·(β·KL_t - weight_t·policy_t) - entropy_coef·H_t / tokens of the step]

    w_t = the token's own weight (`token_weight`), 1 without it; n_t and the metrics do not depend on it
    n_t = 1 / tokens of the step (dapo, cispo), 1 / tokens of this call (bnpo),
          1 / (tokens of s · samples) (grpo), 1 / (samples · max_completion_length) (dr_grpo)

Without an old log-prob lpo = lp.detach(), as in one update per rollout. A stream may have its own β, epsilon,
epsilon_high and entropy_coef.

The gradient of a token depends only on its logits and on numbers of its sample, so one pass computes loss and gradient
(kernels/fused_grpo.py). Floor from hidden states and a head: 6·N·V·D FLOP (4·N·V·D with a frozen head); from logits:
they are read and written once. Two cases compute the logits twice, 8·N·V·D: ratios of sequences, which need all tokens
of a sample first, and gradients in float16, which the backward pass computes, because GradScaler's factor must be
applied before they are rounded.

Source: GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), CISPO (2506.13585), GSPO (2507.18071), the
two-sided bound delta (2505.07291), and T2I-R1 (2505.00703) for the joint loss over text and image tokens. Options have
the names of TRL's GRPOConfig.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Impl, choose, wants_gradient
from .fused_grpo import RESULTS, Terms, attach_gradients, grpo_linear, grpo_logits, grpo_logits_
from .group_advantages import group_advantages
from .token_stream import KLEstimator, Level, LossOptions, LossType, TokenStream, check_streams, check_tokens


class GRPOLoss(NamedTuple):
    """loss: scalar; metrics: device scalars, means over each stream's tokens (0 for none); logprobs: [N] a stream.

    The gradients are computed with the loss, and the backward pass scales them in place: a second one is an error.
    """

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
    """Detached mean; 0 without elements."""
    return x.detach().float().sum() / max(len(x), 1)


def grpo_loss_ref(
    streams: Sequence[TokenStream],
    advantages: Tensor,
    options: LossOptions,
    num_tokens: Tensor,
    num_samples: Tensor,
    impl: Impl = "torch",
) -> GRPOLoss:
    """The formula above in plain PyTorch, from log-probs and entropies that `impl` computes."""
    stats = [stream.stats(impl) for stream in streams]
    each = zip(streams, stats, strict=True)
    old = [(stat.logprob if t.old_logprob is None else t.old_logprob).detach() for t, stat in each]
    log_ratios = [s.logprob - o for s, o in zip(stats, old, strict=True)]
    if options.sequence_ratios:
        total = sum(sample_sums(r, t.sample, len(advantages)) for r, t in zip(log_ratios, streams, strict=True))
        mean = total / _token_counts(streams, advantages).clamp(min=1)
        log_ratios = [mean[stream.sample] for stream in streams]
    norm = token_norm(streams, advantages, options, num_tokens, num_samples)

    loss = advantages.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for stream, stat, log_ratio, old_logprob in zip(streams, stats, log_ratios, old, strict=True):
        own, advantage = options.of(stream), advantages[stream.sample]
        weight, (logprob, entropy) = stream.token_weight, stat
        if weight is not None:
            weight = weight.detach().to(advantage)
            # 0 * inf is NaN, in the backward pass too: a token of weight 0 is left out
            logprob, entropy = (torch.where(weight == 0, x.detach(), x) for x in stat)
            log_ratio = log_ratio if options.sequence_ratios else logprob - old_logprob
        ratio = log_ratio.exp()
        token_loss, also = _policy_and_kl(stream, own, logprob, old_logprob, ratio, advantage)
        token_loss = token_loss * norm[stream.sample]
        if own.entropy_coef:
            token_loss = token_loss - own.entropy_coef * entropy / num_tokens.clamp(min=1)
        if weight is not None:
            token_loss = torch.where(weight == 0, 0.0, weight * token_loss)
        loss = loss + token_loss.sum()
        also["entropy"] = _mean(stat.entropy)
        metrics |= {f"{stream.name}/{name}": value for name, value in also.items()}
    return GRPOLoss(loss, metrics, tuple(stat.logprob.detach() for stat in stats))


def _policy_and_kl(
    stream: TokenStream, own: LossOptions, logprob: Tensor, old: Tensor, ratio: Tensor, advantage: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """beta·KL - weight·policy of each token, and the metrics of both."""
    metrics: dict[str, Tensor] = {}
    if own.cispo:
        policy = ratio.clamp(max=own.high).detach() * advantage * logprob
    else:
        bounded = ratio if own.delta is None else ratio.clamp(max=own.delta)
        policy = torch.min(bounded * advantage, ratio.clamp(own.low, own.high) * advantage)
        metrics["clip_ratio/low"] = _mean((ratio < own.low) & (advantage < 0))
    if stream.sampling_logprob is not None:
        correction = (old - stream.sampling_logprob.detach()).exp()
        policy = policy * correction.clamp(max=own.importance_sampling_clip_max)
        metrics["sampling_ratio"] = _mean(correction)
    loss = -policy
    if own.beta:
        assert stream.ref_logprob is not None
        kl = kl_divergence(logprob, stream.ref_logprob.detach(), own.kl_estimator)
        kl = kl * ratio if own.use_bias_correction_kl else kl
        loss = loss + own.beta * kl
        metrics["kl"] = _mean(kl)
    metrics["clip_ratio/high"] = _mean((ratio > own.high) & (advantage > 0))
    metrics["ratio_max"] = ratio.detach().amax() if len(ratio) else advantage.new_ones(())
    return loss, metrics


def _token_counts(streams: Sequence[TokenStream], advantages: Tensor) -> Tensor:
    """[S] number of tokens of each sample in all streams. Sums of ones are exact in any order."""
    counts = advantages.new_zeros(len(advantages))
    for stream in streams:
        counts = counts.index_add(0, stream.sample, advantages.new_ones(len(stream.sample)))
    return counts


def sample_sums(x: Tensor, sample: Tensor, num_samples: int) -> Tensor:
    """[S] sums of x [N] over each sample's tokens, always in the same order, unlike `index_add` on a GPU."""
    own = sample == torch.arange(num_samples, device=sample.device)[:, None]
    return x.where(own, 0.0).sum(1)


def token_norm(
    streams: Sequence[TokenStream], advantages: Tensor, options: LossOptions, num_tokens: Tensor, num_samples: Tensor
) -> Tensor:
    """[S] the normaliser n_t of each sample's tokens."""
    if options.loss_type in ("grpo", "gspo"):
        return 1 / (_token_counts(streams, advantages).clamp(min=1) * num_samples)
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length
        return (1 / (num_samples * options.max_completion_length)).expand_as(advantages)
    if options.loss_type == "bnpo":
        num_tokens = _scalar(sum(len(stream.targets) for stream in streams), num_tokens)
    return (1 / num_tokens.clamp(min=1)).expand_as(advantages)


def _fused_loss(
    streams: Sequence[TokenStream],
    advantages: Tensor,
    options: LossOptions,
    num_tokens: Tensor,
    num_samples: Tensor,
    inplace: bool,
    impl: str,
) -> GRPOLoss:
    """Loss, gradients and metrics from one pass over the logits of each stream."""
    advantages = advantages.contiguous()
    norm = token_norm(streams, advantages, options, num_tokens, num_samples).contiguous()
    losses, logprobs = [], []
    metrics: dict[str, Tensor] = {}
    for stream in streams:
        terms = _terms(stream, options.of(stream), advantages, norm, num_tokens)
        given = (stream.hidden, stream.weight, stream.bias) if stream.logits is None else (stream.logits,)
        needed = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in given]
        inputs = [None if t is None else t.detach() for t in given]
        if stream.logits is None:
            results, *gradients = grpo_linear(*inputs, needed, impl, *terms.arguments())
        elif inplace and needed[0]:
            results, gradients = grpo_logits_(*inputs, impl, *terms.arguments()), inputs
        else:
            results, *gradients = grpo_logits(*inputs, needed[0], impl, *terms.arguments())
        loss = results[0].sum()
        if any(needed):
            leaves, known = ([x for x, need in zip(xs, needed, strict=True) if need] for xs in (given, gradients))
            loss = attach_gradients(loss, leaves, known, impl)
        losses.append(loss)
        metrics |= _stream_metrics(stream, results, terms)
        logprobs.append(results[1])
    return GRPOLoss(torch.stack(losses).sum(), metrics, tuple(logprobs))


def _terms(stream: TokenStream, own: LossOptions, advantages: Tensor, norm: Tensor, num_tokens: Tensor) -> Terms:
    """The arguments of the fused pass for a stream and its options."""
    return Terms(
        targets=stream.targets.contiguous(),
        sample=stream.sample.contiguous(),
        advantages=advantages,
        norm=norm,
        entropy_weight=own.entropy_coef / num_tokens.clamp(min=1),
        old=_float32(stream.old_logprob),
        ref=_float32(stream.ref_logprob),
        sampling=_float32(stream.sampling_logprob),
        token_weight=_float32(stream.token_weight),
        temperature=float(stream.temperature),
        beta=float(own.beta),
        low=own.low,
        high=own.high,
        delta=math.inf if own.delta is None else float(own.delta),
        clip_max=float(own.importance_sampling_clip_max),
        cispo=own.cispo,
        kl=int(own.kl_estimator[1]) if own.beta else 0,
        correct_kl=own.use_bias_correction_kl,
    )


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _stream_metrics(stream: TokenStream, results: Tensor, terms: Terms) -> dict[str, Tensor]:
    """The metrics of `grpo_loss_ref`, from the results of the fused pass."""
    N = results.shape[1]
    mean = dict(zip(RESULTS, (results.sum(1) / max(N, 1)).unbind(), strict=True))
    named = {"entropy": mean["entropy"], "clip_ratio/high": mean["clipped_high"]}
    if terms.kl:
        named["kl"] = mean["kl"]
    if not terms.cispo:
        named["clip_ratio/low"] = mean["clipped_low"]
    if stream.sampling_logprob is not None:
        named["sampling_ratio"] = mean["correction"]
    named["ratio_max"] = results[RESULTS.index("ratio")].amax() if N else results.new_ones(())
    return {f"{stream.name}/{name}": value for name, value in named.items()}


def grpo_loss(
    streams: Sequence[TokenStream],
    rewards_or_advantages: Tensor,
    *,
    group_size: int | None = None,
    beta: float = 0.0,
    loss_type: LossType = "dapo",
    importance_sampling_level: Level = "token",
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = False,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    entropy_coef: float = 0.0,
    importance_sampling_clip_max: float = 3.0,
    max_completion_length: int | None = None,
    num_tokens: int | Tensor | None = None,
    num_samples: int | Tensor | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> GRPOLoss:
    """The GRPO loss of all streams together, ready for `.loss.backward()`.

    Args:
        streams: token streams (text, image, …). Their `sample` ids index the advantages. A stream may have token
            weights and its own coefficients.
        rewards_or_advantages: with `group_size`, rewards [S] or [S, R]; without, advantages [S].
        group_size: G, the samples of one prompt.
        beta: weight of the KL to the reference; 0 needs no reference log-probs.
        loss_type, importance_sampling_level, kl_estimator, use_bias_correction_kl: see the formulas at the top of this
            file. TRL's default of the last is True; T2I-R1 has the plain k3.
        epsilon, epsilon_high: clip range; `epsilon_high` defaults to `epsilon`. cispo needs `epsilon_high`, the bound
            on its weights.
        delta: second upper bound of the ratio, or None.
        entropy_coef: weight of the mean token entropy, which is maximised.
        importance_sampling_clip_max: bound on the truncated importance weights.
        max_completion_length: the constant of dr_grpo, which needs it.
        num_tokens, num_samples: numbers of the whole step, if this call is one micro-batch of it; default: of this
            call. All tokens of a sample belong to one micro-batch.
        inplace: the gradient overwrites the `logits` that a stream gives. Neither the caller nor autograd may need them
            any more (a linear head does not). Ratios of sequences, float16 and PyTorch ignore this option.
        impl: "triton" (CUDA), "native" (C++ on the CPU, float32 or bfloat16), "torch", or "auto", the first that can
            run, chosen by the first stream. All streams have one device and dtype.

    Raises:
        ValueError: names the option or the stream at fault. On CUDA a target or sample out of range fails an assertion
            on the device instead, for which the host does not wait.
        RuntimeError: `impl="native"` and the C++ library is missing.
    """
    options = LossOptions(
        beta=beta,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        entropy_coef=entropy_coef,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=use_bias_correction_kl,
        delta=delta,
        importance_sampling_clip_max=importance_sampling_clip_max,
        max_completion_length=max_completion_length,
    )
    betas = [options.of(stream).beta for stream in streams]
    features = check_streams(streams, inplace)
    chosen = choose(impl, features.device, features.dtype)
    advantages = _advantages(rewards_or_advantages, group_size, features, chosen)
    for stream, own_beta in zip(streams, betas, strict=True):
        check_tokens(stream, own_beta, len(advantages))
    tokens = sum(len(stream.targets) for stream in streams) if num_tokens is None else num_tokens
    samples = len(advantages) if num_samples is None else num_samples
    shared = (advantages, options, _scalar(tokens, advantages), _scalar(samples, advantages))
    if chosen == "torch" or options.sequence_ratios or _needs_loss_scale(streams):
        return grpo_loss_ref(streams, *shared, impl)
    return _fused_loss(streams, *shared, inplace, chosen)


def _advantages(given: Tensor, group_size: int | None, features: Tensor, chosen: str) -> Tensor:
    """[S] the advantages, computed from rewards if there is a group_size; float32, or float64 in PyTorch."""
    if group_size is not None:
        given = group_advantages(given, group_size)
    if given.ndim != 1:
        raise ValueError(f"advantages must be [S], got {tuple(given.shape)}; for rewards give group_size too")
    if given.device != features.device:
        raise ValueError(f"advantages are on {given.device}, the streams on {features.device}")
    # float32 at least, for exact counts of tokens; the kernels take no float64
    wide = torch.promote_types(given.dtype, torch.float32) if chosen == "torch" else torch.float32
    return given.detach().to(wide)


def _needs_loss_scale(streams: Sequence[TokenStream]) -> bool:
    """Whether gradients are in float16: they would underflow if they were rounded before GradScaler scales them."""
    inputs = [t for stream in streams for t in (stream.features, stream.weight, stream.bias) if t is not None]
    return inputs[0].dtype == torch.float16 and wants_gradient(*inputs)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim tensor like `like`. A number is filled in on the device, because a copy would make the host wait."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
