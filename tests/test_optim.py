"""AdamW with float32 masters, and AdamW with moments of 8 bits."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from stepping import ALONE, apply_gradient, config
from torch import Tensor

from bicot.grpo import gradients
from bicot.grpo.optim import MasterAdamW


def test_a_bfloat16_weight_of_magnitude_one_moves_at_lr_1e_6() -> None:
    cfg = config(dtype="bfloat16", learning_rate=1e-6, max_grad_norm=1e9)
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], cfg)
    for _ in range(4000):
        apply_gradient(optimizer, torch.ones_like(weight))
    assert optimizer.masters[0].dtype == torch.float32
    # an update of 1e-6 is 16.8 spacings of float32 below 1 and rounds to 17: 1.3 % too far
    torch.testing.assert_close(optimizer.masters[0].data, torch.full((4,), 1 - 4e-3 * 17 / 16.78), atol=1e-6, rtol=0)
    assert (weight < 1).all(), "the model's weight follows its master once the sum is large enough"


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], config(dtype="bfloat16"))
    for value in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        weight.grad = torch.full((1,), value, dtype=torch.bfloat16)
        optimizer.collect()
    assert optimizer.masters[0].grad is not None and optimizer.masters[0].grad.item() == 258


def test_one_micro_batch_makes_no_float32_gradients_and_ends_where_several_do() -> None:
    def loss(weights: list[torch.nn.Parameter], both: list[Tensor]) -> tuple[Tensor, None]:
        return torch.stack([(w * g).sum() for w, g in zip(weights, both, strict=True)]).sum(), None

    draw, ways = torch.Generator().manual_seed(0), []
    grads = [torch.randn(64, 64, generator=draw).bfloat16() for _ in range(4)]
    for collects in (False, True):
        weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = MasterAdamW(weights, config(dtype="bfloat16", learning_rate=0.01, max_grad_norm=0.5))
        for both in (grads[:2], grads[2:]):
            optimizer.backward(partial(loss, weights, both), ALONE, last=True)
            assert all(weight.grad is not None for weight in weights)
            assert all(master.grad is None for master in optimizer.masters)
            if collects:
                optimizer.collect()
            optimizer.step(ALONE)
            assert all(w.grad is None for w in (*weights, *optimizer.masters))
        ways.append(optimizer.state_dict())
    torch.testing.assert_close(*ways, rtol=1e-6, atol=1e-9)


def test_gradients_are_collected_by_few_kernels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as one gradient after another. A parameter may have no gradient in some backward passes."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 4 * 4000)
    parameters = [torch.nn.Parameter(torch.zeros(n, 10, dtype=torch.bfloat16)) for n in [*[5] * 100, 900, 1, 1]]
    parameters += [torch.nn.Parameter(torch.zeros(3))]  # its own master
    optimizer, draw = MasterAdamW(parameters, config(dtype="bfloat16")), torch.Generator().manual_seed(0)
    expected: list[Tensor | None] = [None] * len(parameters)
    for backward in range(3):
        for i, p in enumerate(parameters[:-1]):
            if (i + backward) % 7:
                p.grad = torch.randn(p.shape, generator=draw).bfloat16()
                before = expected[i]
                expected[i] = p.grad.float() if before is None else before + p.grad.float()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.collect()
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::_foreach_copy_"] == 4 and calls.get("aten::_foreach_add_", 0) <= 4, (
            "5000, 9000 and 20 weights"
        )
        assert all(p.grad is None for p in parameters)
    for master, grad in zip(optimizer.masters, expected, strict=True):
        assert (master.grad is None and grad is None) or torch.equal(master.grad, grad)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float, optim: str) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("torchao")
    weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=dtype)) for _ in range(2)]
    optimizer = MasterAdamW(weights, config(dtype=str(dtype).removeprefix("torch."), optim=optim, ema_decay=0.5))
    grads = [torch.randn(64, 64, dtype=dtype) for _ in range(2)]

    def step() -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer.step(ALONE)

    step()
    before = copy.deepcopy((optimizer.state_dict(), weights))
    grads[1][0, 0] = bad
    with pytest.raises(FloatingPointError, match="the loss diverged"):
        step()
    torch.testing.assert_close((optimizer.state_dict(), weights), before, rtol=0, atol=0)


def test_adamw_8bit_moves_bfloat16_weights_as_float32_does_and_resumes() -> None:
    """There are no masters, and lr 1e-5 is a 390th of the spacing of bfloat16 below 1."""
    pytest.importorskip("torchao")
    settings: dict[str, Any] = dict(learning_rate=1e-5, max_grad_norm=1e9, lr_scheduler_type="linear", max_steps=60)

    def train(optim: str, stop: int = 60) -> tuple[torch.nn.Parameter, MasterAdamW]:
        weight = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
        optimizer = MasterAdamW([weight], config(dtype="bfloat16", optim=optim, **settings))
        go_on(weight, optimizer, range(stop))
        return weight, optimizer

    def go_on(weight: torch.nn.Parameter, optimizer: MasterAdamW, steps: range) -> None:
        for step in steps:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            apply_gradient(optimizer, (1 + noise).bfloat16())
            optimizer.schedule.step()

    weight, optimizer = train("adamw_8bit")
    assert optimizer.masters == [weight]
    moved, exact = weight.detach().double() - 1, train("adamw_torch_fused")[1].masters[0].detach().double() - 1
    # rounding has no bias: six standard errors of the mean over the weights, and 3 % for moments of 8 bits
    bound = 6 * moved.std() / moved.numel() ** 0.5 + 0.03 * exact.mean().abs()
    assert exact.mean() < -1e-4 and (moved.mean() - exact.mean()).abs() < bound

    half, before = train("adamw_8bit", 30)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    again = torch.nn.Parameter(half.detach().clone())
    resumed = MasterAdamW([again], config(dtype="bfloat16", optim="adamw_8bit", **settings))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(1)  # whatever else has drawn numbers
    go_on(again, resumed, range(30, 60))
    assert torch.equal(again, weight)
