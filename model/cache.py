"""A KV cache whose rows have their own lengths, in the form transformers' models write to.

Row b keeps its keys and values in slots 0 … length_b - 1, contiguous and without padding, whatever the other rows
hold: so a sample sees the same positions alone and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """Keys and values [rows, kv_heads, capacity, head_dim] of one layer, written at the slots its cache names."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, dim = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.owner.capacity, dim)
        self.values = value_states.new_zeros(rows, heads, self.owner.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        self.keys[rows, :, self.owner.slots] = key_states.transpose(1, 2)
        self.values[rows, :, self.owner.slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.owner.longest], self.values[:, :, : self.owner.longest]

    def take(self, rows: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    # What transformers asks of a layer when it builds a mask. With an empty cache (the prefill) it builds the plain
    # causal mask; afterwards `SlotCache.mask` is passed in whole.
    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SlotCache(Cache):
    """One `_SlotLayer` per decoder layer.

    Use: `advance(n)` before each forward of n new tokens a row, then pass `position_ids=cache.slots` and
    `attention_mask=cache.mask()` (None for the prefill, whose mask is plainly causal).

    Args:
        num_layers: decoder layers.
        capacity: tokens a row can hold.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device | str) -> None:
        self.slot_layers = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=[*self.slot_layers])
        self.capacity = capacity
        self.device = device
        self.longest = 0  # a row is never longer than this; kept on the host, so no synchronisation
        self.slots = torch.empty(0, dtype=torch.int64, device=device)  # [rows, n] of the tokens being written

    def prefill(self, lengths: Tensor) -> None:
        """Announce right-padded prompts of `lengths` [rows] tokens; what lands behind a row's end is overwritten."""
        self.lengths = lengths.to(self.device)
        self.longest = int(lengths.max())
        self.slots = torch.arange(self.longest, device=self.device).expand(len(lengths), -1)

    def advance(self) -> None:
        """Announce one more token for every row."""
        self.slots = self.lengths[:, None]
        self.lengths = self.lengths + 1
        self.longest += 1

    def mask(self) -> Tensor:
        """[rows, 1, 1, longest] bool: the slots that the announced token attends to, its own among them."""
        return torch.arange(self.longest, device=self.device) < self.lengths[:, None, None, None]

    def take(self, rows: Tensor) -> None:
        """Keep `rows` [n] int64, in that order; a row may be repeated (G samples of one prompt) or left out."""
        self.lengths = self.lengths[rows]
        for layer in self.slot_layers:
            layer.take(rows)
