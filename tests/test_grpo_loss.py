"""grpo_loss against the formulas of TRL and the papers, token by token: loss, every gradient, metrics and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from grpo_streams import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_TYPES,
    OPTIONS,
    RATIOS,
    SAMPLING_RATIOS,
    advantages_of,
    converted,
    gradients,
    leaves,
    logits_stream,
    make,
    options_for,
    oracle,
    some,
    token_stats,
    weighted,
    with_logits,
)
from oracle import IMPLEMENTATIONS, device
from torch import Tensor

from bicot.kernels.group_advantages import group_advantages
from bicot.kernels.grpo_loss import GRPOLoss, KLEstimator, LossType, TokenStream, grpo_loss

# absolute, of a loss near 1 and gradients near 0.1; bfloat16 rounds the logits (2^-9 of about 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}

loss_types = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def run(streams: list[TokenStream], **options: Any) -> GRPOLoss:
    return grpo_loss(streams, advantages_of(streams), **options)


def check(streams: list[TokenStream], **options: Any) -> GRPOLoss:
    """Loss and gradients equal the oracle's."""
    ours, expected = run(streams, **options), oracle(streams, ADVANTAGES, **options)
    atol = TOLERANCE[leaves(streams)[0].dtype]
    assert abs(ours.loss.item() - expected.item()) <= atol
    for o, e in zip(gradients(ours.loss, streams), gradients(expected, streams), strict=True):
        torch.testing.assert_close(o, e.to(o.dtype), rtol=atol, atol=atol)
    return ours


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("delta", [None, 1.4], ids=["", "delta"])
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("recorded", [{}, {"old": True}, {"sampling": True}, {"old": True, "sampling": True}], ids=str)
@loss_types
def test_equals_the_oracle(
    loss_type: LossType,
    recorded: dict,
    kl_estimator: KLEstimator,
    delta: float | None,
    entropy_coef: float,
    correct: bool,
) -> None:
    more = {"delta": delta, "entropy_coef": entropy_coef, "use_bias_correction_kl": correct}
    check(make(**recorded), **options_for(loss_type), beta=0.1, kl_estimator=kl_estimator, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old", [False, True])
@loss_types
def test_lower_precision(loss_type: LossType, old: bool, dtype: torch.dtype) -> None:
    streams = make(dtype, old=old)
    result = check(streams, **options_for(loss_type), beta=0.1, entropy_coef=0.1, delta=1.4)
    assert result.loss.dtype == torch.float32
    assert all(lp.dtype == torch.float32 and not lp.requires_grad for lp in result.logprobs)


@loss_types
def test_ratios_of_sequences(loss_type: LossType) -> None:
    streams = make(old=True, sampling=True)
    options = {**options_for(loss_type), "beta": 0.1, "delta": 1.4, "use_bias_correction_kl": True}
    sequence = check(streams, **options, importance_sampling_level="sequence")
    assert (sequence.loss == run(streams, **options).loss) == (loss_type == "gspo")
    if loss_type == "gspo":
        grpo = run(streams, **options | {"loss_type": "grpo"}, importance_sampling_level="sequence")
        assert torch.equal(grpo.loss, sequence.loss)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3], ids=["", "entropy"])
@loss_types
def test_token_weights(loss_type: LossType, entropy_coef: float) -> None:
    """They change no metric. A token of weight 0 has no gradient, except through gspo's ratio of its whole sample."""
    plain = make(old=True, sampling=True)
    streams = [weighted(stream, torch.float64) for stream in plain]
    options = {**options_for(loss_type), "beta": 0.1, "entropy_coef": entropy_coef}
    result, unweighted = check(streams, **options), run(plain, **options)
    assert result.metrics == unweighted.metrics and result.loss != unweighted.loss
    hidden = [stream.hidden for stream in streams]
    for stream, gradient in zip(streams, torch.autograd.grad(run(streams, **options).loss, hidden), strict=True):
        silent = (gradient == 0).all(1)
        assert torch.equal(silent, stream.token_weight == 0) or loss_type == "gspo"
    ones = [replace(stream, token_weight=torch.ones(len(stream.targets), dtype=torch.bool)) for stream in plain]
    assert torch.equal(run(ones, **options).loss, unweighted.loss)


@loss_types
def test_coefficients_of_a_stream(loss_type: LossType) -> None:
    text, image = make(old=True)
    high = 1.1 if loss_type == "cispo" else 0.05
    text = replace(text, beta=0.0, ref_logprob=None, epsilon=0.05, epsilon_high=high, entropy_coef=0.5)
    options = {**options_for(loss_type), "beta": 0.1}
    result = check([text, image], **options)
    assert "text/kl" not in result.metrics and "image/kl" in result.metrics
    alone = check([text, replace(image, beta=0.0)], **options, entropy_coef=0.2)
    assert result.loss != alone.loss
    if loss_type != "cispo":  # without either, epsilon_high is the stream's own epsilon
        both = [replace(stream, epsilon=0.3, epsilon_high=None) for stream in (text, image)]
        options = {"loss_type": loss_type, "max_completion_length": 11}
        expected = oracle(both, ADVANTAGES, **options, epsilon_high=0.3)
        torch.testing.assert_close(run(both, **options, epsilon=0.1).loss, expected, rtol=0, atol=1e-12)


@loss_types
def test_counts_of_the_whole_step(loss_type: LossType) -> None:
    options, streams = {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}, make(old=True)
    whole = check(streams, **options, num_tokens=130, num_samples=50).loss
    tensors = {"num_tokens": torch.tensor(130), "num_samples": torch.tensor(50.0)}
    torch.testing.assert_close(run(streams, **options, **tensors).loss, whole)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])  # which averages over each micro-batch
def test_micro_batches_sum_to_the_whole(loss_type: LossType) -> None:
    streams, options = make(old=True, sampling=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    whole = run(streams, **options)
    total = torch.zeros((), dtype=torch.float64)
    for begin, end in ((0, 2), (2, 3), (3, 5)):
        batch = [some(stream, (begin <= stream.sample) & (stream.sample < end)) for stream in streams]
        batch = [replace(stream, sample=stream.sample - begin) for stream in batch]
        advantages = advantages_of(streams)[begin:end]
        total = total + grpo_loss(batch, advantages, **options, num_tokens=13, num_samples=5).loss
    torch.testing.assert_close(total, whole.loss, rtol=0, atol=1e-12)
    for o, e in zip(gradients(total, streams), gradients(whole.loss, streams), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=1e-12)


class TestOnPolicy:
    """One update per rollout: ratio 1, and the policy gradient -A·∇lp / N."""

    @loss_types
    def test_gradient_is_that_of_the_log_prob(self, loss_type: LossType) -> None:
        sample, A = [0, 0, 1, 1], torch.tensor([1.5, -0.5]).double()  # equal lengths: every mean is over 4 tokens
        stream = logits_stream(4, 9, sample, temperature=0.7)
        result = grpo_loss([stream], A, **options_for(loss_type) | {"max_completion_length": 2})
        p = (stream.logits.detach() / 0.7).softmax(-1)
        label = torch.nn.functional.one_hot(stream.targets, 9)
        expected = -A[stream.sample, None] / 4 * (label - p) / 0.7
        torch.testing.assert_close(torch.autograd.grad(result.loss, stream.logits)[0], expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "cispo"])
    def test_ratio_is_exactly_1_and_nothing_is_clipped(self, loss_type: LossType) -> None:
        streams = [logits_stream(5, 9, [0, 0, 1, 1, 1], torch.float32, name="text")]
        streams += [logits_stream(6, 17, [0, 1, 0, 1, 0, 1], torch.float32, name="image")]
        options = OPTIONS | {"max_completion_length": 1, "loss_type": loss_type}
        result = grpo_loss(streams, torch.tensor([2.0, 2.0]), **options)
        for name in ("text", "image"):
            assert result.metrics[f"{name}/ratio_max"] == 1
            assert result.metrics[f"{name}/clip_ratio/low"] == result.metrics[f"{name}/clip_ratio/high"] == 0
        expected = -2.0 * 11 / 2 if loss_type == "dr_grpo" else -2.0
        torch.testing.assert_close(result.loss, torch.tensor(expected))

    @loss_types
    def test_zero_advantage_gives_exactly_zero_gradient(self, loss_type: LossType) -> None:
        stream = logits_stream(4, 9, [0, 1, 0, 1], torch.float32)
        loss = grpo_loss([stream], torch.tensor([0.0, 1.0]), **options_for(loss_type)).loss
        gradient = torch.autograd.grad(loss, stream.logits)[0]
        assert gradient[::2].eq(0).all() and gradient[1::2].ne(0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # by RATIOS and ADVANTAGES: low counts ratios with A < 0, high those with A > 0
        (
            OPTIONS,
            {
                "text/clip_ratio/low": 0, "text/clip_ratio/high": 2 / 6, "image/clip_ratio/low": 2 / 7,
                "image/clip_ratio/high": 0, "text/ratio_max": 2.5,
            },
        ),
        (options_for("cispo"), {"text/clip_ratio/high": 2 / 6}),  # a third ratio above the bound has A < 0
        (
            options_for("gspo"),  # one ratio for all tokens of a sample; sample 1 of both streams has the largest
            {
                "text/ratio_max": (1.5 * 1.1 * 2.5) ** (1 / 3), "image/ratio_max": (1.5 * 1.1 * 2.5) ** (1 / 3),
                "text/clip_ratio/high": 3 / 6, "image/clip_ratio/low": 3 / 7,  # samples 2 and 3
            },
        ),
    ],
    ids=["token ratios", "cispo", "gspo"],
)  # fmt: skip
def test_clip_ratios_count_tokens_whose_gradient_is_clipped(options: dict, expected: dict[str, float]) -> None:
    metrics = run(make(old=True), **options).metrics
    assert {key: metrics[key].item() for key in expected} == pytest.approx(expected)


def test_metrics_are_means_over_the_tokens_of_a_stream() -> None:
    streams = make(old=True, sampling=True)
    result = run(streams, beta=0.1, kl_estimator="k1")
    for stream, logprob in zip(streams, result.logprobs, strict=True):
        tokens = [token_stats(stream, n) for n in range(len(stream.targets))]
        torch.testing.assert_close(logprob, torch.stack([lp.detach() for lp, _ in tokens]))
        expected = {
            "kl": sum(lp.item() - r.item() for (lp, _), r in zip(tokens, stream.ref_logprob, strict=True)),
            "entropy": sum(entropy.item() for _, entropy in tokens),
            "sampling_ratio": sum(SAMPLING_RATIOS[: len(tokens)]),  # before the bound
        }
        for key, total in expected.items():
            value = result.metrics[f"{stream.name}/{key}"]
            assert value.item() == pytest.approx(total / len(tokens), rel=1e-6) and not value.requires_grad


@loss_types
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_and_hidden_states_give_the_same(dtype: torch.dtype, loss_type: LossType) -> None:
    streams, options = make(dtype, old=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    advantages = advantages_of(streams)
    ours, expected = (grpo_loss(s, advantages, **options).loss for s in ([*map(with_logits, streams)], streams))
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype])
    for o, e in zip(gradients(ours, streams), gradients(expected, streams), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("w", [5.0, 0.3])
def test_a_guided_policy(w: float, impl: str) -> None:
    """From w·h_c + (1-w)·h_u, the head computes the guided logits: the same loss and gradients of both branches."""
    dtype, atol = (torch.float64, 1e-12) if impl == "torch" else (torch.float32, 5e-6)
    base = converted(make(dtype)[1:], device(impl))[0]
    options: dict[str, Any] = {"beta": 0.1, "entropy_coef": 0.1, "impl": impl}
    advantages = torch.tensor(ADVANTAGES).to(base.hidden)
    cond = base.hidden.detach().clone().requires_grad_()
    uncond = torch.randn(cond.shape, generator=torch.Generator().manual_seed(1)).to(cond).requires_grad_()
    mixed = w * cond + (1 - w) * uncond
    logprob = replace(base, hidden=mixed.detach()).stats(impl).logprob.detach()
    old = logprob - torch.tensor(RATIOS[1]).to(cond).log()
    base = replace(base, ref_logprob=logprob + 0.3, old_logprob=old)
    logits_c, logits_u = (with_logits(replace(base, hidden=h)).logits for h in (cond, uncond))
    headless = replace(with_logits(base), logits=logits_u + w * (logits_c - logits_u))
    ours, expected = (grpo_loss([s], advantages, **options).loss for s in (replace(base, hidden=mixed), headless))
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    found = [torch.autograd.grad(loss, [cond, uncond]) for loss in (ours, expected)]
    torch.testing.assert_close(*found, rtol=0, atol=10 * atol)


@loss_types
def test_a_stream_without_tokens_changes_nothing(loss_type: LossType) -> None:
    (full, image), options = make(old=True, sampling=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    (empty,) = converted([some(image, slice(0))], torch.float64)
    result, alone = run([full, empty], **options), run([full], **options)
    assert torch.equal(result.loss, alone.loss)
    assert all(value.isfinite() for value in result.metrics.values())
    result.loss.backward()
    assert empty.hidden.grad.shape == (0, 4) and empty.weight.grad.eq(0).all()
    assert run([empty], **options).loss == 0


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_rewards_become_advantages(shape: tuple[int, ...]) -> None:
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stream = logits_stream(6, 9, [0, 1, 1, 2, 3, 3])
    ours = grpo_loss([stream], rewards, group_size=2).loss
    assert torch.equal(ours, grpo_loss([stream], group_advantages(rewards, 2)).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
@loss_types
def test_advantages_of_any_dtype_count_tokens_exactly(loss_type: LossType, dtype: torch.dtype) -> None:
    stream = logits_stream(1003, 3, [0] * 1003, torch.float32)  # 1003 rounds to 1004 in bfloat16
    ours, expected = (
        grpo_loss([stream], torch.tensor([2]).to(to), **options_for(loss_type)).loss for to in (dtype, torch.float32)
    )
    assert torch.equal(ours, expected)


STREAM = logits_stream(3, 5, [0, 1, 1], name="text")
ONES = torch.ones(2)
NEITHER = "stream 'text' needs either logits, or hidden and weight"


@pytest.mark.parametrize(
    ("stream", "advantages", "options", "message"),
    [
        (STREAM, ONES, {"loss_type": "ppo"}, "loss_type='ppo' is unknown; use one of grpo, dr_grpo, bnpo"),
        (STREAM, ONES, {"kl_estimator": "k4"}, "kl_estimator='k4' is unknown; use one of k1, k2, k3"),
        (STREAM, ONES, {"importance_sampling_level": "word"}, "level='word' is unknown; use token or sequence"),
        (STREAM, ONES, {"loss_type": "dr_grpo"}, "loss_type='dr_grpo' divides by max_completion_length: give it"),
        (STREAM, ONES, {"loss_type": "dr_grpo", "max_completion_length": 0}, "give it, at least 1"),
        (STREAM, ONES, {"loss_type": "cispo"}, "loss_type='cispo' clips its weights at epsilon_high: give it"),
        (STREAM, ONES, {"beta": 0.1}, "beta=0.1 needs ref_logprob in stream 'text'"),
        (STREAM, torch.ones(2, 3), {}, r"advantages must be \[S\], got \(2, 3\); for rewards give group_size too"),
        (STREAM, ONES.to("meta"), {}, "advantages are on meta, the streams on cpu"),
        (STREAM, torch.ones(3), {"group_size": 2}, "3 rewards cannot be split into groups of group_size=2"),
        (replace(STREAM, logits=None), ONES, {}, NEITHER),
        (replace(STREAM, hidden=torch.ones(3, 4)), ONES, {}, NEITHER),
        (replace(STREAM, bias=torch.ones(5)), ONES, {}, NEITHER),
        (replace(STREAM, logits=None, hidden=torch.ones(3, 4)), ONES, {}, NEITHER),
        (replace(STREAM, sample=torch.tensor([0, 1])), ONES, {}, r"stream 'text': sample is \(2,\), targets \(3,\)"),
        (replace(STREAM, sample=torch.tensor([0, 2, 1])), ONES, {}, r"'text': sample\[1\] = 2, but there are 2 adv"),
        (replace(STREAM, sample=torch.tensor([0, 1, -1])), ONES, {}, r"'text': sample\[2\] = -1, but there are 2 adv"),
        (replace(STREAM, targets=torch.tensor([0, 5, 1])), ONES, {}, r"targets must be in \[0, 5\): targets\[1\] = 5"),
        (replace(STREAM, temperature=0.0), ONES, {}, "temperature must be positive, got 0.0"),
        *(
            (replace(STREAM, **{field: torch.ones(2)}), ONES, {}, rf"'text': {field} is \(2,\), targets \(3,\)")
            for field in ("ref_logprob", "old_logprob", "sampling_logprob", "token_weight")
        ),
        (replace(STREAM, beta=0.2), ONES, {}, "beta=0.2 needs ref_logprob in stream 'text'"),
    ],
)
def test_bad_input_is_named(stream: TokenStream, advantages: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss([stream], advantages, **options)


def test_two_streams_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"streams need names of their own.*got \['text', 'text'\]"):
        grpo_loss([STREAM, STREAM], ONES)
