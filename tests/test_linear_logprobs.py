"""linear_logprobs against a GEMM, exp and log in float64, and never worse than the same in the tested dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    BFLOAT16_ROUNDING,
    IMPLEMENTATIONS,
    KERNELS,
    assert_no_worse,
    device,
    needs_native,
    peak_bytes,
    poisoned_outputs,
)
from torch import Tensor

from bicot.kernels import linear_logprobs as module
from bicot.kernels.linear_logprobs import linear_logprobs
from bicot.kernels.token_logprobs import TokenStats

# (outputs, gradients), relative to the reference's norm, beyond what the same formula in the tested dtype loses:
# sums in another order; a bfloat16 gradient of the logits is rounded once more on its way into the GEMM
TOLERANCE = {torch.float64: (1e-14, 1e-13), torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 2 * BFLOAT16_ROUNDING)}
SHAPES = [(1, 1, 1), (5, 3, 2), (7, 33, 257), (3, 64, 1000), (0, 8, 11)]  # N, D, V


def formula(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> TokenStats:
    """The softmax written out. In float64 it is exact; in a lower dtype the logits are rounded."""
    logits = F.linear(hidden, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    z = z - z.max(-1, keepdim=True).values.detach()
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    lse = z.exp().sum(-1).log()
    return TokenStats(z[torch.arange(len(z)), targets] - lse, lse - (p * z).sum(-1))


def make(N: int, D: int, V: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets; logits differ by a few units, so that all of them matter."""
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, D, generator=generator)
    weight = 2 * torch.randn(V, D, generator=generator) / math.sqrt(D)
    bias = torch.randn(V, generator=generator)
    if kind == "peaked":
        bias[V // 2] += 30
    if kind == "negative":
        bias -= 100
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def run(
    op: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, **more: str
) -> list[Tensor]:
    """logprob, entropy and the gradients of a loss with other weights for both outputs of every token."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    if op is formula:
        stats = formula(leaves[0], leaves[1], targets, leaves[2], temperature)
    else:
        stats = op(leaves[0], leaves[1], targets, bias=leaves[2], temperature=temperature, **more)
    n = torch.arange(1.0, len(hidden) + 1, dtype=stats.logprob.dtype, device=hidden.device)
    (n.cos() * stats.logprob + n.sin() * stats.entropy).sum().backward()
    return [
        t.cpu() for t in (stats.logprob.detach(), stats.entropy.detach(), *(t.grad for t in leaves if t is not None))
    ]


def on(impl: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device(impl)) for t in tensors]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["normal", "peaked", "negative"])
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_no_worse_than_the_formula(
    N: int, D: int, V: int, kind: str, with_bias: bool, dtype: torch.dtype, impl: str
) -> None:
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("the kernels take no float64")
    hidden, weight, bias, targets = make(N, D, V, dtype, kind)
    inputs = (hidden, weight, bias if with_bias else None)
    exact = run(formula, *(None if t is None else t.double() for t in inputs), targets, 0.7)
    eager = run(formula, *inputs, targets, 0.7)
    with poisoned_outputs():
        ours = run(linear_logprobs, *on(impl, *inputs, targets), 0.7, impl=impl)
    for i, (g, e, o) in enumerate(zip(exact, eager, ours, strict=True)):
        tolerance = TOLERANCE[dtype][i > 1]
        assert_no_worse(str(i), o, e, g, tolerance, tolerance)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows(dtype: torch.dtype, impl: str) -> None:
    """Few or no whole 16 bytes."""
    for V in range(1, 18):
        test_no_worse_than_the_formula(5, 3, V, "normal", True, dtype, impl)


def test_bfloat16_stays_within_the_rounding_of_its_logits() -> None:
    hidden, weight, bias, targets = make(7, 33, 257, torch.bfloat16)
    ours = linear_logprobs(hidden, weight, targets, bias=bias)
    exact = formula(hidden.double(), weight.double(), targets, bias.double(), 1.0)
    largest = (hidden.double() @ weight.double().T + bias).abs().max()
    # 2^-9 relative for the target's logit and at most as much for the log-sum-exp
    assert (ours.logprob - exact.logprob).abs().max() <= 2 * 2**-9 * largest
    assert ours.logprob.dtype == ours.entropy.dtype == torch.float32


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_against_finite_differences(with_bias: bool) -> None:
    hidden, weight, bias, targets = make(3, 4, 6, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, *([bias] if with_bias else []))]
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: tuple(linear_logprobs(h, w, targets, bias=b, temperature=1.3)), leaves
    )


@pytest.mark.parametrize("impl", KERNELS)
class TestSlices:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tokens", [1, 3, 10, 11])  # one at a time, a shorter last slice, all at once
    def test_slices_equal_the_whole(
        self, tokens: int, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = on(impl, *make(10, 16, 37, dtype))
        # multiples of 1/2, so that a matrix product of fewer tokens gives the same logits
        hidden, weight, bias = (t.mul(2).round() / 2 for t in inputs[:3])
        whole = run(linear_logprobs, hidden, weight, bias, inputs[3], 0.7, impl=impl)
        sizes, launch = [], module.launch_forward
        monkeypatch.setattr(module, "LOGITS_BYTES", (tokens * 37 + 36) * hidden.element_size())
        monkeypatch.setattr(module, "launch_forward", lambda x, *a: sizes.append(len(x)) or launch(x, *a))
        sliced = run(linear_logprobs, hidden, weight, bias, inputs[3], 0.7, impl=impl)
        assert sum(sizes) == 10 and max(sizes) <= tokens and len(sizes) == -(-10 // tokens)
        for s, w in zip(sliced, whole, strict=True):
            tolerance = 2 * BFLOAT16_ROUNDING if s.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(s, w, rtol=tolerance, atol=2e-6)

    def test_a_token_with_more_logits_than_fit_is_alone(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden, weight, _, targets = make(3, 4, 11, torch.float32)
        monkeypatch.setattr(module, "LOGITS_BYTES", 5)
        exact = formula(hidden, weight, targets, None, 1.0)
        ours = linear_logprobs(*on(impl, hidden, weight, targets), impl=impl)
        torch.testing.assert_close(tuple(t.cpu() for t in ours), tuple(exact), rtol=0, atol=2e-6)

    def test_a_bad_target_is_named_by_its_index(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if device(impl) == "cuda":
            pytest.skip("a device assertion, which ends the process's CUDA context")
        monkeypatch.setattr(module, "LOGITS_BYTES", 88)
        hidden, weight, _, targets = make(9, 4, 11, torch.float32)
        targets[7] = 11
        with pytest.raises(ValueError, match=r"targets must be in \[0, 11\): targets\[7\] = 11"):
            linear_logprobs(hidden, weight, targets, impl=impl)


@pytest.mark.parametrize("N", [0, 1, 15, 16, 17, 1000, 4608])
@pytest.mark.parametrize("V", [5, 16384, 102400])
def test_slices_cover_every_token_once_and_fit(N: int, V: int) -> None:
    hidden, weight = torch.empty(N, 1, dtype=torch.bfloat16), torch.empty(V, 1)
    slices = list(module.token_slices(hidden, weight))
    assert [i for s in slices for i in range(N)[s]] == list(range(N))
    assert all((s.stop - s.start) * V * 2 <= module.LOGITS_BYTES for s in slices)
    assert len(slices) <= -(-N * V * 2 // module.LOGITS_BYTES) + 1


@needs_native
def test_no_logits_outlive_their_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory: leaves, gradients and one slice of logits of 32."""
    N, D, V = 512, 8, 4096
    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * V * 4)
    hidden, weight, _, targets = make(N, D, V, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    peak = peak_bytes(lambda: sum(linear_logprobs(hidden, weight, targets, impl="native")).sum().backward())
    fixed = 4 * (N * D + 2 * V * D + 32 * N)  # gradients, the float32 sums of the weight's, per-token results
    assert module.LOGITS_BYTES < peak <= fixed + 1.5 * module.LOGITS_BYTES


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl: str) -> None:
    hidden, weight, bias, targets = on(impl, *make(5, 8, 11, torch.float32))
    ops = torch.ops.bicot
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    torch.library.opcheck(ops.linear_logprobs.default, (*leaves, targets, 0.7, impl))
    _, entropy, lse = ops.linear_logprobs(hidden, weight, bias, targets, 0.7, impl)
    gradients = torch.ones_like(entropy), torch.ones_like(entropy)
    for needed in ([True, True, True], [True, False, False]):
        inputs = (*gradients, hidden, weight, bias, targets, entropy, lse, 0.7, needed, impl)
        torch.library.opcheck(ops.linear_logprobs_backward.default, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_without_a_graph_break(impl: str) -> None:
    inputs = on(impl, *make(5, 8, 11, torch.float32))
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, *inputs, 0.7, impl=impl), run(linear_logprobs, *inputs, 0.7, impl=impl))


def test_no_tokens() -> None:
    hidden, weight, bias, targets = make(0, 4, 11, torch.float32)
    stats = linear_logprobs(hidden, weight, targets, bias=bias)
    assert stats.logprob.shape == stats.entropy.shape == (0,) and stats.logprob.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(trained: str, impl: str) -> None:
    hidden, weight, bias, targets = on(impl, *make(5, 8, 11, torch.float32))
    everything = run(linear_logprobs, hidden, weight, bias, targets, 1.0, impl=impl)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs[trained].requires_grad_()
    stats = linear_logprobs(hidden, weight, targets, bias=bias, impl=impl)
    n = torch.arange(1.0, 6.0, device=hidden.device)
    (n.cos() * stats.logprob + n.sin() * stats.entropy).sum().backward()
    for (name, tensor), expected in zip(inputs.items(), everything[2:], strict=True):
        if name == trained:
            torch.testing.assert_close(tensor.grad.cpu(), expected, rtol=0, atol=1e-6)
        else:
            assert tensor.grad is None


H, W, TARGETS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "kwargs", "message"),
    [
        (H[0], W, TARGETS, {}, r"hidden must be \[N, D\] and weight \[V, D\], got \(3,\), \(5, 3\)"),
        (H, W[:, :2], TARGETS, {}, r"hidden must be \[N, D\] and weight \[V, D\], got \(2, 3\), \(5, 2\)"),
        (H, W.double(), TARGETS, {}, "hidden is torch.float32 on cpu, weight is torch.float64 on cpu"),
        (H, W.to("meta"), TARGETS, {}, "hidden is torch.float32 on cpu, weight is torch.float32 on meta"),
        (H, W, TARGETS, {"bias": torch.zeros(1)}, r"bias must be \[5\] torch.float32 on cpu .* got \[1\]"),
        (H, W, TARGETS, {"bias": torch.zeros(5).double()}, r"bias must be .* got \[5\] torch.float64 on cpu"),
        (H, W, TARGETS[:1], {}, r"targets must be \[N\] = \[2\] to match hidden, got \[1\]"),
        (H, W, TARGETS[:, None], {}, r"targets must be \[N\] = \[2\] to match hidden, got \[2, 1\]"),
        (H, W, TARGETS.int(), {}, "targets must be int64 on cpu, got torch.int32 on cpu"),
        (H, W, TARGETS + 5, {}, r"targets must be in \[0, 5\): targets\[0\] = 5"),
        (H, W, TARGETS - 1, {}, r"targets must be in \[0, 5\): targets\[0\] = -1"),
        (H, W, TARGETS, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_bad_input_is_named(
    hidden: Tensor, weight: Tensor, targets: Tensor, kwargs: dict, message: str, grad: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprobs(hidden.clone().requires_grad_(grad), weight, targets, **kwargs)
