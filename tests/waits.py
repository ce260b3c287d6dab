"""Where a host would wait for its GPU, found on a CPU.

`Waits` plays a device: it knows which tensors a GPU would hold, namely those that are made on or moved to a
`torch.device`, and whatever is computed from them; the host's memory is written "cpu". It counts, by the innermost
function of bicot, what would make the host wait: reading a value, operators whose shapes depend on values, and copies
from the host's memory without `non_blocking`. An operator that mixes tensors of both counts too: a GPU would refuse it,
or copy an index.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive}
READS |= {aten.bincount, aten.repeat_interleave}
COPIED = {"tensor", "as_tensor", "new_tensor"}  # Python's numbers


class Waits(ExitStack):
    """A context; `counts` has its waits, by the innermost function whose module's name begins with `package`."""

    def __init__(self, package: str = "bicot.") -> None:
        super().__init__()
        self.package = package
        self.counts: Counter[str] = Counter()
        self._held: dict[int, Any] = {}  # storages of the device; kept, so that none gets the address of another

    def __enter__(self) -> Waits:
        self.enter_context(_Calls(self))
        self.enter_context(_Operators(self))
        return self

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    def take(self, value: Any) -> Any:
        """The value; its tensors are the device's from now on."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = storage
        return value

    def leave(self, tensor: Tensor) -> Tensor:
        """A copy in memory of the host."""
        copy = tensor.clone()
        self._held.pop(copy.untyped_storage()._cdata, None)
        return copy

    def note(self) -> None:
        frame: Any = sys._getframe(1)
        while not frame.f_globals.get("__name__", "").startswith(self.package):
            frame = frame.f_back
        module = frame.f_globals["__name__"].removeprefix(self.package)
        self.counts[f"{module}:{frame.f_code.co_qualname}"] += 1


class _Calls(TorchFunctionMode):
    """Moves, and what Python asks of a tensor."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs, name = self.waits, kwargs or {}, getattr(func, "__name__", "")
        given = [*args, *kwargs.values()]
        source = given[0] if given and isinstance(given[0], Tensor) else None
        held = source is not None and waits.holds(source)
        if name in ("tolist", "numpy") and held:
            waits.note()
        if name == "cpu" or (name == "to" and any(isinstance(x, str) and x == "cpu" for x in given[1:])):
            if not held:
                return func(*args, **kwargs)
            waits.note()
            return waits.leave(func(*args, **kwargs))
        to_device = any(isinstance(x, torch.device) and x.type == "cpu" for x in given)
        if name == "to" and not held:
            to_device |= any(isinstance(x, Tensor) and waits.holds(x) for x in given[1:])
        result = func(*args, **kwargs)
        if (to_device or (name == "new_tensor" and held)) and isinstance(result, Tensor) and not waits.holds(result):
            if name in COPIED or (name == "to" and not any(x is True for x in given)):
                waits.note()
            result = waits.take(result.clone() if name == "to" else result)
        return result


class _Operators(TorchDispatchMode):
    """What is computed from the device's tensors is the device's."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = self.waits
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [waits.holds(x) for x in tensors]
        result = func(*args, **(kwargs or {}))
        if not any(here):
            return result
        reads = func.overloadpacket in READS
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            reads = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        mixed = any(x.ndim and not held for x, held in zip(tensors, here, strict=True))
        if reads or mixed:
            waits.note()
        return waits.take(result)
