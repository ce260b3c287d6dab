"""Adds up gradients over micro-batches and ranks, in the dtype of the optimizer's masters.

Parameters are in buckets, so that few kernels and messages suffice, and copies need little memory. During the last
backward pass, a bucket is sent as soon as it has all its gradients, while the others are still computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .distributed import Ranks, buckets

BUCKET_BYTES = 256 * 2**20

Pair = tuple[nn.Parameter, nn.Parameter]  # a parameter and its master


class _Bucket:
    """Parameters whose gradients are added up and sent together. All masters have one dtype."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.flat: Tensor | None = None  # what the masters' gradients are views of

    @torch.no_grad()
    def collect(self, own: bool = False) -> None:
        """Add the gradients of the parameters to those of the masters, and free them.

        Args:
            own: also of parameters that are their own masters.
        """
        wanted = [p.grad is not None and (own or p is not m) for p, m in self.pairs]
        if not any(wanted):
            return
        sizes = [m.numel() for _, m in self.pairs]
        if self.flat is None:
            self.flat = self.pairs[0][1].new_empty(sum(sizes))
        parts = zip(self.pairs, self.flat.split(sizes), wanted, strict=True)
        given = [(p, m, part.view_as(m)) for (p, m), part, is_wanted in parts if is_wanted]
        # the first gradient is copied into the sum, a later one into a temporary that is added to it
        wide = [total if p is m or m.grad is None else torch.empty_like(total) for p, m, total in given]
        torch._foreach_copy_(wide, [p.grad for p, _, _ in given if p.grad is not None])
        if more := [(total, grad) for (_, _, total), grad in zip(given, wide, strict=True) if grad is not total]:
            torch._foreach_add_(*map(list, zip(*more, strict=True)))
        for parameter, master, total in given:
            parameter.grad = None
            master.grad = total


class GradientSums:
    """The sums of the gradients of an optimizer's parameters. They are the gradients of the masters.

    Args:
        pairs: each parameter and its master, in the order of the forward pass.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        # the gradients of the last layers are computed first
        runs = groupby(reversed(pairs), lambda pair: pair[1].dtype)
        parts = (part for _, run in runs for part in buckets(run, lambda pair: pair[1].nbytes, BUCKET_BYTES))
        self.buckets = [_Bucket(part) for part in parts]
        self.sent: list[Any] = []  # the handles of the all-reduces of the buckets that were sent

    def collect(self) -> None:
        """Add the gradients of a backward pass to the sums, and free them.

        A parameter that is its own master needs nothing: PyTorch adds up its gradients.
        """
        for bucket in self.buckets:
            bucket.collect()

    @contextmanager
    def sending(self, ranks: Ranks) -> Iterator[None]:
        """Inside, a backward pass sends each bucket when it has all its gradients. All ranks send in one order."""
        missing = [len(bucket.pairs) for bucket in self.buckets]

        def computed(i: int, _: Tensor) -> None:
            missing[i] -= 1
            while len(self.sent) < len(missing) and not missing[len(self.sent)]:
                self._send(ranks)

        each = [(i, p) for i, bucket in enumerate(self.buckets) for p, _ in bucket.pairs]
        hooks = [p.register_post_accumulate_grad_hook(partial(computed, i)) for i, p in each]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _send(self, ranks: Ranks) -> None:
        """Send the next bucket. If it has no gradients here, no rank has any, and it is left out."""
        bucket = self.buckets[len(self.sent)]
        bucket.collect(own=True)
        self.sent.append(None if bucket.flat is None else ranks.begin_sum(bucket.flat))

    @record_function("communication")
    def _receive(self, ranks: Ranks) -> None:
        while len(self.sent) < len(self.buckets):
            self._send(ranks)
        for work in filter(None, self.sent):
            work.wait()
        self.sent.clear()

    def finish(self, ranks: Ranks) -> None:
        """Complete the sums. With one backward pass on one rank there are none, and the gradients stay where they are.

        All ranks call this together.
        """
        if ranks.size > 1:
            self._receive(ranks)
        elif any(bucket.flat is not None for bucket in self.buckets):
            self.collect()

    def clear(self) -> None:
        """Free all gradients."""
        for bucket in self.buckets:
            bucket.flat = None
            for weight in (weight for pair in bucket.pairs for weight in pair):
                weight.grad = None
