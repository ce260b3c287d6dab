"""silu_mul: the reference equals F.silu(gate) * up, and the kernels are no worse than the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

from bicot.kernels.silu_mul import _backward_op, _op, silu_mul, silu_mul_ref

# Float32: the argument of the exponential is exact to 1 ulp, so for large negative g silu is exact to |g| roundings.
# Bfloat16: both roundings are where the reference has them.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2 * BFLOAT16_ROUNDING if INTERPRETED else 2**-12}
DTYPES = list(RELATIVE)


def inputs(N: int, size: int, dtype: torch.dtype, to: str = "cpu", scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(N + size)
    return (torch.randn(N, 2 * size, generator=generator) * scale).to(to, dtype)


def gradient(gate_up: Tensor, impl: str) -> Tensor:
    leaf = gate_up.detach().requires_grad_()
    out = silu_mul(leaf, impl=impl)  # type: ignore[arg-type]
    given = torch.linspace(-2, 2, out.numel(), dtype=torch.float64).view(out.shape).sin().bfloat16()
    with poisoned_outputs():
        return torch.autograd.grad(out, leaf, given.to(out))[0]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "size"), [(1, 1), (3, 7), (2, 5632), (5, 1025), (33, 128)])
def test_kernels(N: int, size: int, dtype: torch.dtype, impl: str) -> None:
    for scale in (3.0, 0.01, 40.0):
        gate_up = inputs(N, size, dtype, device(impl), scale)
        before = gate_up.clone()
        with poisoned_outputs():
            out = silu_mul(gate_up, impl=impl)
        eager, gt = silu_mul_ref(gate_up), silu_mul_ref(gate_up.double())
        assert_no_worse("out", out, eager, gt, RELATIVE[dtype], 1e-7)
        assert torch.equal(gate_up, before)
        eager, gt = gradient(gate_up, "torch"), gradient(gate_up.double(), "torch")
        assert_no_worse("gate_up", gradient(gate_up, impl), eager, gt, RELATIVE[dtype], 1e-6)
    assert gradient(gate_up[:0], impl).shape == (0, 2 * size)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_large_numbers(impl: str) -> None:
    """silu is the identity on the right and 0 on the left."""
    gate_up = torch.tensor([[1e4, -1e4, 3e38, -3e38] + [0.5] * 4], device=device(impl))
    found = gradient(gate_up, impl)
    assert found[0, :4].isfinite().all() and found[0, 1] == found[0, 3] == 0
    assert (found[0, [0, 2]] != 0).all() and (found[0, [5, 7]] == 0).all()


def test_the_first_half_is_the_gate() -> None:
    gate, up = torch.randn(2, 3, 5)
    assert torch.equal(silu_mul_ref(torch.cat([gate, up], dim=1)), F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which Triton's interpreter computes with
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers(dtype: torch.dtype, impl: str) -> None:
    """No overflow; infinity and NaN are where F.silu has them."""
    sizes = torch.tensor([0.0, 30, 88, 104, 1e4, 3e38, torch.inf, torch.nan])
    gate = torch.cat([sizes, -sizes])
    gate_up = torch.cat([gate, torch.full_like(gate, 0.5)]).to(device(impl), dtype)[None]
    expected = silu_mul_ref(gate_up.double())
    out = silu_mul(gate_up, impl=impl).double()
    assert torch.equal(out.isnan(), expected.isnan())
    rtol = 4e-6 if dtype == torch.float32 else 2**-6
    # below -87.3 the result is under 1e-35 and may be 0
    torch.testing.assert_close(out, expected, rtol=rtol, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("impl", [NATIVE])
def test_rounds_where_pytorch_rounds(impl: str) -> None:
    """Without the rounding of silu before the product, a quarter of all elements would differ."""
    gate_up = inputs(33, 513, torch.bfloat16)
    assert (silu_mul(gate_up, impl=impl) == silu_mul_ref(gate_up)).float().mean() > 0.999


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_alone(impl: str) -> None:
    gate_up = inputs(4, 40, torch.float32, device(impl))
    gate_up[2, 3] = torch.nan
    out = silu_mul(gate_up, impl=impl)
    assert out.isnan().nonzero().tolist() == [[2, 3]]
    assert torch.equal(silu_mul(gate_up[3:], impl=impl), out[3:])
    assert torch.equal(silu_mul(gate_up.T.contiguous().T, impl=impl)[3:], out[3:])
    assert silu_mul(gate_up[:0], impl=impl).shape == (0, 40) and silu_mul(gate_up[:, :0], impl=impl).shape == (4, 0)


@pytest.mark.parametrize("impl", [NATIVE])
def test_threads_do_not_change_the_bits(impl: str) -> None:
    gate_up = inputs(64, 1024, torch.float32)
    assert torch.equal(*on_threads(lambda: silu_mul(gate_up, impl=impl), 1, 3))


@pytest.mark.parametrize("impl", KERNELS)
def test_op(impl: str) -> None:
    gate_up = inputs(3, 16, torch.float32, device(impl))
    torch.library.opcheck(_op, (gate_up, impl))
    torch.library.opcheck(_backward_op, (gate_up[:, :16].contiguous(), gate_up, impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_an_error(impl: str) -> None:
    """Without one, a penalty on the gradient would do nothing."""
    leaf = inputs(3, 16, torch.float32, device(impl)).requires_grad_()
    with pytest.raises(RuntimeError, match='silu_mul has no second derivative; impl="torch" has'):
        torch.autograd.grad(silu_mul(leaf, impl=impl).sum(), leaf, create_graph=True)


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_compiles_whole(impl: str) -> None:
    gate_up = inputs(3, 16, torch.float32)

    def layer(x: Tensor) -> Tensor:
        return silu_mul(x + 1, impl=impl) * 2  # type: ignore[arg-type]

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(gate_up), layer(gate_up), rtol=1e-6, atol=1e-6)
    leaf = gate_up.requires_grad_()
    both = (torch.autograd.grad(way(leaf).sum(), leaf)[0] for way in (torch.compile(layer, fullgraph=True), layer))
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_errors(impl: str) -> None:
    gate_up = inputs(4, 6, torch.float32, device(impl))
    for bad in (gate_up[0], gate_up[:, :7]):
        with pytest.raises(ValueError, match=r"gate_up must be \[N, 2·I\]"):
            silu_mul(bad, impl=impl)
