"""grpo_loss against the formulas of TRL and the papers, token by token, loss and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BFLOAT16_ROUNDING,
    CUDA,
    IMPLEMENTATIONS,
    KERNELS,
    TRITON,
    amid_nan,
    assert_no_worse,
    device,
    gpu,
    needs_native,
    no_host_sync,
    peak_bytes,
    poisoned_outputs,
)
from torch import Tensor

from bicot.kernels import linear_logprobs
from bicot.kernels.dispatch import INTERPRETED
from bicot.kernels.group_advantages import group_advantages
from bicot.kernels.grpo_loss import GRPOLoss, KLEstimator, LossType, TokenStream, grpo_loss

# absolute, of a loss near 1 and gradients near 0.1; bfloat16 rounds the logits (2^-9 of about 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
KL_ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)

# Five samples; the last has no token, the one before it no text. Ratios below, within and above [0.8, 1.28], each with
# both signs of the advantage, token by token and (gspo) as a sample's geometric mean: 0.65, 1.60, 1.39, 0.68.
ADVANTAGES = [1.0, -1.0, 0.5, -0.7, 0.3]
SAMPLES = [[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 3, 3, 3]]
RATIOS = [[0.5, 0.9, 1.5, 1.5, 2.5, 1.1], [0.6, 1.1, 2.5, 0.9, 0.5, 0.7, 0.9]]
SAMPLING_RATIOS = [0.5, 4.0, 1.0, 1.2, 0.8, 3.5, 0.9]  # two above the bound of 3
OPTIONS: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.28, "max_completion_length": 11}


def row_stats(stream: TokenStream, n: int) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of one token, by hand."""
    if stream.logits is not None:
        z = stream.logits[n].double()
    else:
        z = stream.weight.double() @ stream.hidden[n].double()
        z = z if stream.bias is None else z + stream.bias.double()
    z = z / stream.temperature
    logp = z - z.exp().sum().log()
    return logp[stream.targets[n]], -(logp.exp() * logp).sum()


def oracle(
    streams: list[TokenStream],
    advantages: list[float],
    *,
    loss_type: LossType = "dapo",
    importance_sampling_level: str = "token",
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = False,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    entropy_coef: float = 0.0,
    importance_sampling_clip_max: float = 3.0,
    max_completion_length: int = 1,
    num_tokens: int | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """The loss as a sum over tokens in float64, with nothing but scalars."""
    tokens = []
    for stream in streams:
        for n, sample in enumerate(stream.sample.tolist()):
            lp, entropy = row_stats(stream, n)
            old = lp.detach() if stream.old_logprob is None else stream.old_logprob[n].double()
            ref = None if stream.ref_logprob is None else stream.ref_logprob[n].double()
            sampler = None if stream.sampling_logprob is None else stream.sampling_logprob[n].double()
            weight = 1.0 if stream.token_weight is None else stream.token_weight[n].item()
            given = {"beta": beta, "epsilon": epsilon, "epsilon_high": epsilon_high, "entropy_coef": entropy_coef}
            own = given | {name: value for name in given if (value := getattr(stream, name)) is not None}
            tokens.append((sample, lp, entropy, old, ref, sampler, weight, own))
    lengths = [sum(sample == s for sample, *_ in tokens) for s in range(len(advantages))]
    N = num_tokens or len(tokens)
    S = num_samples or len(advantages)

    loss = torch.zeros((), dtype=torch.float64)
    for sample, lp, entropy, old, ref, sampler, weight, own_settings in tokens:
        A = advantages[sample]
        beta, epsilon, epsilon_high, entropy_coef = own_settings.values()
        if loss_type == "gspo" or importance_sampling_level == "sequence":
            own = [other[1] - other[3] for other in tokens if other[0] == sample]
            ratio = (sum(own) / len(own)).exp()
        else:
            ratio = (lp - old).exp()
        if loss_type == "cispo":
            objective = min(ratio.item(), epsilon_high) * A * lp
        else:
            bounded = ratio if delta is None or ratio <= delta else delta
            clipped = (
                ratio if 1 - epsilon <= ratio <= 1 + epsilon_high else 1 - epsilon if ratio < 1 else 1 + epsilon_high
            )
            objective = bounded * A if bounded * A <= clipped * A else clipped * A
        if sampler is not None:
            objective = objective * min(math.exp(old - sampler), importance_sampling_clip_max)
        kl: Tensor | float = 0.0
        if beta:
            gap = lp - ref
            kl = {"k1": gap, "k2": gap * gap / 2, "k3": (-gap).exp() + gap - 1}[kl_estimator]
            kl = kl * ratio if use_bias_correction_kl else kl
        norm = {
            "dapo": N,
            "cispo": N,
            "bnpo": len(tokens),
            "grpo": lengths[sample] * S,
            "gspo": lengths[sample] * S,
            "dr_grpo": S * max_completion_length,
        }[loss_type]
        loss = loss + weight * ((beta * kl - objective) / norm - entropy_coef * entropy / N)
    return loss


def make(dtype: torch.dtype = torch.float64, *, old: bool = False, sampling: bool = False) -> list[TokenStream]:
    """A text and an image stream with their own heads and temperatures."""
    generator = torch.Generator().manual_seed(0)
    streams = []
    for name, V, temperature, sample, ratios in zip(
        ("text", "image"), (5, 7), (0.7, 1.3), SAMPLES, RATIOS, strict=True
    ):
        N, D = len(sample), 4
        stream = TokenStream(
            targets=torch.randint(0, V, (N,), generator=generator),
            sample=torch.tensor(sample),
            hidden=torch.randn(N, D, generator=generator).to(dtype).requires_grad_(),
            weight=torch.randn(V, D, generator=generator).to(dtype).requires_grad_(),
            bias=torch.randn(V, generator=generator).to(dtype).requires_grad_(),
            temperature=temperature,
            name=name,
        )
        logprob = torch.stack([row_stats(stream, n)[0].detach() for n in range(N)])
        before = logprob - torch.tensor(ratios).double().log() if old else logprob
        to = torch.float64 if dtype == torch.float64 else torch.float32
        streams.append(
            replace(
                stream,
                ref_logprob=(logprob + 0.5 * torch.randn(N, generator=generator)).to(to),
                old_logprob=before.to(to) if old else None,
                sampling_logprob=(before - torch.tensor(SAMPLING_RATIOS[:N]).double().log()).to(to)
                if sampling
                else None,
            )
        )
    return streams


def leaves(streams: list[TokenStream]) -> list[Tensor]:
    candidates = [t for s in streams for t in (s.hidden, s.weight, s.bias, s.logits)]
    return [t for t in candidates if t is not None and t.requires_grad]


def gradients(loss: Tensor, streams: list[TokenStream]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(streams)))


def advantages_of(streams: list[TokenStream]) -> Tensor:
    return torch.tensor(ADVANTAGES, dtype=torch.promote_types(leaves(streams)[0].dtype, torch.float32))


def check(streams: list[TokenStream], **options: Any) -> GRPOLoss:
    """Loss and gradients equal the oracle's."""
    ours = grpo_loss(streams, advantages_of(streams), **options)
    expected = oracle(streams, ADVANTAGES, **options)
    atol = TOLERANCE[leaves(streams)[0].dtype]
    assert abs(ours.loss.item() - expected.item()) <= atol
    for o, e in zip(gradients(ours.loss, streams), gradients(expected, streams), strict=True):
        torch.testing.assert_close(o, e.to(o.dtype), rtol=atol, atol=atol)
    return ours


def options_for(loss_type: LossType) -> dict[str, Any]:
    high = 1.3 if loss_type == "cispo" else 0.28
    return {**OPTIONS, "loss_type": loss_type, "epsilon_high": high}


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("sampling", [False, True], ids=["", "sampling"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("delta", [None, 1.4], ids=["", "delta"])
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_the_oracle(
    loss_type: LossType,
    kl_estimator: KLEstimator,
    old: bool,
    delta: float | None,
    entropy_coef: float,
    sampling: bool,
    correct: bool,
) -> None:
    check(
        make(old=old, sampling=sampling),
        **options_for(loss_type),
        beta=0.1,
        kl_estimator=kl_estimator,
        use_bias_correction_kl=correct,
        delta=delta,
        entropy_coef=entropy_coef,
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratios_of_sequences_equal_the_oracle(loss_type: LossType) -> None:
    streams = make(old=True, sampling=True)
    options = {**options_for(loss_type), "beta": 0.1, "delta": 1.4, "use_bias_correction_kl": True}
    sequence = check(streams, **options, importance_sampling_level="sequence")
    token = grpo_loss(streams, advantages_of(streams), **options)
    assert (sequence.loss == token.loss) == (loss_type == "gspo")
    if loss_type == "gspo":
        grpo = grpo_loss(
            streams, advantages_of(streams), **options | {"loss_type": "grpo"}, importance_sampling_level="sequence"
        )
        assert torch.equal(grpo.loss, sequence.loss)
    with pytest.raises(ValueError, match="importance_sampling_level='word' is unknown; use token or sequence"):
        grpo_loss(streams, advantages_of(streams), importance_sampling_level="word")


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights_equal_the_oracle(loss_type: LossType, entropy_coef: float) -> None:
    """And change no metric; a token of weight 0 has no gradient, but for gspo's ratio of the whole sample."""
    plain = make(old=True, sampling=True)
    streams = [weighted(stream, torch.float64) for stream in plain]
    options = {**options_for(loss_type), "beta": 0.1, "entropy_coef": entropy_coef}
    result = check(streams, **options)
    unweighted = grpo_loss(plain, advantages_of(plain), **options)
    assert result.metrics == unweighted.metrics and result.loss != unweighted.loss
    hidden = [stream.hidden for stream in streams]
    loss = grpo_loss(streams, advantages_of(streams), **options).loss
    for stream, gradient in zip(streams, torch.autograd.grad(loss, hidden), strict=True):
        silent = (gradient == 0).all(1)
        assert torch.equal(silent, stream.token_weight == 0) or loss_type == "gspo"
    ones = [replace(stream, token_weight=torch.ones(len(stream.targets), dtype=torch.bool)) for stream in plain]
    assert torch.equal(grpo_loss(ones, advantages_of(plain), **options).loss, unweighted.loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_coefficients_of_a_stream_equal_the_oracle(loss_type: LossType) -> None:
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
        ours = grpo_loss(both, advantages_of(both), loss_type=loss_type, max_completion_length=11, epsilon=0.1)
        expected = oracle(both, ADVANTAGES, loss_type=loss_type, max_completion_length=11, epsilon_high=0.3)
        torch.testing.assert_close(ours.loss, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("logits", [True, False])
def test_weight_0_silences_a_token_that_is_not_finite(logits: bool, impl: str) -> None:
    streams = random_streams(0, torch.float32, [(4, 9)], 2, "normal", logits, False, True, False)
    ref, old = streams[0].ref_logprob.clone(), streams[0].old_logprob.clone()
    ref[1], old[2] = 1e3, -1e3  # KL and ratio overflow
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0])
    there = converted([replace(streams[0], ref_logprob=ref, old_logprob=old, token_weight=weight)], device(impl))
    sane = converted([replace(streams[0], token_weight=weight)], device(impl))
    advantages = torch.tensor([1.0, -0.7]).to(device(impl))
    for stream in (there[0], sane[0]):
        grpo_loss([stream], advantages, beta=0.1, entropy_coef=0.1, impl=impl).loss.backward()
    ours, expected = (s.logits.grad if logits else s.hidden.grad for s in (there[0], sane[0]))
    assert torch.equal(ours, expected) and (ours[1:3] == 0).all() and (ours[::3] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_lower_precision(loss_type: LossType, old: bool, dtype: torch.dtype) -> None:
    streams = make(dtype, old=old)
    result = check(streams, **options_for(loss_type), beta=0.1, entropy_coef=0.1, delta=1.4)
    assert result.loss.dtype == torch.float32
    assert all(lp.dtype == torch.float32 and not lp.requires_grad for lp in result.logprobs)


# Beyond what the reference loses in the same dtype: sums in another order and, in bfloat16, a gradient of the logits
# that is rounded once where the reference's chain rounds at other places.
KERNEL_TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.bfloat16: (2 * BFLOAT16_ROUNDING, 1e-6)}
KINDS = {
    "normal": lambda x: 2 * x,
    "tied": torch.zeros_like,
    "peaked": lambda x: x + 30 * (torch.arange(x.shape[1]) == x.shape[1] // 2),
    "negative": lambda x: x - 100,
    "offset": lambda x: x + 1e4,
}


def random_streams(
    seed: int, dtype: torch.dtype, shapes: list[tuple[int, int]], samples: int, kind: str, logits: bool, bias: bool,
    old: bool, sampling: bool,
) -> list[TokenStream]:  # fmt: skip
    """Streams of `shapes` (N, V), whose ratios stay away from every bound: there rounding would decide the gradient."""
    generator = torch.Generator().manual_seed(seed)
    streams = []
    for i, (N, V) in enumerate(shapes):
        # on a grid, so that bfloat16 logits are exact whatever order a GEMM sums in: no rounding is left to chance
        hidden = torch.randint(-2, 3, (N, 6), generator=generator).to(dtype) / 2
        weight = torch.randint(-3, 4, (V, 6), generator=generator).to(dtype) / 2
        shift = torch.randint(-8, 9, (V,), generator=generator).to(dtype) / 4 if bias else None
        if logits:
            source = {"logits": KINDS[kind](torch.randn(N, V, generator=generator)).to(dtype).requires_grad_()}
        else:
            source = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
            source |= {} if shift is None else {"bias": shift.requires_grad_()}
        stream = TokenStream(
            targets=torch.randint(0, V, (N,), generator=generator),
            sample=torch.randint(0, samples, (N,), generator=generator),
            temperature=(0.7, 1.3)[i % 2],
            name=f"stream{i}",
            **source,
        )
        logprob = stream.stats("torch").logprob.detach().double()
        choice = torch.tensor([0.3, 0.6, 0.9, 1.1, 1.5, 2.5]).double()
        before = logprob - choice[torch.randint(0, 6, (N,), generator=generator)].log() if old else logprob
        ratio = choice[torch.randint(0, 6, (N,), generator=generator)]
        ref = logprob + 0.5 * torch.randn(N, generator=generator)
        streams.append(
            replace(
                stream,
                ref_logprob=ref.float(),
                old_logprob=before.float() if old else None,
                sampling_logprob=(before - ratio.log()).float() if sampling else None,
            )
        )
    return streams


def weighted(stream: TokenStream, to: torch.dtype = torch.float32) -> TokenStream:
    """With weights of single tokens, every third of them 0."""
    n = torch.arange(len(stream.targets))
    return replace(stream, token_weight=((n % 3) * (0.5 + n % 2)).to(to))


def converted(streams: list[TokenStream], to: Any) -> list[TokenStream]:
    """The same streams with new leaves, of another dtype or on another device."""
    floating = ("logits", "hidden", "weight", "bias", "ref_logprob", "old_logprob", "sampling_logprob", "token_weight")
    fields = floating if isinstance(to, torch.dtype) else (*floating, "targets", "sample")
    moved = []
    for stream in streams:
        values = {f: getattr(stream, f) for f in fields if getattr(stream, f) is not None}
        values = {f: v.detach().to(to, copy=True).requires_grad_(v.requires_grad) for f, v in values.items()}
        moved.append(replace(stream, **values))
    return moved


def outcome(
    streams: list[TokenStream],
    advantages: Tensor,
    layout: Callable[[Tensor], Tensor] = torch.clone,
    to: str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """Everything that comes out, on device `to`: loss, metrics, log-probs, gradients of 0.7 times the loss.

    `layout` copies the logits, which an in-place gradient overwrites.
    """
    used = streams
    if options.get("inplace") or layout is not torch.clone:
        used = [s if s.logits is None else replace(s, logits=layout(s.logits)) for s in streams]
    result = grpo_loss(used, advantages, **options)
    (0.7 * result.loss).backward()
    found = {"loss": result.loss.detach(), **result.metrics}
    for stream, logprob in zip(streams, result.logprobs, strict=True):
        found[f"{stream.name}/logprob"] = logprob
        for field in ("logits", "hidden", "weight", "bias"):
            leaf = getattr(stream, field)
            if leaf is not None and leaf.requires_grad:
                found[f"{stream.name}/{field} gradient"] = leaf.grad
    return {name: value.to(to) for name, value in found.items()}


@pytest.mark.parametrize("impl", KERNELS)
@settings(deadline=None, max_examples=25 if INTERPRETED or CUDA else 250)  # many compile a kernel on a GPU
@given(data=st.data())
def test_kernels_are_no_worse_than_the_reference(impl: str, data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(list(KERNEL_TOLERANCE)))
    logits, samples = draw(st.booleans()), draw(st.integers(1, 5))
    # a bfloat16 logit of 1e4 is a multiple of 64: nothing of the kind is left to test
    kinds = [k for k in KINDS if dtype == torch.float32 or k != "offset"]
    old, loss_type = draw(st.booleans()), draw(st.sampled_from(LOSS_TYPES))
    streams = random_streams(
        draw(st.integers(0, 2**32)), dtype, draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), min_size=1,
        max_size=2)), samples, draw(st.sampled_from(kinds)), logits, draw(st.booleans()), old, draw(st.booleans()),
    )  # fmt: skip
    if not logits and draw(st.booleans()):
        streams = [
            replace(s, weight=s.weight.detach(), bias=None if s.bias is None else s.bias.detach()) for s in streams
        ]
    advantages = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 1.0, -1.3, 0.4]), min_size=samples, max_size=samples))
    )
    options: dict[str, Any] = {
        **options_for(loss_type),
        "kl_estimator": draw(st.sampled_from(KL_ESTIMATORS)),
        "use_bias_correction_kl": draw(st.booleans()),
        "beta": draw(st.sampled_from([0.0, 0.2])),
        "delta": draw(st.sampled_from([None, 1.4])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.3])),
        "num_tokens": draw(st.sampled_from([None, 23])),
    }
    if draw(st.booleans()):
        streams = [weighted(stream) for stream in streams]
    if draw(st.booleans()):
        own = {"beta": [0.0, 0.3], "epsilon": [0.2, 0.15], "epsilon_high": [1.35], "entropy_coef": [0.0, 0.4]}
        own = {name: st.sampled_from([None, *values]) for name, values in own.items()}
        streams = [replace(stream, **{name: draw(values) for name, values in own.items()}) for stream in streams]
    gt = outcome(converted(streams, torch.float64), advantages.double(), **options, impl="torch")
    eager = outcome(converted(streams, dtype), advantages, **options, impl="torch")
    inplace, chunk = logits and draw(st.booleans()), draw(st.sampled_from([1, 500, 2**20]))
    with pytest.MonkeyPatch.context() as patch, poisoned_outputs():
        patch.setattr(linear_logprobs, "LOGITS_BYTES", chunk)
        there = device(impl)
        ours = outcome(converted(streams, there), advantages.to(there), **options, impl=impl, inplace=inplace)
    assert ours.keys() == eager.keys() == gt.keys()
    for name, value in ours.items():
        relative, absolute = KERNEL_TOLERANCE[dtype if "gradient" in name else torch.float32]
        if value.dtype == torch.bfloat16 and not logits and value.numel():
            # a GEMM of rounded logit gradients: what cancels in a small element was rounded as large
            absolute += relative * gt[name].abs().max().item()
        if name.endswith(("/ratio_max", "/kl")):
            # made of differences of log-probs, of which one of -40 has an ulp of 4e-6
            logprobs = gt[name.rpartition("/")[0] + "/logprob"].abs()
            ulp = logprobs.amax().item() * torch.finfo(torch.float32).eps if len(logprobs) else 0.0
            relative, absolute = relative + ulp, absolute + ulp
        assert_no_worse(name, value, eager[name], gt[name], relative, absolute)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", list(KERNEL_TOLERANCE))
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_short_rows_touch_nothing_around_them(inplace: bool, dtype: torch.dtype, impl: str) -> None:
    """Few or no whole 16 bytes, at any offset from a multiple of 16 bytes. Sample 1 has gradients of zero."""
    for V in range(1, 18):
        for left in range(0, 16 // dtype.itemsize, 3):
            streams = random_streams(V, dtype, [(5, V)], 2, "normal", True, False, True, False)
            advantages, buffers = torch.tensor([1.0, 0.0]), []

            def layout(logits: Tensor, left: int = left, buffers: list = buffers) -> Tensor:
                view, buffer = amid_nan(logits, left)
                buffers.append(buffer)
                return view

            gt = outcome(converted(streams, torch.float64), advantages.double(), impl="torch")
            eager = outcome(converted(streams, dtype), advantages, impl="torch")
            there = converted(streams, device(impl))
            ours = outcome(there, advantages.to(device(impl)), layout, inplace=inplace, impl=impl)
            for name in ("loss", "stream0/logprob", "stream0/logits gradient"):
                assert_no_worse(name, ours[name], eager[name], gt[name], *KERNEL_TOLERANCE[dtype])
            (buffer,) = buffers
            assert buffer.isnan().sum() == buffer.numel() - 5 * V, "something around the rows was written"


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("V", [5, 33, 300])
def test_in_place_gives_the_same_bits(V: int, impl: str) -> None:
    """On a GPU that takes a barrier: threads read logits that others are about to overwrite."""
    streams = random_streams(V, torch.bfloat16, [(4096 if device(impl) == "cuda" else 9, V)], 2, "normal", True, False,
                             True, False)  # fmt: skip
    advantages = torch.tensor([1.0, -0.7]).to(device(impl))
    results = [
        outcome(converted(streams, device(impl)), advantages, inplace=inplace, entropy_coef=0.1, impl=impl)
        for inplace in (False, True)
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_float16_gradients_are_scaled_before_they_are_rounded(kind: str, impl: str) -> None:
    """As GradScaler does: most gradients of a mean over 10^6 tokens are below what float16 can hold."""
    streams = random_streams(0, torch.float16, [(16, 33)], 2, "normal", kind == "logits", False, True, False)
    streams = converted(streams, device(impl))
    advantages, scale = torch.tensor([1.0, -0.7]).to(device(impl)), 2.0**16
    exact = converted(streams, torch.float64)
    grpo_loss(exact, advantages.double(), num_tokens=10**6, impl="torch").loss.backward()
    result = grpo_loss(streams, advantages, num_tokens=10**6, impl=impl)  # type: ignore[arg-type]
    (scale * result.loss).backward()
    for ours, gt in zip(leaves(streams), leaves(exact), strict=True):
        assert ours.grad is not None and gt.grad is not None
        error = (ours.grad.double() / scale - gt.grad).norm() / gt.grad.norm()
        assert error < 2e-3, f"{error:.2g} of the gradient is lost"


@needs_native
def test_rows_without_gradient_skip_the_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    add = linear_logprobs.HeadGradients.add

    def spy(self: Any, rows: slice, grad_logits: Tensor, active: Tensor | None = None) -> None:
        seen.append(len(grad_logits) if active is None else len(active))
        add(self, rows, grad_logits, active)

    monkeypatch.setattr(linear_logprobs.HeadGradients, "add", spy)
    streams = [replace(s, old_logprob=None) for s in make(torch.float32)]
    grpo_loss(streams, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), impl="native")
    assert seen == [3, 3]  # the tokens of samples 0 and 1
    seen.clear()
    grpo_loss(streams, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), beta=0.1, impl="native")
    assert seen == [6, 7]
    seen.clear()
    grpo_loss([weighted(s) for s in streams], torch.ones(5), beta=0.1, entropy_coef=0.1, impl="native")
    assert seen == [4, 4]


@pytest.mark.parametrize("impl", KERNELS)
class TestKernels:
    def test_no_gradient_is_computed_without_grad(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        streams = converted(make(torch.float32), device(impl))
        advantages = torch.tensor(ADVANTAGES, device=device(impl))
        expected = grpo_loss(streams, advantages, impl=impl)
        monkeypatch.setattr(linear_logprobs.HeadGradients, "add", lambda *_: pytest.fail("a GEMM too many"))
        with torch.no_grad():
            result = grpo_loss(streams, advantages, impl=impl)
        assert not result.loss.requires_grad and torch.equal(result.loss, expected.loss.detach())

    def test_same_input_twice_gives_the_same_bits(self, impl: str) -> None:
        for loss_type in ("dapo", "gspo"):
            streams = converted(make(torch.float32, old=True, sampling=True), device(impl))
            first, second = (
                outcome(converted(streams, device(impl)), torch.tensor(ADVANTAGES).to(device(impl)), beta=0.1,
                loss_type=loss_type, impl=impl) for _ in range(2)
            )  # fmt: skip
            assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("kind", ["logits", "hidden"])
    def test_a_second_backward_is_an_error(self, kind: str, impl: str) -> None:
        streams = {"logits": [logits_stream(4, 9, [0, 1, 0, 1], torch.float32)], "hidden": make(torch.float32)[:1]}
        stream = converted(streams[kind], device(impl))[0]
        loss = 2 * grpo_loss([stream], torch.ones(5, device=device(impl)), impl=impl).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_opcheck(self, impl: str) -> None:
        there, ops = device(impl), torch.ops.bicot
        stream = converted(make(torch.float32, old=True, sampling=True), there)[0]
        per_sample = (torch.tensor(ADVANTAGES).to(there), torch.full((5,), 0.1).to(there), torch.tensor(0.01).to(there))
        terms = (
            stream.targets, stream.sample, *per_sample, stream.old_logprob, stream.ref_logprob, stream.sampling_logprob,
            torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 1.0]).to(there), 0.7, 0.1, 0.8, 1.2, 2.0, 3.0, False, 3, True,
        )  # fmt: skip
        hidden, weight, bias = (t.detach() for t in (stream.hidden, stream.weight, stream.bias))
        logits = torch.nn.functional.linear(hidden, weight, bias)
        check = torch.library.opcheck
        for gradient in (True, False):
            check(ops.grpo_logits.default, (logits, gradient, impl, *terms))
        check(ops.grpo_logits_.default, (logits.clone(), impl, *terms))
        for needed in ([True, True, True], [True, False, False], [False, False, False]):
            check(ops.grpo_linear.default, (hidden, weight, bias, needed, impl, *terms))
        check(ops.scale_.default, (logits.clone(), torch.tensor(0.5).to(there), impl))
        loss, leaf = torch.tensor(1.0).to(there), logits.clone().requires_grad_()
        check(ops.attach_gradients.default, (loss, [leaf], [torch.ones_like(logits)], impl))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("inplace", [False, True])
    def test_compiles_without_a_graph_break(self, impl: str, inplace: bool) -> None:
        def loss(hidden: Tensor, weight: Tensor, logits: Tensor, advantages: Tensor, loss_type: LossType) -> Tensor:
            text = replace(base[0], hidden=hidden, weight=weight, bias=None)
            image = replace(base[1], logits=1 * logits, hidden=None, weight=None, bias=None)
            options = {"beta": 0.1, "entropy_coef": 0.1, "loss_type": loss_type, "impl": impl, "inplace": inplace}
            return grpo_loss([text, image], advantages, **options).loss

        base = converted(make(torch.float32, old=True), device(impl))
        hidden, weight = base[0].hidden, base[0].weight
        logits = torch.randn(7, 7).to(hidden.device).requires_grad_()
        advantages = torch.tensor(ADVANTAGES).to(hidden.device)
        for loss_type in ("dapo", "grpo", "gspo"):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            results = []
            for function in (compiled, loss):
                value = function(hidden, weight, logits, advantages, loss_type)
                results.append([value.detach(), *torch.autograd.grad(value, [hidden, weight, logits])])
            torch.testing.assert_close(results[0], results[1])


@needs_native
@pytest.mark.parametrize("kind", ["logits", "logits in place", "hidden", "hidden, frozen head"])
def test_peak_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the inputs: the gradients, a chunk of logits, per-token results; in place nothing but the last."""
    N, D, V = 512, 8, 4096
    monkeypatch.setattr(linear_logprobs, "LOGITS_BYTES", 16 * V * 4)
    generator = torch.Generator().manual_seed(0)
    targets, sample = torch.randint(0, V, (N,), generator=generator), torch.arange(N) // 64
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    if kind.startswith("logits"):
        source = {"logits": (hidden @ weight.T).requires_grad_()}
        source["logits"] = source["logits"].view(N, V)  # not a leaf, and no copy of one
        gradients = 0 if kind == "logits in place" else 4 * N * V
    else:
        source = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_("frozen" not in kind)}
        gradients = 4 * (N * D + (0 if "frozen" in kind else V * D))
    stream = TokenStream(targets=targets, sample=sample, **source)
    leaf = source.get("logits", hidden)
    advantages = torch.linspace(-1, 1, 8)

    def step() -> None:
        loss = grpo_loss([stream], advantages, inplace=kind == "logits in place", impl="native").loss
        torch.autograd.grad(loss, [t for t in source.values() if t.requires_grad])

    chunk = 0 if leaf is not hidden else linear_logprobs.LOGITS_BYTES
    per_token = 4 * N * 40
    assert chunk + gradients <= peak_bytes(step) <= gradients + 1.5 * chunk + per_token


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_normaliser_of_the_whole_step_is_passed_on(loss_type: LossType) -> None:
    options = {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    streams = make(old=True)
    whole = check(streams, **options, num_tokens=130, num_samples=50).loss
    tensors = {"num_tokens": torch.tensor(130), "num_samples": torch.tensor(50.0)}
    torch.testing.assert_close(grpo_loss(streams, advantages_of(streams), **options, **tensors).loss, whole)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])  # which averages over each micro-batch
def test_micro_batches_sum_to_the_whole(loss_type: LossType) -> None:
    streams, options = make(old=True, sampling=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    whole = grpo_loss(streams, torch.tensor(ADVANTAGES).double(), **options)
    total = torch.zeros((), dtype=torch.float64)
    for samples in (range(2), range(2, 3), range(3, 5)):
        part = []
        for stream in streams:
            rows = [n for n, s in enumerate(stream.sample.tolist()) if s in samples]
            per_token = ("targets", "sample", "hidden", "ref_logprob", "old_logprob", "sampling_logprob")
            mine = replace(stream, **{field: getattr(stream, field)[rows] for field in per_token})
            part.append(replace(mine, sample=mine.sample - samples[0]))
        advantages = torch.tensor([ADVANTAGES[s] for s in samples]).double()
        total = total + grpo_loss(part, advantages, **options, num_tokens=13, num_samples=5).loss
    torch.testing.assert_close(total, whole.loss, rtol=0, atol=1e-12)
    for o, e in zip(gradients(total, streams), gradients(whole.loss, streams), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=1e-12)


def test_two_streams_share_one_normaliser() -> None:
    """6 text and 7 image tokens: not the mean of the two streams' means."""
    streams, advantages = make(), torch.tensor(ADVANTAGES).double()
    both = grpo_loss(streams, advantages, beta=0.1)
    text, image = (grpo_loss([stream], advantages, beta=0.1) for stream in streams)
    torch.testing.assert_close(both.loss, (6 * text.loss + 7 * image.loss) / 13, rtol=0, atol=1e-12)
    expected = [6 / 13 * g for g in gradients(text.loss, streams[:1])]
    expected += [7 / 13 * g for g in gradients(image.loss, streams[1:])]
    for o, e in zip(gradients(both.loss, streams), expected, strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=1e-12)


def logits_stream(N: int, V: int, sample: list[int], dtype: torch.dtype = torch.float64, **more: Any) -> TokenStream:
    generator = torch.Generator().manual_seed(N)
    logits = (2 * torch.randn(N, V, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    return TokenStream(targets=targets, sample=torch.tensor(sample), logits=logits, **more)


class TestOnPolicy:
    """One update per rollout: ratio 1, and the policy gradient -A·∇lp / N."""

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_gradient_is_that_of_the_log_prob(self, loss_type: LossType) -> None:
        sample, A = [0, 0, 1, 1], torch.tensor([1.5, -0.5]).double()  # equal lengths: every mean is over 4 tokens
        stream = logits_stream(4, 9, sample, temperature=0.7)
        options = {**options_for(loss_type), "max_completion_length": 2}
        result = grpo_loss([stream], A, **options)
        p = (stream.logits.detach() / 0.7).softmax(-1)
        label = torch.nn.functional.one_hot(stream.targets, 9)
        expected = -A[stream.sample, None] / 4 * (label - p) / 0.7
        torch.testing.assert_close(torch.autograd.grad(result.loss, stream.logits)[0], expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "cispo"])
    def test_ratio_is_exactly_one_and_nothing_is_clipped(self, loss_type: LossType) -> None:
        streams = [logits_stream(5, 9, [0, 0, 1, 1, 1], torch.float32, name="text")]
        streams += [logits_stream(6, 17, [0, 1, 0, 1, 0, 1], torch.float32, name="image")]
        result = grpo_loss(
            streams, torch.tensor([2.0, 2.0]), **{**OPTIONS, "max_completion_length": 1}, loss_type=loss_type
        )
        for name in ("text", "image"):
            assert result.metrics[f"{name}/ratio_max"] == 1
            assert result.metrics[f"{name}/clip_ratio/low"] == result.metrics[f"{name}/clip_ratio/high"] == 0
        expected = -2.0 * 11 / 2 if loss_type == "dr_grpo" else -2.0
        torch.testing.assert_close(result.loss, torch.tensor(expected))

    def test_zero_advantage_gives_exactly_zero_gradient(self) -> None:
        for loss_type in LOSS_TYPES:
            stream = logits_stream(4, 9, [0, 1, 0, 1], torch.float32)
            loss = grpo_loss([stream], torch.tensor([0.0, 1.0]), **options_for(loss_type)).loss
            gradient = torch.autograd.grad(loss, stream.logits)[0]
            assert gradient[::2].eq(0).all() and gradient[1::2].ne(0).all()


class TestMetrics:
    def test_clip_ratios_count_only_tokens_whose_gradient_is_clipped(self) -> None:
        # by RATIOS and ADVANTAGES: low counts with A < 0, high with A > 0
        metrics = grpo_loss(make(old=True), torch.tensor(ADVANTAGES).double(), **OPTIONS).metrics
        expected = {
            "text/clip_ratio/low": 0.0,
            "text/clip_ratio/high": 2 / 6,
            "image/clip_ratio/low": 2 / 7,
            "image/clip_ratio/high": 0.0,
        }
        assert {key: metrics[key].item() for key in expected} == pytest.approx(expected)
        assert metrics["text/ratio_max"].item() == pytest.approx(2.5)
        cispo = grpo_loss(make(old=True), torch.tensor(ADVANTAGES).double(), **options_for("cispo")).metrics
        assert cispo["text/clip_ratio/high"].item() == pytest.approx(2 / 6), "a third ratio above the bound has A < 0"

    def test_gspo_has_one_ratio_for_all_tokens_of_a_sample(self) -> None:
        metrics = grpo_loss(make(old=True), torch.tensor(ADVANTAGES).double(), **options_for("gspo")).metrics
        # sample 1 of both streams has the largest
        largest = (1.5 * 1.1 * 2.5) ** (1 / 3)
        assert metrics["text/ratio_max"].item() == pytest.approx(largest)
        assert metrics["image/ratio_max"].item() == pytest.approx(largest)
        assert metrics["text/clip_ratio/high"].item() == pytest.approx(3 / 6)  # sample 2
        assert metrics["image/clip_ratio/low"].item() == pytest.approx(3 / 7)  # sample 3

    def test_means_over_each_streams_tokens(self) -> None:
        streams = make(old=True, sampling=True)
        result = grpo_loss(streams, torch.tensor(ADVANTAGES).double(), beta=0.1, kl_estimator="k1")
        for stream, logprob in zip(streams, result.logprobs, strict=True):
            rows = [row_stats(stream, n) for n in range(len(stream.targets))]
            torch.testing.assert_close(logprob, torch.stack([lp.detach() for lp, _ in rows]))
            expected = {
                "kl": sum(lp.item() - r.item() for (lp, _), r in zip(rows, stream.ref_logprob, strict=True)),
                "entropy": sum(entropy.item() for _, entropy in rows),
                "sampling_ratio": sum(SAMPLING_RATIOS[: len(rows)]),  # before the bound
            }
            for key, total in expected.items():
                value = result.metrics[f"{stream.name}/{key}"]
                assert value.item() == pytest.approx(total / len(rows), rel=1e-6) and not value.requires_grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_in_equal_hidden_in(dtype: torch.dtype, loss_type: LossType) -> None:
    streams, options = make(dtype, old=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    with_logits = [
        replace(s, logits=torch.nn.functional.linear(s.hidden, s.weight, s.bias), hidden=None, weight=None, bias=None)
        for s in streams
    ]
    advantages = advantages_of(streams)
    ours, expected = (grpo_loss(s, advantages, **options).loss for s in (with_logits, streams))
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype])
    for o, e in zip(gradients(ours, streams), gradients(expected, streams), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("w", [5.0, 0.3])
def test_guided_policy_sends_w_and_1_minus_w_to_its_two_branches(w: float, impl: str) -> None:
    """The head on w·h_c + (1-w)·h_u is the guided logits: same loss, and w·g, (1-w)·g for the branches."""
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
    ours = grpo_loss([replace(base, hidden=mixed)], advantages, **options).loss
    to_cond, to_uncond, to_mixed = torch.autograd.grad(ours, [cond, uncond, mixed])
    torch.testing.assert_close(to_cond, w * to_mixed, rtol=0, atol=atol)
    torch.testing.assert_close(to_uncond, (1 - w) * to_mixed, rtol=0, atol=atol)

    logits_c, logits_u = (torch.nn.functional.linear(h, base.weight, base.bias) for h in (cond, uncond))
    guided = logits_u + w * (logits_c - logits_u)
    headless = replace(base, logits=guided, hidden=None, weight=None, bias=None)
    expected = grpo_loss([headless], advantages, **options).loss
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    of_guided, of_cond, of_uncond, h_c, h_u = torch.autograd.grad(expected, [guided, logits_c, logits_u, cond, uncond])
    torch.testing.assert_close(of_cond, w * of_guided, rtol=0, atol=atol)
    torch.testing.assert_close(of_uncond, (1 - w) * of_guided, rtol=0, atol=atol)
    torch.testing.assert_close((h_c, h_u), (to_cond, to_uncond), rtol=0, atol=10 * atol)


def test_entropy_gradient_is_not_zero_and_raises_entropy() -> None:
    stream = logits_stream(4, 9, [0, 0, 1, 1], torch.float32, temperature=1.3)
    loss = grpo_loss([stream], torch.zeros(2), entropy_coef=0.5).loss
    logp = (stream.logits.detach().double() / 1.3).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    expected = 0.5 * logp.exp() * (logp + entropy) / 1.3 / 4  # -d(mean entropy)
    gradient = torch.autograd.grad(loss, stream.logits)[0]
    assert gradient.abs().min() > 0
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(loss, (-0.5 * entropy.mean()).float())


def test_frozen_weights_get_no_gradient() -> None:
    streams, advantages = make(old=True), torch.tensor(ADVANTAGES).double()
    hidden = [s.hidden for s in streams]
    expected = torch.autograd.grad(grpo_loss(streams, advantages, beta=0.1).loss, hidden)
    frozen = [replace(s, weight=s.weight.detach(), bias=s.bias.detach()) for s in streams]
    grpo_loss(frozen, advantages, beta=0.1).loss.backward()
    assert all(s.weight.grad is None and s.bias.grad is None for s in frozen)
    torch.testing.assert_close(tuple(h.grad for h in hidden), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_stream_without_tokens_changes_nothing(loss_type: LossType) -> None:
    streams, options = make(old=True, sampling=True), {**options_for(loss_type), "beta": 0.1, "entropy_coef": 0.1}
    advantages, full = torch.tensor(ADVANTAGES).double(), streams[0]
    nothing = torch.empty(0, dtype=torch.float64)
    empty = replace(
        streams[1],
        targets=nothing.long(),
        sample=nothing.long(),
        hidden=nothing.view(0, 4).requires_grad_(),
        **dict.fromkeys(("ref_logprob", "old_logprob", "sampling_logprob"), nothing),
    )
    result, alone = grpo_loss([full, empty], advantages, **options), grpo_loss([full], advantages, **options)
    assert torch.equal(result.loss, alone.loss)
    assert all(value.isfinite() for value in result.metrics.values())
    result.loss.backward()
    assert empty.hidden.grad.shape == (0, 4) and empty.weight.grad.eq(0).all()
    assert grpo_loss([empty], advantages, **options).loss == 0


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_rewards_in_equal_advantages_in(shape: tuple[int, ...]) -> None:
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stream = logits_stream(6, 9, [0, 1, 1, 2, 3, 3])
    ours = grpo_loss([stream], rewards, group_size=2).loss
    assert torch.equal(ours, grpo_loss([stream], group_advantages(rewards, 2)).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_advantages_of_any_dtype_count_tokens_exactly(dtype: torch.dtype) -> None:
    stream = logits_stream(1003, 3, [0] * 1003, torch.float32)  # 1003 rounds to 1004 in bfloat16
    for loss_type in LOSS_TYPES:
        options = options_for(loss_type)
        ours = grpo_loss([stream], torch.tensor([2]).to(dtype), **options).loss
        assert torch.equal(ours, grpo_loss([stream], torch.tensor([2.0]), **options).loss)


def test_same_input_twice_gives_the_same_bits() -> None:
    streams, results = make(torch.float32, old=True, sampling=True), []
    for _ in range(2):
        loss = grpo_loss(streams, torch.tensor(ADVANTAGES), beta=0.1, loss_type="gspo").loss
        results.append([loss, *gradients(loss, streams)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


STREAM = logits_stream(3, 5, [0, 1, 1], name="text")
ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("stream", "advantages", "options", "message"),
    [
        (STREAM, ONES, {"loss_type": "ppo"}, "loss_type='ppo' is unknown; use one of grpo, dr_grpo, bnpo"),
        (STREAM, ONES, {"kl_estimator": "k4"}, "kl_estimator='k4' is unknown; use one of k1, k2, k3"),
        (STREAM, ONES, {"loss_type": "dr_grpo"}, "loss_type='dr_grpo' divides by max_completion_length: give it"),
        (STREAM, ONES, {"loss_type": "cispo"}, "loss_type='cispo' clips its weights at epsilon_high: give it"),
        (STREAM, ONES, {"beta": 0.1}, "beta=0.1 needs ref_logprob in stream 'text'"),
        (STREAM, torch.ones(2, 3), {}, r"advantages must be \[S\], got \(2, 3\); for rewards give group_size too"),
        (STREAM, ONES.to("meta"), {}, "advantages are on meta, the streams on cpu"),
        (STREAM, torch.ones(3), {"group_size": 2}, "3 rewards cannot be split into groups of group_size=2"),
        (replace(STREAM, logits=None), ONES, {}, "stream 'text' needs either logits, or hidden and weight"),
        (replace(STREAM, hidden=torch.ones(3, 4)), ONES, {}, "stream 'text' needs either logits, or hidden and weight"),
        (replace(STREAM, bias=torch.ones(5)), ONES, {}, "stream 'text' needs either logits, or hidden and weight"),
        (
            replace(STREAM, logits=None, hidden=torch.ones(3, 4)),
            ONES,
            {},
            "stream 'text' needs either logits, or hidden and weight",
        ),
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


def test_streams_of_one_name_would_lose_metrics() -> None:
    with pytest.raises(ValueError, match=r"streams need names of their own.*got \['text', 'text'\]"):
        grpo_loss([STREAM, STREAM], ONES)


TRUE_SHAPES = [(4608, 16384, 4096), (2048, 102400, 4096), (4608, 16384, 2048), (2048, 102400, 2048)]  # N, V, D


def true_stream(N: int, V: int, D: int) -> TokenStream:
    generator = torch.Generator("cuda").manual_seed(0)
    kwargs = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    return TokenStream(
        targets=torch.randint(0, V, (N,), device="cuda", generator=generator),
        sample=torch.arange(N, device="cuda") * 8 // N,
        hidden=torch.randn(N, D, **kwargs).requires_grad_(),
        weight=(2 * torch.randn(V, D, **kwargs) / math.sqrt(D)).requires_grad_(),
        ref_logprob=torch.full((N,), -math.log(V), device="cuda"),
    )


@gpu
@pytest.mark.parametrize(("N", "V", "D"), TRUE_SHAPES)
class TestTrueShapes:
    def test_no_worse_than_the_reference(self, N: int, V: int, D: int) -> None:
        stream = true_stream(N, V, D)
        advantages = torch.linspace(-1, 1, 8, device="cuda")
        options: dict[str, Any] = {"beta": 0.01, "to": "cuda"}  # gigabytes are compared where they are
        gt = outcome(converted([stream], torch.float64), advantages.double(), impl="torch", **options)
        eager = outcome(converted([stream], torch.bfloat16), advantages, impl="torch", **options)
        ours = outcome(converted([stream], torch.bfloat16), advantages, impl="triton", **options)
        for name, value in ours.items():
            relative = 2 * BFLOAT16_ROUNDING if "gradient" in name else 1e-4
            assert_no_worse(name, value, eager[name], gt[name], relative, 1e-6, elementwise="gradient" not in name)

    def test_peak_memory(self, N: int, V: int, D: int) -> None:
        stream, advantages = true_stream(N, V, D), torch.linspace(-1, 1, 8, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grpo_loss([stream], advantages, beta=0.01, impl="triton").loss.backward()
        gradients = 2 * N * D + 2 * V * D + 4 * V * D  # hidden's, the weight's, and its float32 sums
        assert torch.cuda.max_memory_allocated() - before <= gradients + 110 * 2**20


@gpu
def test_nothing_waits_for_the_device_and_nothing_compiles_again() -> None:
    """Other lengths, temperatures, weights and bounds run the kernels that are there."""
    from triton import knobs

    def step(N: int, beta: float, epsilon: float, temperature: float) -> None:
        streams = [replace(s, temperature=temperature) for s in prepared[N]]
        grpo_loss(streams, advantages, beta=beta, epsilon=epsilon, entropy_coef=beta, impl="triton").loss.backward()

    advantages = torch.tensor(ADVANTAGES).cuda()
    prepared = {
        N: converted(random_streams(0, torch.bfloat16, [(N, 70)], 5, "normal", False, False, True, True), "cuda")
        for N in (17, 48, 1000)
    }
    step(17, 0.1, 0.2, 0.7)
    compiled: list[str] = []
    knobs.compilation.listener = lambda **event: compiled.append(str(event.get("src")))
    try:
        with no_host_sync():
            step(48, 0.2, 0.3, 1.0)
            step(1000, 0.3, 0.1, 1.3)
    finally:
        knobs.compilation.listener = None
    assert not compiled


@gpu
@pytest.mark.parametrize("logits", [True, False])
def test_more_rows_than_a_grid_dimension_other_than_the_first_holds(logits: bool) -> None:
    streams = random_streams(0, torch.float32, [(70_000, 33)], 5, "normal", logits, False, True, False)
    advantages = torch.tensor(ADVANTAGES).cuda()
    expected = outcome(converted(streams, "cuda"), advantages, **OPTIONS, impl="torch")
    ours = outcome(converted(streams, "cuda"), advantages, **OPTIONS, impl="triton")
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
