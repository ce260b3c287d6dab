"""rms_norm against transformers' LlamaRMSNorm, and its kernels against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    BFLOAT16_ROUNDING,
    IMPLEMENTATIONS,
    INTERPRETED,
    KERNELS,
    NATIVE,
    assert_no_worse,
    device,
    on_threads,
    poisoned_outputs,
)
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bicot.kernels.rms_norm import _add_op, _backward_op, _op, add_rms_norm, rms_norm, rms_norm_ref

EPS = 1e-6
# Float32: the order of the sum. Bfloat16: every rounding is where the reference has it, three of them.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 3 * BFLOAT16_ROUNDING if INTERPRETED else 2**-12}
DTYPES = list(RELATIVE)
SHAPES = [(1, 1), (3, 7), (2, 2048), (5, 1000), (33, 128), (2, 513)]


def inputs(N: int, D: int, dtype: torch.dtype, to: str = "cpu", scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and residual; every element of a token has its own weight and level."""
    generator = torch.Generator().manual_seed(N + D)
    x, residual = torch.randn(2, N, D, generator=generator) * scale
    x = x + scale * torch.linspace(-1, 1, D)
    weight = torch.linspace(0.5, 1.5, D) + torch.randn(D, generator=generator) / 10
    return x.to(to, dtype), weight.to(to, dtype), residual.to(to, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])  # the first is of the size of eps
def test_the_reference_is_transformers_bit_for_bit(scale: float, dtype: torch.dtype) -> None:
    x, weight, residual = inputs(9, 96, dtype, scale=scale)
    layer = LlamaRMSNorm(96, EPS).to(dtype)
    layer.weight.data = weight
    with torch.no_grad():
        assert torch.equal(rms_norm_ref(x, weight, EPS), layer(x))
        expected = residual + x
        assert torch.equal(rms_norm_ref(x, weight, EPS, residual), layer(expected))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_kernels(N: int, D: int, added: bool, dtype: torch.dtype, impl: str) -> None:
    for scale in (1.0, 1e-3, 1e4):
        x, weight, residual = inputs(N, D, dtype, device(impl), scale)
        wide = residual.double() if added else None
        gt = rms_norm_ref(x.double(), weight.double(), EPS, wide)
        theirs, ours = (residual.clone() if added else None for _ in range(2))
        eager = rms_norm_ref(x, weight, EPS, theirs)
        before = x.clone()
        with poisoned_outputs():
            out = rms_norm(x, weight, EPS, ours, impl=impl)
        assert_no_worse("out", out, eager, gt, RELATIVE[dtype], 1e-7)
        if ours is not None and theirs is not None and wide is not None:
            assert_no_worse("residual", ours, theirs, wide, BFLOAT16_ROUNDING if INTERPRETED else 0.0, 0.0)
        assert torch.equal(x, before)


def gradients(
    values: tuple[Tensor, ...], added: bool, impl: str, outputs: str = "both", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Gradients of x, weight and residual, from gradients of the norm, of the sum, or of both."""
    leaves = [v.to(dtype or v.dtype).requires_grad_() for v in values]
    x, weight, residual = leaves
    if added:
        found = list(add_rms_norm(x, residual, weight, EPS, impl=impl))
    else:
        found, leaves = [rms_norm(x, weight, EPS, impl=impl)], leaves[:2]
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(x.shape, generator=generator).to(values[0]).to(x) for _ in found]
    chosen = {"both": slice(None), "norm": slice(1), "sum": slice(1, 2)}[outputs]
    with poisoned_outputs():
        return list(torch.autograd.grad(found[chosen], leaves, given[chosen], allow_unused=True))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("N", "D"), SHAPES[1:])  # with D = 1 the gradient is only rounding error
def test_gradients(N: int, D: int, added: bool, dtype: torch.dtype, impl: str) -> None:
    for scale in (1.0, 1e-3, 1e3):
        values = inputs(N, D, dtype, device(impl), scale)
        gt = gradients(values, added, "torch", dtype=torch.float64)
        eager = gradients(values, added, "torch")
        ours = gradients(values, added, impl)
        for name, *each in zip(("x", "weight", "residual"), ours, eager, gt, strict=False):
            level = each[2].abs().max().item()
            assert_no_worse(name, *each, RELATIVE[dtype], 1e-6 * level, elementwise=dtype == torch.float32)


@pytest.mark.parametrize("impl", KERNELS)
def test_unused_outputs_and_frozen_weights(impl: str) -> None:
    values = inputs(9, 40, torch.float32, device(impl))
    for outputs in ("norm", "sum"):
        both = (gradients(values, True, which, outputs) for which in (impl, "torch"))
        for ours, eager in zip(*both, strict=True):
            assert (ours is None) == (eager is None)
            if ours is not None and eager is not None:
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    x, weight, residual = values
    x.requires_grad_()
    (alone,) = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS, impl=impl)[0].square().sum(), x)
    x, weight, residual = (v.detach().requires_grad_() for v in values)
    every = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS, impl=impl)[0].square().sum(), [x, weight])
    assert torch.equal(alone, every[0]), "with the weight frozen"


@pytest.mark.parametrize("impl", KERNELS)
def test_gradients_of_many_tokens_have_the_same_bits_twice(impl: str) -> None:
    values = inputs(700 if not INTERPRETED else 40, 64, torch.bfloat16, device(impl))
    assert all(map(torch.equal, gradients(values, True, impl), gradients(values, True, impl)))
    empty = tuple(v[:0] if v.ndim == 2 else v for v in values)
    x, weight, residual = gradients(empty, True, impl)
    assert x.shape == residual.shape == (0, 64) and torch.equal(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("impl", [NATIVE])
def test_rounds_where_transformers_rounds(impl: str) -> None:
    """Without one of the roundings, a quarter of all elements would differ."""
    x, weight, residual = inputs(33, 513, torch.bfloat16)
    ours, theirs = residual.clone(), residual.clone()
    same = rms_norm(x, weight, EPS, ours, impl=impl) == rms_norm_ref(x, weight, EPS, theirs)
    assert torch.equal(ours, theirs) and same.float().mean() > 0.999


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_alone(impl: str, dtype: torch.dtype) -> None:
    """Zeros give zeros, NaN stays in its token, and a token has the same bits alone and among others."""
    x, weight, _ = inputs(4, 96, dtype, device(impl))
    x[1], x[2, 40] = 0, torch.nan
    out = rms_norm(x, weight, EPS, impl=impl)
    assert (out[1] == 0).all() and out[2].isnan().all() and not out[[0, 3]].isnan().any()
    assert torch.equal(rms_norm(x[3:], weight, EPS, impl=impl), out[3:])
    assert torch.equal(rms_norm(x.T.contiguous().T, weight, EPS, impl=impl)[3:], out[3:])
    assert rms_norm(x[:0], weight, EPS, x[:0].clone(), impl=impl).shape == (0, 96)


@pytest.mark.parametrize("impl", [NATIVE])
def test_threads_do_not_change_the_bits(impl: str) -> None:
    x, weight, residual = inputs(128, 2048, torch.float32)

    def run() -> Tensor:
        ours = residual.clone()
        return torch.stack([rms_norm(x, weight, EPS, ours, impl=impl), ours])

    assert torch.equal(*on_threads(run, 1, 3))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("added", [False, True])
def test_op(added: bool, impl: str) -> None:
    x, weight, residual = inputs(3, 16, torch.float32, device(impl))
    torch.library.opcheck(_op, (x, weight, EPS, residual if added else None, impl))
    torch.library.opcheck(_add_op, (x, weight, EPS, residual if added else None, impl))
    torch.library.opcheck(_backward_op, (x, residual if added else None, residual, weight, EPS, added, impl))


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_compiles_whole(impl: str) -> None:
    x, weight, residual = inputs(3, 16, torch.float32)
    ours, expected = residual.clone(), residual.clone()

    def layer(x: Tensor, residual: Tensor) -> Tensor:
        return rms_norm(x * 2, weight, EPS, residual, impl=impl) + residual  # type: ignore[arg-type]

    out = torch.compile(layer, fullgraph=True)(x, ours)
    torch.testing.assert_close(out, layer(x, expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_gradients_compile_whole(impl: str) -> None:
    def run(values: tuple[Tensor, ...], function: Any) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in values]
        return list(torch.autograd.grad(function(*leaves).square().sum(), leaves))

    def layer(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        normed, total = add_rms_norm(x, residual, weight, EPS, impl=impl)  # type: ignore[arg-type]
        return normed + total

    values = inputs(3, 16, torch.float32)
    for ours, plain in zip(run(values, torch.compile(layer, fullgraph=True)), run(values, layer), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_errors(impl: str) -> None:
    x, weight, residual = inputs(4, 6, torch.float32, device(impl))
    for bad in ((x[0], weight), (x, weight[:5]), (x, weight.bfloat16()), (x, weight.to("meta"))):
        with pytest.raises(ValueError, match=r"x must be \[N, D\] and weight \[D\]"):
            rms_norm(*bad, EPS, impl=impl)
    for other in (residual[:3], residual.bfloat16(), residual.to("meta")):
        with pytest.raises(ValueError, match="residual must be like x"):
            rms_norm(x, weight, EPS, other, impl=impl)
    with pytest.raises(ValueError, match="must be contiguous"):
        rms_norm(x, weight, EPS, torch.zeros(6, 4, device=x.device).T, impl=impl)
        with pytest.raises(ValueError, match="residual must be like x"):
            add_rms_norm(x, other, weight, EPS, impl=impl)
    for given in ((x, weight.clone().requires_grad_(), EPS, residual), (x, weight, EPS, residual.requires_grad_())):
        with pytest.raises(RuntimeError, match=r"forward only: call it under torch.no_grad\(\)"):
            rms_norm(*given, impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_an_error(impl: str) -> None:
    """Without one, a penalty on the gradient would do nothing."""
    x, weight, residual = (t.requires_grad_() for t in inputs(4, 6, torch.float32, device(impl)))
    for out in (rms_norm(x, weight, EPS, impl=impl), add_rms_norm(x, residual, weight, EPS, impl=impl)[0]):
        with pytest.raises(RuntimeError, match='rms_norm has no second derivative; impl="torch" has'):
            torch.autograd.grad(out.square().sum(), x, create_graph=True)
