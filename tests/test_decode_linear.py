"""decode_linear and decode_linear_add against a residual sum, RMSNorm, linear layer and SwiGLU, three ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import BFLOAT16_ROUNDING, TRITON, assert_no_worse, device, poisoned_outputs
from torch import Tensor

from bicot.kernels import decode_linear as module
from bicot.kernels.decode_linear import _add_op, _op, decode_linear, decode_linear_add
from bicot.kernels.rms_norm import rms_norm_ref

# relative error, of one rounding more than the formula has
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: BFLOAT16_ROUNDING}
EPS = 1e-3  # large enough to show
# R, K, N, outputs of the next layer: one tile; ragged tiles; splits of unequal size; the most sequences
SHAPES = [(1, 3, 2, 4), (3, 300, 70, 130), (17, 1100, 64, 32), (5, 2100, 40, 200), (64, 520, 256, 66)]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(R: int, K: int, N: int, M: int, dtype: torch.dtype, to: str) -> Inputs:
    """x [R, K], weight [N, K], residual [R, N], norm weight [N], and the weight [M, N] of the layer that follows."""
    generator = torch.Generator().manual_seed(R + K + N)
    x, weight, residual, norm, following = (
        torch.randn(shape, generator=generator) for shape in ((R, K), (N, K), (R, N), (N,), (M, N))
    )
    return tuple(t.to(to, dtype) for t in (x, weight * K**-0.5, residual, norm + 2, following * N**-0.5))  # type: ignore


def plain(given: Inputs, silu: bool) -> tuple[Tensor, Tensor]:
    """The residual sum, and the layer of its norm, as transformers' Llama computes and rounds them."""
    x, weight, residual, norm, following = given
    total = residual + F.linear(x, weight)
    out = F.linear(rms_norm_ref(total, norm, EPS), following)
    gate, up = out.chunk(2, dim=1)
    return total, F.silu(gate) * up if silu else out


def ours(given: Inputs, silu: bool, impl: Any, arrived: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, weight, residual, norm, following = given
    total = residual.clone()
    scaled, squares = decode_linear_add(x, weight, total, norm, arrived, impl=impl)
    return total, decode_linear(scaled, following, squares, eps=EPS, silu=silu, impl=impl)


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_separate_operations(
    shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool, impl: str
) -> None:
    given = inputs(*shape, dtype, device(impl))
    with poisoned_outputs():
        found = ours(given, silu, impl)
    eager, gt = plain(given, silu), plain(tuple(t.double() for t in given), silu)  # type: ignore[arg-type]
    for name, *values in zip(("total", "out"), found, eager, gt, strict=True):
        assert_no_worse(name, *values, RELATIVE[dtype], RELATIVE[dtype])


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_without_a_norm(impl: str) -> None:
    x, weight, *_ = inputs(3, 300, 70, 2, torch.float32, device(impl))
    torch.testing.assert_close(decode_linear(x, weight, impl=impl), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    gate, up = F.linear(x, weight).chunk(2, dim=1)
    found = decode_linear(x, weight, silu=True, impl=impl)
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_sequences_alone(impl: str) -> None:
    """A sequence with NaN spoils no other, and silu does not overflow."""
    given = inputs(4, 600, 64, 6, torch.float32, device(impl))
    given[0][1] = torch.nan
    given[4].mul_(1e4)
    total, out = ours(given, True, impl)
    for found in (total, out):
        assert found.isnan().any(1).tolist() == [False, True, False, False] and found[[0, 2, 3]].isfinite().all()
    alone = tuple(t[2:] if len(t) == 4 else t for t in given)
    torch.testing.assert_close(ours(alone, True, impl)[1], out[2:], rtol=1e-5, atol=0)  # type: ignore[arg-type]
    empty = tuple(t[:0] if len(t) == 4 else t for t in given)
    assert ours(empty, True, impl)[1].shape == (0, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", [TRITON])
def test_split_products(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums are added in their order, and the counters end at zero."""
    given = inputs(5, 2100, 100, 8, torch.bfloat16, device(impl))
    arrived = torch.zeros(2, dtype=torch.int32, device=device(impl))
    found = []
    for processors in (4, 4, 1):
        monkeypatch.setattr(module, "processors", lambda *_, n=processors: n)
        found.append(ours(given, False, impl, arrived)[1])
        assert not arrived.any()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0.02, atol=0.02)


def test_num_splits() -> None:
    """Splits for o and down of Janus on an H200; none for many outputs or few inputs."""
    assert [module.num_splits(2048, K, 132) for K in (2048, 5632)] == [4, 4]
    assert [module.num_splits(4096, K, 132) for K in (4096, 11008)] == [2, 2]
    assert module.num_splits(16384, 2048, 132) == module.num_splits(64, 300, 132) == 1


@pytest.mark.parametrize("impl", [TRITON])
def test_op(impl: str) -> None:
    x, weight, residual, norm, following = inputs(3, 600, 70, 6, torch.float32, device(impl))
    arrived = torch.zeros(2, dtype=torch.int32, device=x.device)
    torch.library.opcheck(_add_op, (x, weight, residual, norm, arrived))
    squares = residual.square().sum(1, keepdim=True)
    torch.library.opcheck(_op, (residual, following, squares, EPS, True))


def test_errors() -> None:
    x, weight, residual, norm, following = inputs(3, 6, 4, 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"x must be \[R, K\] floating point, R up to 64, got \[65, 6\]"):
        decode_linear(x.new_empty(65, 6), weight)
    with pytest.raises(ValueError, match=r"weight must be \[4, 6\] torch.float32 on cpu and contiguous, got \[4, 4\]"):
        decode_linear(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"squares must be \[3, any\] torch.float32"):
        decode_linear(x, weight, norm)
    with pytest.raises(ValueError, match="with silu the rows of weight are gate and up, got 5"):
        decode_linear(residual, following, silu=True)
    with pytest.raises(ValueError, match=r"residual must be \[3, 4\] torch.float32"):
        decode_linear_add(x, weight, residual.T, norm)
    with pytest.raises(ValueError, match=r"arrived must be \[1\] torch.int32"):
        decode_linear_add(x, weight, residual, norm, norm)
    with pytest.raises(ValueError, match='impl="triton" cannot run here'):
        decode_linear(x.double(), weight.double(), impl="triton")
    with pytest.raises(RuntimeError, match="decode_linear is forward only"):
        decode_linear(x.requires_grad_(), weight)
