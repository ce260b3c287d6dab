"""The arguments of grpo_loss: streams of tokens, and options, some of which a stream may set for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .dispatch import Impl
from .linear_logprobs import check_head, linear_logprobs
from .token_logprobs import TokenStats, check_logits, check_overwritable, token_logprobs

LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo"]
KLEstimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class TokenStream:
    """N completion tokens, packed: all text tokens, or all image tokens.

    Give either `logits` [N, V], or `hidden` [N, D] with `weight` [V, D] and, if there is one, `bias` [V].

    Args:
        targets: [N] int64, the sampled tokens.
        sample: [N] int64, the sample each token belongs to.
        ref_logprob: [N] under the reference model; needed if beta is not 0.
        old_logprob: [N] under the policy in the denominator of the ratio; None = the current policy.
        sampling_logprob: [N] recorded while sampling; None = no truncated importance weights.
        token_weight: [N] factor of each token's whole term of the loss (policy, KL and entropy bonus); None = 1. It
            gets no gradient and does not change the normaliser: a weight of 0 takes a token out of the sum, not out of
            the count. Loss and gradient of such a token are exactly 0, even if its terms are not finite, except with
            ratios of sequences, to which all tokens of a sample contribute.
        beta, epsilon, epsilon_high, entropy_coef: of this stream; None = as in the call.
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
    token_weight: Tensor | None = None
    beta: float | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    entropy_coef: float | None = None
    temperature: float = 1.0
    name: str = "tokens"

    def stats(self, impl: Impl = "auto") -> TokenStats:
        """Log-prob and entropy of the targets, differentiable."""
        options: dict[str, Any] = {"temperature": self.temperature, "impl": impl}
        if self.logits is not None:
            return token_logprobs(self.logits, self.targets, **options)
        assert self.hidden is not None and self.weight is not None
        return linear_logprobs(self.hidden, self.weight, self.targets, bias=self.bias, **options)

    @property
    def features(self) -> Tensor:
        """The logits, or the hidden states, from which the log-probs are computed."""
        features = self.hidden if self.logits is None else self.logits
        assert features is not None
        return features


@dataclass(frozen=True, slots=True)
class LossOptions:
    """The options of one call, see `grpo_loss`. A stream may have its own values of the first four.

    Raises:
        ValueError: an option has an unknown value, or loss_type needs an option that is missing.
    """

    beta: float
    epsilon: float
    epsilon_high: float | None
    entropy_coef: float
    loss_type: LossType
    importance_sampling_level: Level
    kl_estimator: KLEstimator
    use_bias_correction_kl: bool
    delta: float | None
    importance_sampling_clip_max: float
    max_completion_length: int | None

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; use one of {', '.join(get_args(LossType))}")
        if self.importance_sampling_level not in get_args(Level):
            level = self.importance_sampling_level
            raise ValueError(f"importance_sampling_level={level!r} is unknown; use token or sequence")
        if self.kl_estimator not in get_args(KLEstimator):
            known = ", ".join(get_args(KLEstimator))
            raise ValueError(f"kl_estimator={self.kl_estimator!r} is unknown; use one of {known}")
        if self.loss_type == "dr_grpo" and (self.max_completion_length or 0) < 1:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length: give it, at least 1")

    def of(self, stream: TokenStream) -> LossOptions:
        """The options of a stream: its own values where it has them, else those of the call."""
        names = ("beta", "epsilon", "epsilon_high", "entropy_coef")
        own = {name: value for name in names if (value := getattr(stream, name)) is not None}
        options = replace(self, **own)
        if options.cispo and options.epsilon_high is None:
            raise ValueError("loss_type='cispo' clips its weights at epsilon_high: give it (5.0 is recommended)")
        return options

    @property
    def cispo(self) -> bool:
        return self.loss_type == "cispo"

    @property
    def sequence_ratios(self) -> bool:
        return self.importance_sampling_level == "sequence" or self.loss_type == "gspo"

    @property
    def low(self) -> float:
        """The lower bound of the ratio."""
        return 1 - self.epsilon

    @property
    def high(self) -> float:
        """The upper bound of the ratio."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return high if self.cispo else 1 + high


def check_streams(streams: Sequence[TokenStream], inplace: bool) -> Tensor:
    """Raise ValueError unless names, shapes and dtypes of the streams fit together -> features of the first."""
    names = [stream.name for stream in streams]
    if len(set(names)) < len(names):
        raise ValueError(f"streams need names of their own, which tell their metrics apart; got {names}")
    if not streams:
        raise ValueError("grpo_loss needs at least one stream")
    for stream in streams:
        _check_features(stream, inplace)
    found = {(stream.features.dtype, stream.features.device) for stream in streams}
    if len(found) > 1:
        raise ValueError(f"all streams must have one dtype and device, got {' and '.join(map(str, found))}")
    return streams[0].features


def _check_features(stream: TokenStream, inplace: bool) -> None:
    """Raise ValueError unless the stream has either logits or a head, of matching shapes."""
    headless = stream.hidden is None and stream.weight is None and stream.bias is None
    if not headless if stream.logits is not None else stream.hidden is None or stream.weight is None:
        raise ValueError(f"stream {stream.name!r} needs either logits, or hidden and weight")
    try:
        if stream.logits is not None:
            check_logits(stream.logits, stream.targets, stream.temperature)
            if inplace:
                check_overwritable(stream.logits)
        else:
            assert stream.hidden is not None and stream.weight is not None
            check_head(stream.hidden, stream.weight, stream.bias, stream.targets, stream.temperature)
    except ValueError as error:
        raise ValueError(f"stream {stream.name!r}: {error}") from None


def check_tokens(stream: TokenStream, beta: float, num_samples: int) -> None:
    """Raise ValueError unless every per-token tensor fits the targets, and every token has a sample."""
    if beta and stream.ref_logprob is None:
        raise ValueError(f"beta={beta} needs ref_logprob in stream {stream.name!r}")
    for field in ("sample", "ref_logprob", "old_logprob", "sampling_logprob", "token_weight"):
        value = getattr(stream, field)
        if value is not None and value.shape != stream.targets.shape:
            raise ValueError(
                f"stream {stream.name!r}: {field} is {tuple(value.shape)}, targets {tuple(stream.targets.shape)}"
            )
        if value is not None and value.device != stream.targets.device:
            raise ValueError(
                f"stream {stream.name!r}: {field} is on {value.device}, targets on {stream.targets.device}"
            )
    if stream.sample.dtype != torch.int64:
        raise ValueError(f"stream {stream.name!r}: sample must be int64, got {stream.sample.dtype}")
    outside = (stream.sample < 0) | (stream.sample >= num_samples)
    if stream.sample.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(outside.any().logical_not(), f"grpo_loss: sample must be in [0, {num_samples})")
    elif outside.any():
        n = int(outside.nonzero()[0])
        raise ValueError(
            f"stream {stream.name!r}: sample[{n}] = {int(stream.sample[n])}, but there are {num_samples} advantages"
        )
