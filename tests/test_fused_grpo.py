"""The kernels of grpo_loss: never worse than the reference, in their own memory, with the same bits again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grpo_streams import (
    ADVANTAGES,
    KINDS,
    KL_ESTIMATORS,
    LOSS_TYPES,
    OPTIONS,
    advantages_of,
    converted,
    leaves,
    logits_stream,
    make,
    options_for,
    random_streams,
    weighted,
)
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
    compiles_nothing,
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
from bicot.kernels.grpo_loss import LossType, TokenStream, grpo_loss

# (relative, absolute), beyond what the reference loses in the same dtype: sums in another order and, in bfloat16, a
# gradient of the logits that is rounded once, where autograd rounds at other steps
TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.bfloat16: (2 * BFLOAT16_ROUNDING, 1e-6)}


def outcome(
    streams: list[TokenStream],
    advantages: Tensor,
    impl: str,
    dtype: torch.dtype | None = None,
    on: str | None = None,
    layout: Callable[[Tensor], Tensor] = torch.clone,
    **options: Any,
) -> dict[str, Tensor]:
    """Loss, metrics, log-probs, and gradients of 0.7 times the loss; on the CPU, or on the device `on`.

    `layout` copies the logits, which an in-place gradient overwrites.
    """
    leaves = converted(streams, on or device(impl))
    leaves = leaves if dtype is None else converted(leaves, dtype)
    used = [s if s.logits is None else replace(s, logits=layout(s.logits)) for s in leaves]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = grpo_loss(used, advantages.to(on or device(impl), wide), impl=impl, **options)
    (0.7 * result.loss).backward()
    found = {"loss": result.loss.detach(), **result.metrics}
    for stream, logprob in zip(leaves, result.logprobs, strict=True):
        found[f"{stream.name}/logprob"] = logprob
        given = {field: getattr(stream, field) for field in ("logits", "hidden", "weight", "bias")}
        found |= {f"{stream.name}/{f} gradient": x.grad for f, x in given.items() if x is not None and x.requires_grad}
    return {name: value.to(on or "cpu") for name, value in found.items()}


def three_ways(streams: list[TokenStream], advantages: Tensor, impl: str, **options: Any) -> list[dict[str, Tensor]]:
    """The outcome of ours, of the reference, and of the reference in float64."""
    ways = ((impl, None), ("torch", None), ("torch", torch.float64))
    return [outcome(streams, advantages, way, dtype, **options) for way, dtype in ways]


def largest_sums(streams: list[TokenStream], advantages: Tensor, **options: Any) -> dict[str, float]:
    """For each gradient of a head and its input: the largest sum of absolute products that one of its elements is the
    sum of. Rounding the gradients of the logits may change an element by a fraction of this, also if they cancel."""
    wide = [
        replace(s, **{n: getattr(s, n).detach() for n in ("hidden", "weight")})
        for s in converted(streams, torch.float64)
    ]
    heads = [(s.hidden, s.weight, None if s.bias is None else s.bias.detach()) for s in wide]
    logits = [torch.nn.functional.linear(*head).requires_grad_() for head in heads]
    given = [replace(s, logits=z, hidden=None, weight=None, bias=None) for s, z in zip(wide, logits, strict=True)]
    found = outcome(given, advantages, "torch", torch.float64, **options)
    sums = {}
    for stream, (hidden, weight, _) in zip(wide, heads, strict=True):
        each = found[f"{stream.name}/logits gradient"].abs()
        sums[f"{stream.name}/hidden gradient"] = each @ weight.abs()
        sums[f"{stream.name}/weight gradient"] = each.T @ hidden.abs()
        sums[f"{stream.name}/bias gradient"] = each.sum(0)
    return {name: x.max().item() if x.numel() else 0.0 for name, x in sums.items()}


@pytest.mark.parametrize("impl", KERNELS)
@settings(max_examples=25 if INTERPRETED or CUDA else 250)  # many compile a kernel on a GPU
@given(data=st.data())
def test_no_worse_than_the_reference(impl: str, data: st.DataObject) -> None:
    draw = data.draw
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    dtype, logits, samples, loss_type = pick(*TOLERANCE), pick(True, False), draw(st.integers(1, 5)), pick(*LOSS_TYPES)
    # in bfloat16 a logit near 1e4 is a multiple of 64
    kind = pick(*(k for k in KINDS if dtype == torch.float32 or k != "offset"))
    shapes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), min_size=1, max_size=2))
    recorded = {name: pick(True, False) for name in ("bias", "old", "sampling")}
    streams = random_streams(draw(st.integers(0, 2**32)), dtype, shapes, samples, kind, logits=logits, **recorded)
    if not logits and pick(True, False):
        streams = [
            replace(s, weight=s.weight.detach(), bias=None if s.bias is None else s.bias.detach()) for s in streams
        ]
    if pick(True, False):
        streams = [weighted(stream) for stream in streams]
    if pick(True, False):
        own = {"beta": (0.0, 0.3), "epsilon": (0.2, 0.15), "epsilon_high": (1.35,), "entropy_coef": (0.0, 0.4)}
        streams = [replace(s, **{name: pick(None, *values) for name, values in own.items()}) for s in streams]
    advantages = torch.tensor([pick(0.0, 1.0, -1.3, 0.4) for _ in range(samples)])
    options: dict[str, Any] = {
        **options_for(loss_type),
        "kl_estimator": pick(*KL_ESTIMATORS),
        "use_bias_correction_kl": pick(True, False),
        "beta": pick(0.0, 0.2),
        "delta": pick(None, 1.4),
        "entropy_coef": pick(0.0, 0.3),
        "num_tokens": pick(None, 23),
        "inplace": logits and pick(True, False),
    }
    with pytest.MonkeyPatch.context() as patch, poisoned_outputs():
        patch.setattr(linear_logprobs, "LOGITS_BYTES", pick(1, 500, 2**20))
        ours, eager, gt = three_ways(streams, advantages, impl, **options)
    assert ours.keys() == eager.keys() == gt.keys()
    sums = {} if logits or dtype == torch.float32 else largest_sums(streams, advantages, **options)
    for name, value in ours.items():
        relative, absolute = TOLERANCE[dtype if "gradient" in name else torch.float32]
        absolute += relative * sums.get(name, 0.0)
        if name.endswith(("/ratio_max", "/kl")):
            # computed from differences of log-probs; one of -40 has an ulp of 4e-6
            logprobs = gt[name.rpartition("/")[0] + "/logprob"].abs()
            ulp = logprobs.amax().item() * torch.finfo(torch.float32).eps if len(logprobs) else 0.0
            relative, absolute = relative + ulp, absolute + ulp
        assert_no_worse(name, value, eager[name], gt[name], relative, absolute)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_short_rows_touch_nothing_around_them(inplace: bool, dtype: torch.dtype, impl: str) -> None:
    """Few or no whole 16 bytes, at any offset from a multiple of 16 bytes. Sample 1 has gradients of zero."""
    for V in range(1, 18):
        for left in range(0, 16 // dtype.itemsize, 3):
            streams = random_streams(V, dtype, [(5, V)])
            advantages, buffers = torch.tensor([1.0, 0.0]), []

            def layout(logits: Tensor, left: int = left, buffers: list = buffers) -> Tensor:
                view, buffer = amid_nan(logits, left)
                buffers.append(buffer)
                return view

            ours, eager, gt = three_ways(streams, advantages, impl, layout=layout, inplace=inplace)
            for name in ("loss", "stream0/logprob", "stream0/logits gradient"):
                assert_no_worse(name, ours[name], eager[name], gt[name], *TOLERANCE[dtype])
            buffer = buffers[0]
            assert buffer.isnan().sum() == buffer.numel() - 5 * V, "something around the rows was written"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("logits", [True, False])
def test_weight_0_silences_a_token_that_is_not_finite(logits: bool, impl: str) -> None:
    (stream,) = random_streams(0, torch.float32, [(4, 9)], logits=logits)
    ref, old = stream.ref_logprob.clone(), stream.old_logprob.clone()
    ref[1], old[2] = 1e3, -1e3  # KL and ratio overflow
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0])
    both = [
        replace(stream, ref_logprob=ref, old_logprob=old, token_weight=weight),
        replace(stream, token_weight=weight),
    ]
    found = []
    for one in both:
        (used,) = converted([one], device(impl))
        advantages = torch.tensor([1.0, -0.7]).to(device(impl))
        grpo_loss([used], advantages, beta=0.1, entropy_coef=0.1, impl=impl).loss.backward()
        found.append((used.logits if logits else used.hidden).grad)
    ours, expected = found
    assert torch.equal(ours, expected) and (ours[1:3] == 0).all() and (ours[::3] != 0).any(1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_nan_logits_give_nan_gradients(loss_type: LossType, impl: str) -> None:
    """Then their norm is NaN too, and the optimizer skips the update."""
    (stream,) = random_streams(0, torch.float32, [(4, 9)])
    logits = stream.logits.detach().clone()
    logits[1, 3] = torch.nan
    (used,) = converted([replace(stream, logits=logits.requires_grad_())], device(impl))
    options: dict[str, Any] = {"loss_type": loss_type, "epsilon_high": 0.28}
    grpo_loss([used], torch.tensor([1.0, -0.7]).to(device(impl)), **options, impl=impl).loss.backward()
    assert used.logits.grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_given_logprobs_get_no_gradient(loss_type: LossType, impl: str) -> None:
    (stream,) = converted(random_streams(0, torch.float32, [(6, 9)], logits=False, sampling=True), device(impl))
    names = ("ref_logprob", "old_logprob", "sampling_logprob")
    given = {name: getattr(stream, name).detach().clone().requires_grad_() for name in names}
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.1, "impl": impl}
    loss = grpo_loss([replace(stream, **given)], torch.tensor([1.0, -0.7]).to(device(impl)), **options).loss
    of_hidden, *others = torch.autograd.grad(loss, [stream.hidden, *given.values()], allow_unused=True)
    assert of_hidden is not None and others == [None] * 3


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, impl: str) -> None:
    """Logits have the dtype of the hidden states."""
    (stream,) = converted(random_streams(0, torch.float32, [(6, 9)], logits=False), device(impl))
    advantages = torch.tensor([1.0, -0.7]).to(device(impl))

    def run() -> list[Tensor]:
        losses = (
            grpo_loss([stream], advantages, beta=0.1, impl=impl).loss,
            linear_logprobs.linear_logprobs(stream.hidden, stream.weight, stream.targets, impl=impl).logprob.sum(),
        )
        return [x for loss in losses for x in (loss, *torch.autograd.grad(loss, [stream.hidden, stream.weight]))]

    expected = run()
    with torch.autocast(stream.targets.device.type, dtype=dtype):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("logits", [True, False])
def test_float16_gradients_are_scaled_before_they_are_rounded(logits: bool, impl: str) -> None:
    """As GradScaler does: most gradients of a mean over 10^6 tokens are below the smallest float16."""
    streams = converted(random_streams(0, torch.float16, [(16, 33)], logits=logits), device(impl))
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
def test_tokens_without_gradient_skip_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    add = linear_logprobs.HeadGradients.add

    def spy(self: Any, tokens: slice, grad_logits: Tensor, active: Tensor | None = None) -> None:
        seen.append(len(grad_logits) if active is None else len(active))
        add(self, tokens, grad_logits, active)

    monkeypatch.setattr(linear_logprobs.HeadGradients, "add", spy)
    streams = make(torch.float32)
    two = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    for used, advantages, options, expected in (
        (streams, two, {}, [3, 3]),  # the tokens of samples 0 and 1
        (streams, two, {"beta": 0.1}, [6, 7]),
        ([weighted(s) for s in streams], torch.ones(5), {"beta": 0.1, "entropy_coef": 0.1}, [4, 4]),
    ):
        seen.clear()
        grpo_loss(used, advantages, **options, impl="native")
        assert seen == expected


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("V", [5, 33, 300])
def test_in_place_gives_the_same_bits(V: int, impl: str) -> None:
    """On a GPU this takes a barrier: threads read logits that others are about to overwrite."""
    streams = random_streams(V, torch.bfloat16, [(4096 if device(impl) == "cuda" else 9, V)])
    options = {"entropy_coef": 0.1, "impl": impl}
    first, second = (outcome(streams, torch.tensor([1.0, -0.7]), inplace=to, **options) for to in (False, True))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_same_input_twice_gives_the_same_bits(loss_type: LossType, impl: str) -> None:
    streams = make(torch.float32, old=True, sampling=True)
    first, second = (outcome(streams, advantages_of(streams), impl, beta=0.1, loss_type=loss_type) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", KERNELS)
class TestOps:
    def test_no_gradient_is_computed_without_grad(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        streams = converted(make(torch.float32), device(impl))
        expected = grpo_loss(streams, advantages_of(streams), impl=impl)
        monkeypatch.setattr(linear_logprobs.HeadGradients, "add", lambda *_: pytest.fail("a product too many"))
        with torch.no_grad():
            result = grpo_loss(streams, advantages_of(streams), impl=impl)
        assert not result.loss.requires_grad and torch.equal(result.loss, expected.loss.detach())

    @pytest.mark.parametrize("logits", [True, False])
    def test_a_second_backward_is_an_error(self, logits: bool, impl: str) -> None:
        stream = logits_stream(4, 9, [0, 1, 0, 1], torch.float32) if logits else make(torch.float32)[0]
        streams = converted([stream], device(impl))
        loss = 2 * grpo_loss(streams, torch.ones(5, device=device(impl)), impl=impl).loss
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
        hidden, weight, advantages = base[0].hidden, base[0].weight, advantages_of(base)
        logits = torch.randn(7, 7).to(hidden.device).requires_grad_()
        for loss_type in ("dapo", "grpo", "gspo"):
            results = []
            for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
                value = function(hidden, weight, logits, advantages, loss_type)
                results.append([value.detach(), *torch.autograd.grad(value, [hidden, weight, logits])])
            torch.testing.assert_close(*results)


@needs_native
@pytest.mark.parametrize("kind", ["logits", "logits in place", "hidden", "hidden, frozen head"])
def test_peak_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the inputs: gradients, a slice of logits, and numbers per token; in place only these numbers."""
    N, D, V = 512, 8, 4096
    monkeypatch.setattr(linear_logprobs, "LOGITS_BYTES", 16 * V * 4)
    generator = torch.Generator().manual_seed(0)
    targets, sample = torch.randint(0, V, (N,), generator=generator), torch.arange(N) // 64
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    if kind.startswith("logits"):
        source = {"logits": hidden.requires_grad_() @ weight.T}  # not a leaf, and no copy of one
        least, gradients = 0, 0 if kind == "logits in place" else 4 * N * V
    else:
        source = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_("frozen" not in kind)}
        least, gradients = linear_logprobs.LOGITS_BYTES, 4 * (N * D + (0 if "frozen" in kind else V * D))
    stream = TokenStream(targets=targets, sample=sample, **source)

    def step() -> None:
        loss = grpo_loss([stream], torch.linspace(-1, 1, 8), inplace=kind == "logits in place", impl="native").loss
        torch.autograd.grad(loss, [t for t in source.values() if t.requires_grad])

    assert least + gradients <= peak_bytes(step) <= gradients + 1.5 * least + 4 * N * 40


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
        ours, eager, gt = three_ways([stream], torch.linspace(-1, 1, 8), "triton", on="cuda", beta=0.01)
        for name, value in ours.items():
            relative = 2 * BFLOAT16_ROUNDING if "gradient" in name else 1e-4
            assert_no_worse(name, value, eager[name], gt[name], relative, 1e-6, elementwise="gradient" not in name)

    def test_peak_memory(self, N: int, V: int, D: int) -> None:
        stream, advantages = true_stream(N, V, D), torch.linspace(-1, 1, 8, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grpo_loss([stream], advantages, beta=0.01, impl="triton").loss.backward()
        gradients = 2 * N * D + 2 * V * D + 4 * V * D  # of hidden and of the weight, and the weight's float32 sums
        assert torch.cuda.max_memory_allocated() - before <= gradients + 110 * 2**20


@gpu
def test_nothing_waits_for_the_device_and_nothing_compiles_again() -> None:
    """Other lengths, temperatures, weights and bounds run the compiled kernels."""

    def step(N: int, beta: float, epsilon: float, temperature: float) -> None:
        streams = [replace(s, temperature=temperature) for s in prepared[N]]
        grpo_loss(streams, advantages, beta=beta, epsilon=epsilon, entropy_coef=beta, impl="triton").loss.backward()

    advantages = torch.tensor(ADVANTAGES).cuda()
    prepared = {
        N: converted(random_streams(0, torch.bfloat16, [(N, 70)], 5, logits=False, sampling=True), "cuda")
        for N in (17, 48, 1000)
    }
    step(17, 0.1, 0.2, 0.7)
    with compiles_nothing(), no_host_sync():
        step(48, 0.2, 0.3, 1.0)
        step(1000, 0.3, 0.1, 1.3)


@gpu
@pytest.mark.parametrize("logits", [True, False])
def test_more_tokens_than_any_but_the_first_dimension_of_a_grid_holds(logits: bool) -> None:
    streams = random_streams(0, torch.float32, [(70_000, 33)], 5, logits=logits)
    expected, ours = (outcome(streams, torch.tensor(ADVANTAGES), i, on="cuda", **OPTIONS) for i in ("torch", "triton"))
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
