"""Find and load the library of C++ CPU kernels (`kernels/csrc`), once, the first time that a kernel asks for it.

The library has a plain C ABI and does not link torch, so one binary serves every torch version. A library that was
built from other sources than those in `csrc`, as after `git pull`, is not used: its functions may take other arguments.
"""

import ctypes
import functools
import hashlib
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
SOURCES = Path(__file__).with_name("csrc")
FIX = "install a C++ compiler and run `pip install -e .` again (or `pip install --force-reinstall --no-deps bicot`)"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason, with a warning."""
    if LIBRARY.exists():
        try:
            library = ctypes.CDLL(str(LIBRARY))
            if _built_from(library) == _sources():
                return library, ""
            reason = f"{LIBRARY} was built from other sources than those in {SOURCES}"
        except OSError as error:
            reason = str(error)
    else:
        reason = f"{LIBRARY} does not exist"
    warnings.warn(f"bicot's C++ kernels are not available ({reason}): using PyTorch. Fix: {FIX}", stacklevel=3)
    return None, reason


def _built_from(library: ctypes.CDLL) -> str:
    """The hash of the sources that the library was built from, as CMakeLists.txt computes it."""
    try:
        function = library.bicot_sources
    except AttributeError:  # the library is from before this function existed
        return ""
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _sources() -> str:
    """The hash of the sources beside this file."""
    files = sorted(file for file in SOURCES.iterdir() if file.suffix in (".cpp", ".h"))
    hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


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
