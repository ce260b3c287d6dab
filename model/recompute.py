"""Lets the backward pass recompute activations instead of keeping them, where that takes no matrix product.

PyTorch's activation checkpointing recomputes a whole block up to the last tensor that is missing, so a block between
two matrix products would have to begin and end with copies of the residual stream. This module works on single tensors
instead: the caller says which tensors not to keep, and how to compute them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Again:
    """Tensors that were not kept. They are computed when the first is needed, and freed after the last of `uses`."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self.compute, self.uses = compute, 0
        self.values: Sequence[Tensor] = ()

    def value(self, index: int) -> Tensor:
        with torch.no_grad():
            values = self.values or self.compute()
        self.uses -= 1
        self.values = values if self.uses else ()
        return values[index]


Keep = Callable[[Sequence[Tensor], Callable[[], Sequence[Tensor]]], AbstractContextManager[None]]


def keep_all(*_: Any) -> AbstractContextManager[None]:
    """Stands in for `recomputed` if autograd is to keep everything that it needs."""
    return nullcontext()


@contextmanager
def recomputed(tensors: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, autograd keeps the function `compute` instead of `tensors` and their views.

    `compute` returns the same tensors again, with the same strides, and must not hold a reference to them. Each tensor
    has a storage of its own.
    """
    index_of = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate(tensors)}
    again = _Again(compute)

    def pack(saved: Tensor) -> Any:
        index = index_of.get(saved.untyped_storage().data_ptr())
        if index is None:
            return saved if saved.is_leaf else saved.detach()  # otherwise an output would keep its own operator alive
        again.uses += 1
        return index, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        index, *view = kept
        return again.value(index).as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
