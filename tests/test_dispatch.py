"""Which implementation runs, and that everything but Triton's kernels works where Triton is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import needs_native

from bicot.kernels.dispatch import HAS_TRITON, INTERPRETED, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what `import triton` meets where it is not installed
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
def test_auto_takes_the_fast_one_where_it_takes_the_dtype() -> None:
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
