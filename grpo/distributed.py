"""One process per device, started by torchrun (or a single process without it); replicas and summed gradients.

The loss divides by counts of the whole step, over all ranks, so gradients are summed, not averaged: two ranks equal
one rank with twice the accumulation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the others, and what they do together. Alone, every method returns its input."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> Ranks:
        """Join the group that torchrun's environment describes: NCCL with GPUs, gloo without."""
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(int(os.environ.get("RANK", 0)), size, device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def max(self, value: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` of all parameters over the ranks, in one flat message."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def cat(self, value: Tensor) -> Tensor:
        """[n, …] of every rank -> [size·n, …] in rank order; n is the same everywhere."""
        if self.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def gather(self, values: list[Any]) -> list[Any]:
        """Lists of picklable things, joined in rank order, on every rank."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]
