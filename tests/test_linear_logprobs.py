"""linear_logprobs against a GEMM, exp and log in float64, and never worse than the same in the tested dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bicot.kernels import linear_logprobs as module
from bicot.kernels.linear_logprobs import linear_logprobs
from bicot.kernels.token_logprobs import TokenStats

# (outputs, gradients), relative to the reference's norm, beyond what the same formula in the tested dtype loses:
# sums in another order; a bfloat16 gradient of the logits is rounded once more on its way into the GEMM
TOLERANCE = {torch.float64: (1e-14, 1e-13), torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 4e-3)}
SHAPES = [(1, 1, 1), (5, 3, 2), (7, 33, 257), (3, 64, 1000), (0, 8, 11)]  # N, D, V


def formula(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> TokenStats:
    """Softmax over all columns by hand: in float64 the truth; in a lower dtype the logits are rounded to it."""
    logits = F.linear(hidden, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    z = z - z.max(-1, keepdim=True).values.detach()
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    lse = z.exp().sum(-1).log()
    return TokenStats(z[torch.arange(len(z)), targets] - lse, lse - (p * z).sum(-1))


def make(N: int, D: int, V: int, dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets; logits spread over a few units, so that every column counts."""
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
    op: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> list[Tensor]:
    """logprob, entropy and the gradients of a loss that weighs every row's two outputs differently."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    if op is formula:
        stats = formula(leaves[0], leaves[1], targets, leaves[2], temperature)
    else:
        stats = op(leaves[0], leaves[1], targets, bias=leaves[2], temperature=temperature)
    rows = torch.arange(1.0, len(hidden) + 1, dtype=stats.logprob.dtype)
    (rows.cos() * stats.logprob + rows.sin() * stats.entropy).sum().backward()
    return [stats.logprob.detach(), stats.entropy.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["normal", "peaked", "negative"])
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_no_worse_than_the_formula(N: int, D: int, V: int, kind: str, with_bias: bool, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = make(N, D, V, dtype, kind)
    inputs = (hidden, weight, bias if with_bias else None)
    exact = run(formula, *(None if t is None else t.double() for t in inputs), targets, 0.7)
    eager, ours = run(formula, *inputs, targets, 0.7), run(linear_logprobs, *inputs, targets, 0.7)
    for i, (g, e, o) in enumerate(zip(exact, eager, ours, strict=True)):
        assert o.dtype == e.dtype and o.shape == e.shape
        tolerance = TOLERANCE[dtype][i > 1] * max(g.norm(), len(g) ** 0.5)
        assert (o.double() - g).norm() <= (e.double() - g).norm() + tolerance, i
        # one bad element must not hide in the norm
        worst = (e.double() - g).abs().max() if g.numel() else 0.0
        assert ((o.double() - g).abs() <= 2 * worst + TOLERANCE[dtype][i > 1] * (g.abs() + 1)).all(), i


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


class TestWithoutGradient:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("rows", [1, 3, 10, 11])  # one at a time, a ragged last chunk, all at once
    def test_chunks_equal_the_whole(self, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden, weight, bias, targets = make(10, 16, 37, dtype)
        whole = linear_logprobs(hidden.requires_grad_(), weight, targets, bias=bias, temperature=0.7)
        assert whole.logprob.requires_grad
        sizes, op = [], module.token_logprobs
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", rows * 37 + 36)
        monkeypatch.setattr(module, "token_logprobs", lambda x, *a, **k: sizes.append(len(x)) or op(x, *a, **k))
        with torch.no_grad():
            chunked = linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7)
        assert sizes == [min(rows, 10 - start) for start in range(0, 10, rows)]
        # a GEMM of fewer rows may sum in another order, which moves a bfloat16 logit by one rounding
        atol = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7 * 8}[dtype]
        torch.testing.assert_close(chunked, TokenStats(*(t.detach() for t in whole)), rtol=0, atol=atol)
        assert not chunked.logprob.requires_grad and chunked.logprob.shape == (10,)

    def test_a_row_wider_than_a_chunk_goes_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden, weight, _, targets = make(3, 4, 11, torch.float64)
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 5)
        exact = formula(hidden, weight, targets, None, 1.0)
        torch.testing.assert_close(linear_logprobs(hidden, weight, targets), exact, rtol=0, atol=1e-13)

    def test_no_tokens(self) -> None:
        hidden, weight, bias, targets = make(0, 4, 11, torch.float32)
        stats = linear_logprobs(hidden, weight, targets, bias=bias)
        assert stats.logprob.shape == stats.entropy.shape == (0,) and stats.logprob.dtype == torch.float32

    def test_a_bad_target_is_named_by_its_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 22)
        hidden, weight, _, targets = make(9, 4, 11, torch.float32)
        targets[7] = 11
        with pytest.raises(ValueError, match=r"targets must be in \[0, 11\): targets\[7\] = 11"):
            linear_logprobs(hidden, weight, targets)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(trained: str) -> None:
    hidden, weight, bias, targets = make(5, 8, 11, torch.float64)
    everything = run(linear_logprobs, hidden, weight, bias, targets, 1.0)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs[trained].requires_grad_()
    stats = linear_logprobs(hidden, weight, targets, bias=bias)
    rows = torch.arange(1.0, 6.0, dtype=torch.float64)
    (rows.cos() * stats.logprob + rows.sin() * stats.entropy).sum().backward()
    for (name, tensor), expected in zip(inputs.items(), everything[2:], strict=True):
        if name == trained:
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-14)
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
        (H, W, TARGETS.int(), {}, "targets must be int64, got torch.int32"),
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
