"""Shared by the kernel tests: the implementations that can run here, and the three-way comparison.

`gt` is the reference in float64, `eager` the reference in the tested dtype, `ours` the implementation. The error of
ours may exceed that of eager only by the stated tolerance.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bicot.kernels import native
from bicot.kernels.dispatch import HAS_TRITON, INTERPRETED

CUDA = torch.cuda.is_available()
T = TypeVar("T")

needs_native = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")
needs_triton = pytest.mark.skipif(
    not (HAS_TRITON and (CUDA or INTERPRETED)), reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
NATIVE = pytest.param("native", marks=needs_native)
TRITON = pytest.param("triton", marks=[needs_triton, pytest.mark.triton])
# relative error of one rounding to bfloat16; Triton's interpreter truncates where a GPU rounds to nearest
BFLOAT16_ROUNDING = 2**-7 if INTERPRETED else 2**-8
KERNELS = [NATIVE, TRITON]  # the fast implementations
IMPLEMENTATIONS = ["torch", *KERNELS]


def device(impl: str) -> str:
    """Where the tensors of a test of `impl` live. The interpreter runs Triton's kernels on CPU tensors."""
    return "cuda" if impl == "triton" and CUDA else "cpu"


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty holds NaN or the largest integer, so that a test sees elements that are never written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def on_threads(function: Callable[[], T], *counts: int) -> list[T]:
    """The results of `function` on each number of threads in `counts`."""
    before, results = torch.get_num_threads(), []
    for count in counts:
        torch.set_num_threads(count)
        results.append(function())
    torch.set_num_threads(before)
    return results


@contextmanager
def compiles_nothing() -> Iterator[None]:
    """Fail if Triton compiles a kernel."""
    from triton import knobs

    compiled: list[str] = []
    knobs.compilation.listener = lambda **event: compiled.append(str(event.get("src")))
    try:
        yield
    finally:
        knobs.compilation.listener = None
    assert not compiled


def gpu(test: Callable) -> Callable:
    """Mark a test that needs a CUDA device; it skips without one."""
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA device")(test))


def moved(x: Tensor, to: str) -> Tensor:
    """A copy of x on a device. Unlike `x.to`, it keeps strides and the offset from a multiple of 16 bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    lead = x.storage_offset() % 8
    whole = x.as_strided((lead + span,), (1,), x.storage_offset() - lead)
    return whole.to(to, copy=True).as_strided(x.shape, x.stride(), lead)


def amid_nan(x: Tensor, left: int, right: int = 3) -> tuple[Tensor, Tensor]:
    """x [N, V] as a view of strided rows in a larger buffer of NaN, and that buffer. x gets the view's gradient."""
    buffer = x.new_full((len(x) + 2, left + x.shape[1] + right), torch.nan)
    buffer[1:-1, left : left + x.shape[1]] = x
    return buffer[1:-1, left : left + x.shape[1]], buffer


@contextmanager
def no_host_sync() -> Iterator[None]:
    """On a GPU, an operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def host_sync_allowed() -> Iterator[None]:
    """Inside `no_host_sync`, waiting is allowed again."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` holds at a time on the CPU, from every allocation it makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def assert_no_worse(
    name: str, ours: Tensor, eager: Tensor, gt: Tensor, relative: float, absolute: float, *, elementwise: bool = True
) -> None:
    """error(ours, gt) <= error(eager, gt) + tolerance, in norm and element by element.

    `relative` is of gt's norm (and of each element), `absolute` of one element.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape, name
    gt = gt.double()
    eager_error, error = (eager.double() - gt).abs(), (ours.double() - gt).abs()
    bound = eager_error.norm() + relative * gt.norm() + absolute * max(gt.numel(), 1) ** 0.5
    assert error.norm() <= bound, f"{name}: error {error.norm():.3g}, bound {bound:.3g}"
    if elementwise and gt.numel():
        bounds = eager_error.max() + relative * gt.abs() + absolute
        assert (error <= bounds).all(), f"{name}: worst element is {(error - bounds).max():.3g} beyond its bound"
