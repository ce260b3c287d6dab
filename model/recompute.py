"""Activations that the backward pass computes again instead of keeping them, where that takes no product.

PyTorch's checkpoint runs a whole block again up to the last tensor that is missing, so a block between two products
would have to end and begin with copies of the residual stream. This names single tensors and how each is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Again:
    """Tensors that were not kept: computed when the first is asked for, forgotten when all have been."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self.compute, self.asked = compute, 0
        self.values: Sequence[Tensor] = ()

    def value(self, index: int) -> Tensor:
        with torch.no_grad():
            values = self.values or self.compute()
        self.asked -= 1
        self.values = values if self.asked else ()
        return values[index]


Keep = Callable[[Sequence[Tensor], Callable[[], Sequence[Tensor]]], AbstractContextManager[None]]


def keep_all(*_: Any) -> AbstractContextManager[None]:
    """Like `recomputed`, but autograd keeps what it keeps."""
    return nullcontext()


@contextmanager
def recomputed(tensors: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, autograd keeps of `tensors`, and of views of them, no more than `compute`, which gives them once more.

    Each has storage of its own, and what `compute` gives is laid out like it. `compute` must not hold on to them.
    """
    places = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate(tensors)}
    again = _Again(compute)

    def pack(saved: Tensor) -> Any:
        index = places.get(saved.untyped_storage().data_ptr())
        if index is None:
            return saved if saved.is_leaf else saved.detach()  # an operator's output would hold the operator
        again.asked += 1
        return index, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        index, *view = kept
        return again.value(index).as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
