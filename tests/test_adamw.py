"""adamw: the kernel and PyTorch's fused AdamW are as near to float64 as PyTorch's plain AdamW in float32."""

from __future__ import annotations

import pytest
import torch
from oracle import BFLOAT16_ROUNDING, TRITON, assert_no_worse, device
from torch import Tensor

from bicot.kernels.adamw import adamw

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}
# float32: ten operations of half an ulp each, and on a GPU division and square root of two ulps
RELATIVE = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: BFLOAT16_ROUNDING, torch.float16: 2**-11}
IMPLEMENTATIONS = ["torch", TRITON]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, to: str = "cpu") -> tuple[Tensor, ...]:
    """weight, master, gradient and both moments, after some updates."""
    draw = torch.Generator().manual_seed(sum(shape))
    master, grad, exp_avg, noise = torch.randn(4, *shape, generator=draw).unbind()
    tensors = (master.to(to), grad.to(to, dtype), exp_avg.to(to) / 10, noise.to(to).square() / 10)
    return (tensors[0].to(dtype), *tensors) if dtype != torch.float32 else (tensors[0], *tensors)


def plain(given: tuple[Tensor, ...], dtype: torch.dtype, scale: float, step: int, decay: float) -> list[Tensor]:
    """Master and both moments after an update of `torch.optim.AdamW` in this dtype."""
    _, master, grad, exp_avg, exp_avg_sq = (x.to(dtype, copy=True) for x in given)
    adamw = torch.optim.AdamW([master], foreach=False, weight_decay=decay, **OPTIONS)
    master.grad = grad * scale
    adamw.state[master] = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    adamw.step()
    return [master.detach(), exp_avg, exp_avg_sq]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("shape", "step"), [((1,), 1), ((7,), 2), ((3, 1024), 1), ((2, 5, 257), 1000)])
def test_implementations(shape: tuple[int, ...], step: int, dtype: torch.dtype, impl: str) -> None:
    for scale, decay in ((1.0, 0.0), (0.3, 0.1)):
        given = inputs(shape, dtype, device(impl))
        gt, eager = (plain(given, d, scale, step, decay) for d in (torch.float64, torch.float32))
        weight, master, grad, *moments = given
        before, factor = grad.clone(), torch.tensor(scale, device=device(impl))
        adamw(*given, step=step, scale=factor, weight_decay=decay, impl=impl, **OPTIONS)  # type: ignore[arg-type]
        for name, found, *others in zip(("master", "m", "v"), (master, *moments), eager, gt, strict=True):
            assert_no_worse(name, found, *others, RELATIVE, 1e-7)
        assert torch.equal(grad, before)
        torch.testing.assert_close(weight.float(), master, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_scale_of_nan_changes_nothing(dtype: torch.dtype, impl: str) -> None:
    given = inputs((5, 300), dtype, device(impl))
    before = [x.clone() for x in given]
    given[2][0, 0] = before[2][0, 0] = torch.inf
    scale = torch.tensor(torch.nan, device=device(impl))
    adamw(*given, step=3, scale=scale, weight_decay=0.1, impl=impl, **OPTIONS)  # type: ignore[arg-type]
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_errors(impl: str) -> None:
    weight, *others = inputs((4, 6), torch.bfloat16, device(impl))
    for bad in (weight[:2], weight.T.contiguous().T):
        with pytest.raises(ValueError, match="contiguous and of one shape"):
            adamw(bad, *others, step=1, scale=torch.ones(()), weight_decay=0, impl=impl, **OPTIONS)  # type: ignore
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch.bfloat16"):
        adamw(weight, weight, *others[1:], step=1, scale=torch.ones(()), weight_decay=0, impl=impl, **OPTIONS)  # type: ignore
