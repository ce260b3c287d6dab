"""Which implementation runs; what works without Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from oracle import needs_native
from tiny import ROOT

from bicot.kernels.dispatch import (
    HAS_TRITON,
    INTERPRETED,
    choose,
    dependent_launches,
    device_guard,
    has_dependent_launch,
    launch,
    tl,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from bicot.kernels.cfg_sample import cfg_sample
from bicot.kernels.grpo_loss import TokenStream, grpo_loss
logits, targets = torch.randn(4, 9, requires_grad=True), torch.arange(4)
stream = TokenStream(targets=targets, sample=targets // 2, logits=logits.clone())
grpo_loss([stream], torch.tensor([1.0, 0.0]), group_size=2).loss.backward()
cfg_sample(logits, None, seed=0, offset=targets)
assert logits.grad.abs().sum() > 0
try:
    grpo_loss([stream], torch.tensor([1.0, 0.0]), group_size=2, impl="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert 'impl="triton" cannot run here: Triton is not installed (pip install triton)' in run.stdout


@needs_native
def test_auto_takes_the_fast_implementation_for_its_dtypes() -> None:
    assert choose("auto", CPU, torch.float32) == choose("auto", CPU, torch.bfloat16) == "native"
    assert choose("auto", CPU, torch.float64) == choose("auto", CPU, torch.float16) == "torch"
    assert choose("auto", CUDA, torch.float64) == "torch"
    if HAS_TRITON:
        assert choose("auto", CUDA, torch.bfloat16) == choose("auto", CUDA, torch.float16) == "triton"


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "message"),
    [
        ("cuda", CPU, torch.float32, 'impl must be "auto", "triton", "native" or "torch", got \'cuda\''),
        ("native", CPU, torch.float64, "takes float32 or bfloat16 on the CPU, got torch.float64 on cpu"),
        ("native", CUDA, torch.float32, "takes float32 or bfloat16 on the CPU, got torch.float32 on cuda"),
        ("triton", CUDA, torch.float64, "takes float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_cannot_run_is_an_error(impl: str, device: torch.device, dtype: torch.dtype, message: str) -> None:
    if impl == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    with pytest.raises(ValueError, match=message):
        choose(impl, device, dtype)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="Triton can run on a CPU here, or is not installed")
def test_triton_on_a_cpu_is_an_error() -> None:
    with pytest.raises(ValueError, match='impl="triton" cannot run here: it needs a CUDA tensor, got cpu'):
        choose("triton", CPU, torch.float32)


def test_every_triton_kernel_is_launched_by_one_function() -> None:
    """`launch` makes the device of the tensors the current one, because Triton launches on the current device."""
    launched = {path.name: re.findall(r"kernel\[", path.read_text()) for path in (ROOT / "kernels").glob("*.py")}
    assert {name: len(found) for name, found in launched.items() if found} == {"dispatch.py": 1}


def test_a_launch_is_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device_guard(CPU), nullcontext)
    one = device_guard(torch.device("cuda:1"))
    assert isinstance(one, torch.cuda.device) and one.idx == 1
    order: list[object] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **options: order.append((grid, arguments, options))

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            order.append(self.device)

        def __exit__(self, *_: object) -> None:
            order.append("left")

    monkeypatch.setattr("bicot.kernels.dispatch.device_guard", Current)
    x = torch.ones(2, device="meta")
    launch(Kernel(), (3,), x, 7, BLOCK=16)
    assert order == [torch.device("meta"), ((3,), (x, 7), {"BLOCK": 16}), "left"]

    # within `dependent_launches`, if the GPU has them, and only for kernels with an argument PDL
    Kernel.arg_names = ["p_x"]  # type: ignore[attr-defined]
    has = {"has": True}
    monkeypatch.setattr("bicot.kernels.dispatch.has_dependent_launch", lambda device: has["has"])
    for names, able, on in (
        (["p_x"], True, {}),
        (["PDL"], False, {}),
        (["PDL"], True, {"PDL": True, "launch_pdl": True}),
    ):
        Kernel.arg_names, has["has"] = names, able  # type: ignore[attr-defined]
        with dependent_launches():
            launch(Kernel(), (3,), x)
        assert order[-2] == ((3,), (x,), on)
    launch(Kernel(), (3,), x)
    assert order[-2] == ((3,), (x,), {})


def test_which_gpus_have_dependent_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_dependent_launch(CPU)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert has_dependent_launch(CUDA) == (capability >= (9, 0) and HAS_TRITON and not INTERPRETED)
    if HAS_TRITON:
        monkeypatch.delattr(tl.extra.cuda, "gdc_wait", raising=False)  # an older Triton
        assert not has_dependent_launch(CUDA)
