"""The KV cache is one pool of slots for all layers. A slot holds the keys and values of one token.

A sequence reads a prefix that others may share, and a segment of its own (see kernels/decode_attention.py). So keys and
values are never copied when sequences share a prefix, end, or change batches.
P slots, H key/value heads, E head dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.kv_pool import FP8

SHARE_OF_FREE = 0.5  # of a GPU's free memory; the optimizer's moments and the activations are allocated later
SCRATCH = 0  # the slot that fillers of a batch use (see stages.py)


class KVPool:
    """Keys and values of every layer. It grows on demand up to its limit, and does not shrink until `release`.

    Args:
        config: the configuration of the language model.
        dtype: of keys and values; `torch.float8_e4m3fn` stores them with one float32 scale for each token and head.
        max_bytes: the limit; None = half of the memory that is free on a GPU when the pool grows, or no limit on a CPU.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, max_bytes: int | None) -> None:
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype, self.device, self.max_bytes = dtype, device, max_bytes
        self.scaled = dtype == FP8
        scale_bytes = 4 if self.scaled else 0
        self.bytes_per_token = 2 * self.layers * self.heads * (self.dim * dtype.itemsize + scale_bytes)
        self._asked = 0
        self._allocate(0)

    def _allocate(self, slots: int) -> None:
        self.slots = 0  # until there is memory for them
        shape = (self.layers, 2, slots, self.heads)
        self._pool = torch.empty(*shape, self.dim, dtype=self.dtype, device=self.device)
        self._scales = torch.empty(shape if self.scaled else 0, dtype=torch.float32, device=self.device)
        self.slots = slots
        self.reset()

    def reset(self) -> None:
        """Free all segments."""
        self._next = SCRATCH + 1

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return max(0, self.slots - SCRATCH - 1)

    def reserve(self, tokens: int) -> bool:
        """Free all segments and grow until `tokens` fit, or to the limit -> whether the pool has moved in memory.

        A move makes all CUDA graphs invalid. So the pool grows to an eighth more than it needs. A size that the limit
        has refused is not tried again, since free memory changes from step to step, and the pool should not.
        """
        self.reset()
        if tokens <= max(self.capacity, self._asked):
            return False
        tokens += tokens // 8
        limit = self.max_bytes
        if limit is None and self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + cached + self.slots * self.bytes_per_token
            limit = int(SHARE_OF_FREE * free)
        slots = tokens + SCRATCH + 1
        slots = slots if limit is None else min(slots, limit // self.bytes_per_token)
        if slots <= self.slots:
            self._asked = tokens
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other streams may still be reading the old pool
        self._asked = 0
        self._allocate(0)  # free the old pool first: both may not fit
        while True:
            try:
                self._allocate(slots)
                self._asked = tokens
                return True
            except torch.OutOfMemoryError:  # a smaller pool suffices, since the engine then makes smaller chunks
                slots //= 2
                if not slots:
                    raise

    def release(self) -> None:
        """Free the memory; the next `reserve` allocates what it needs."""
        self._asked = 0
        self._allocate(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise other tensors would move into the pool's memory, and keep parts of it

    def take(self, tokens: int) -> int:
        """Take a segment of `tokens` slots -> its first slot."""
        start, self._next = self._next, self._next + tokens
        assert self._next <= self.slots, "the engine plans its chunks by `capacity`"
        return start

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A layer's keys and values [P, H, E], and their scales [P, H]; without fp8, None."""
        keys, values = self._pool[index]
        if not self.scaled:
            return keys, values, None, None
        return keys, values, self._scales[index, 0], self._scales[index, 1]
