"""Activations that the backward pass recomputes instead of keeping them, where that takes no matrix product.

PyTorch's activation checkpointing recomputes a whole block up to the last tensor that is missing, so a block between
two matrix products would have to begin and end with copies of the residual stream. Here single tensors are named, and
how each is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Again:
    """Tensors that were not kept: computed when the first is needed, freed when all `uses` of them are over."""

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
    """Takes the place of `recomputed` where autograd is to keep what it needs."""
    return nullcontext()


@contextmanager
def recomputed(tensors: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, autograd keeps `compute`, which computes the tensors again, instead of `tensors` and views of them.

    Each tensor has a storage of its own, and `compute` returns it with the same strides. `compute` must not hold a
    reference to them.
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
