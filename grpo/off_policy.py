"""Computes importance weights for tokens that were sampled off policy.

Sampling and training differ by the rounding of the engine, and by the updates since the rollout. Token t belongs to the
plan or the picture of sample s. Its log-prob is lp_t now, lpo_t at the first update on the rollout, and lps_t as
recorded in sampling. Its weight c_t multiplies the policy's term of the loss, but not the KL:

    d_t = lpo_t - lps_t; in the modes sequence_* it is Σ_t (lpo_t - lps_t) for all tokens of s
    c_t = min(exp(d_t), importance_sampling_clip_max)              token_truncate, sequence_truncate
    c_t = exp(d_t), or 0 if that is above …_clip_max               token_mask, sequence_mask
    c_t = 0 if A_s < 0 and mean_t(lps_t - lp_t) > off_policy_mask_threshold

These are TRL's `vllm_importance_sampling_mode` and `off_policy_mask_threshold` (DeepSeek-V3.2, arXiv 2512.02556).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grpo_loss import sample_sums
from ..kernels.token_stream import TokenStream
from .config import Config


@torch.no_grad()
def corrected(streams: list[TokenStream], advantages: Tensor, config: Config) -> list[TokenStream]:
    """Add c_t to the streams. This costs another pass of the heads, except in mode token_truncate, which is the loss's
    own."""
    mode, threshold = config.importance_sampling_mode, config.off_policy_mask_threshold
    if mode == "token_truncate" and threshold is None:
        return streams
    now = [stream.stats().logprob for stream in streams]
    sampled = [stream.sampling_logprob for stream in streams if stream.sampling_logprob is not None]
    old = [n if s.old_logprob is None else s.old_logprob for s, n in zip(streams, now, strict=True)]

    def sums(each: list[Tensor]) -> Tensor:
        """Sums [S] over the tokens of each sample in all streams."""
        size = len(advantages)
        return torch.stack([sample_sums(x, s.sample, size) for x, s in zip(each, streams, strict=True)]).sum(0)

    gaps = [before - then for before, then in zip(old, sampled, strict=True)]
    weights = [torch.ones_like(gap) for gap in gaps]
    if config.importance_sampling_correction:
        if mode.startswith("sequence"):
            whole = sums(gaps)
            gaps = [whole[stream.sample] for stream in streams]
        most = config.importance_sampling_clip_max
        ratios = [gap.exp() for gap in gaps]
        weights = [r.clamp(max=most) if mode.endswith("truncate") else r.where(r <= most, 0.0) for r in ratios]
    if threshold is not None:
        kl = sums([then - n for then, n in zip(sampled, now, strict=True)])
        kl = kl / sums([torch.ones_like(n) for n in now]).clamp(min=1)
        kept = (advantages >= 0) | (kl <= threshold)
        weights = [w * kept[stream.sample] for w, stream in zip(weights, streams, strict=True)]
    # the loss computes exp(lpo - sampling_logprob), which then is c_t
    triples = zip(streams, old, weights, strict=True)
    return [replace(stream, sampling_logprob=before - weight.log()) for stream, before, weight in triples]
