"""Make Triton's interpreter check every address that a kernel reads or writes.

A launch may access the elements of its tensors and no other byte: none before or after them, none between the rows of a
strided view, none of another tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor


def _runs(tensor: Tensor) -> np.ndarray:
    """[2, runs]: first and last + 1 address of each run of adjacent elements."""
    itemsize, length = tensor.element_size(), 1
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    begins = np.array([tensor.data_ptr()])
    for size, stride in dims:
        begins = (begins[:, None] + np.arange(size) * stride * itemsize).ravel()
    return np.stack([begins, begins + length * itemsize])


class Allowed:
    """The bytes of some tensors, as disjoint runs in rising order."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        runs = np.concatenate([np.zeros((2, 1), np.int64), *(_runs(t) for t in tensors if t.numel())], axis=1)
        begins, ends = runs[:, runs[0].argsort()]
        ends = np.maximum.accumulate(ends)
        apart = np.flatnonzero(begins[1:] > ends[:-1])  # runs that touch or overlap become one
        self.begins, self.ends = begins[np.append(0, apart + 1)], ends[np.append(apart, -1)]

    def check(self, verb: str, pointers: Any, mask: Any) -> None:
        """Raise IndexError unless every element selected by `mask` is allowed."""
        addresses = pointers.data[mask.data].astype(np.int64)
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        outside = addresses + itemsize > self.ends[np.searchsorted(self.begins, addresses, "right") - 1]
        if outside.any():
            raise IndexError(f"{verb} {outside.sum()} elements outside the tensors of the launch")


@contextmanager
def checked_bounds() -> Iterator[None]:
    """A launch in the interpreter raises `InterpreterError` at its first access out of bounds.

    It also saves time: the interpreter replaces functions of triton.language at each call of a @triton.jit function,
    here only once for each launch.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    to_host, load, store, replace = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        interpreter._patch_builtin,
    )
    allowed, replaced = Allowed([]), set[int]()

    def replace_once(package: Any, *rest: Any) -> None:
        if id(package) not in replaced:
            replaced.add(id(package))
            replace(package, *rest)

    def checked_to_host(executor: Any, args: Any, options: Any) -> Any:
        nonlocal allowed
        replaced.clear()
        on_host = to_host(executor, args, options)
        given = (x for x in (*on_host[0], *on_host[1].values()) if isinstance(x, Tensor))
        allowed = Allowed(given)
        return on_host

    def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        allowed.check("reads", pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        allowed.check("writes", pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = checked_to_host
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    interpreter._patch_builtin = replace_once
    try:
        yield
    finally:
        GridExecutor._init_args_hst = to_host
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        interpreter._patch_builtin = replace
