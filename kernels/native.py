"""Find and load the library of C++ CPU kernels (`kernels/csrc`) when a kernel first needs it.

The library has a plain C ABI and does not link torch, so one binary works with every torch version.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
FIX = "install a C++ compiler and run `pip install -e .` again (or `pip install --force-reinstall --no-deps bicot`)"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason, with a warning."""
    if LIBRARY.exists():
        try:
            return ctypes.CDLL(str(LIBRARY)), ""
        except OSError as error:
            reason = str(error)
    else:
        reason = f"{LIBRARY} does not exist"
    warnings.warn(f"bicot's C++ kernels are not available ({reason}): using PyTorch. Fix: {FIX}", stacklevel=3)
    return None, reason


@torch.compiler.assume_constant_result  # torch.compile calls it instead of tracing it
def available() -> bool:
    """Whether the C++ kernels can run here. If not, the first call warns and names the fix."""
    return _load()[0] is not None


@torch.compiler.assume_constant_result
def require() -> None:
    """Raise RuntimeError with the reason and the fix if the library is missing."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"bicot's C++ kernels are not available: {reason}. Fix: {FIX}")


@functools.cache
def function(name: str, *argtypes: type) -> "ctypes._NamedFuncPointer":
    """The C function `name`, which takes `argtypes` and returns nothing; RuntimeError without the library."""
    require()
    library, _ = _load()
    assert library is not None
    entry = library[name]
    entry.argtypes = argtypes
    entry.restype = None
    return entry
