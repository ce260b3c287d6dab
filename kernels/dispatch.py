"""Choice of the implementation of an op: Triton on a GPU, C++ on a CPU, plain PyTorch for tensors that neither takes.

Only this file imports Triton, which is optional. Without it, `impl="triton"` is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from . import native

Impl = Literal["auto", "triton", "native", "torch"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # fixed at import, as in Triton, which decides at decoration whether its interpreter runs a kernel
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:

    class _NoTriton:
        """Replaces `triton` in decorators."""

        @staticmethod
        def jit(kernel: Any = None, **_: Any) -> Any:
            return kernel if kernel is not None else lambda kernel: kernel

    triton, tl = _NoTriton, None
    HAS_TRITON = INTERPRETED = False

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "NATIVE_DTYPES",
    "TRITON_DTYPES",
    "Impl",
    "choose",
    "dependent_launches",
    "device_guard",
    "forward_only",
    "has_dependent_launch",
    "launch",
    "no_second_derivative",
    "processors",
    "register",
    "tl",
    "triton",
    "wants_gradient",
    "without_autocast",
]


def _obstacle(impl: str, device: torch.device, dtype: torch.dtype, cpp: bool) -> str | None:
    """Why `impl` cannot run on this input, or None."""
    if impl == "triton":
        if not HAS_TRITON:
            return "Triton is not installed (pip install triton)"
        if device.type != "cuda" and not INTERPRETED:
            return f"it needs a CUDA tensor, got {device.type} (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
        if dtype not in TRITON_DTYPES:
            return f"it takes float32, bfloat16 or float16, got {dtype}"
    elif impl == "native" and not cpp:
        return "there is no C++ kernel"
    elif impl == "native" and (device.type != "cpu" or dtype not in NATIVE_DTYPES):
        return f"it takes float32 or bfloat16 on the CPU, got {dtype} on {device.type}"
    return None


def choose(impl: Impl, device: torch.device, dtype: torch.dtype, *, cpp: bool = True) -> str:
    """The implementation that runs: "triton", "native" or "torch".

    "auto" is Triton on a GPU and C++ on a CPU if they are installed and take the dtype, else PyTorch. If the C++
    library is missing, `native.available` warns once. `cpp` says whether the op has a C++ kernel.

    Raises:
        ValueError: an unknown name, or an implementation that cannot take this device and dtype.
        RuntimeError: "native" is asked for and the C++ library is missing.
    """
    if impl not in ("auto", "triton", "native", "torch"):
        raise ValueError(f'impl must be "auto", "triton", "native" or "torch", got {impl!r}')
    if impl == "auto":
        best = "triton" if device.type == "cuda" else "native"
        usable = _obstacle(best, device, dtype, cpp) is None and (best == "triton" or native.available())
        return best if usable else "torch"
    if reason := _obstacle(impl, device, dtype, cpp):
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; use impl="torch"')
    if impl == "native":
        native.require()
    return impl


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, because Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def processors(device: torch.device, interpreted: int) -> int:
    """Number of multiprocessors of a GPU; `interpreted` for Triton's interpreter, which has none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


_dependent = ContextVar("dependent launches", default=False)


def has_dependent_launch(device: torch.device) -> bool:
    """Whether this Triton and this GPU (compute capability 9.0 or more) have programmatic dependent launch."""
    wait = HAS_TRITON and not INTERPRETED and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")
    return wait and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def dependent_launches(on: bool = True) -> Iterator[None]:
    """Inside, a kernel of this thread with an argument PDL is launched before the previous kernel has ended.

    It waits for the previous kernel before it reads or writes, so only the launch overlaps. Without
    `has_dependent_launch` nothing changes.
    """
    token = _dependent.set(on)
    try:
        yield
    finally:
        _dependent.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first argument. All launches go through here."""
    if _dependent.get() and "PDL" in kernel.arg_names and has_dependent_launch(first.device):
        options |= {"PDL": True, "launch_pdl": True}
    with device_guard(first.device):
        kernel[grid](first, *arguments, **options)


def register(
    name: str, launcher: Callable[..., Any], fake: Callable[..., Any], mutates_args: Sequence[str] = ()
) -> Callable[..., Any]:
    """The op `bicot::<name>`, forward only. It costs 2 µs a call; `torch.library.custom_op` costs 15."""
    torch.library.define(f"bicot::{name}", torch.library.infer_schema(launcher, mutates_args=mutates_args))
    torch.library.impl(f"bicot::{name}", "default", launcher)
    torch.library.register_fake(f"bicot::{name}", fake)
    return getattr(torch.ops.bicot, name).default


def without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """Let an op compute in the dtype of its tensors under torch.autocast too. Its first argument is a tensor."""

    @functools.wraps(op)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *rest)

    return run


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether autograd records operations on the inputs."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def no_second_derivative(name: str) -> None:
    """In a backward pass: raise RuntimeError if its result is to be differentiated too (create_graph=True)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f'{name} has no second derivative; impl="torch" has')


def forward_only(name: str, *inputs: Tensor) -> None:
    """Raise RuntimeError if an input of op `name` wants a gradient, which would silently be missing."""
    if wants_gradient(*inputs):
        raise RuntimeError(f"{name} is forward only: call it under torch.no_grad()")
