"""Ragged rows as one flat tensor and its offsets: the only form variable-length text takes between modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """S rows of different lengths: row s is `values[offsets[s]:offsets[s + 1]]`.

    Args:
        values: [N], any dtype.
        offsets: [S + 1] int64 on the CPU (lengths decide shapes, which the host must know).
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]] | Sequence[Tensor]) -> Packed:
        """Pack lists of token ids (int64, on the CPU) or 1-D tensors (their dtype and device)."""
        tensors = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.int64) for row in rows]
        lengths = torch.tensor([0, *(len(row) for row in tensors)])
        values = torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int64)
        return cls(values, lengths.cumsum(0))

    @classmethod
    def cat(cls, parts: Sequence[Packed]) -> Packed:
        """The rows of all parts, in order."""
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([torch.zeros(1, dtype=torch.int64), *(part.lengths for part in parts)]).cumsum(0),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> Packed:
        """Contiguous rows, as a view."""
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Packed(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    @property
    def lengths(self) -> Tensor:
        """[S] int64 on the CPU."""
        return self.offsets.diff()

    def rows(self) -> list[Tensor]:
        """The S rows as views."""
        return list(self.values.split(self.lengths.tolist()))

    def tolist(self) -> list[list[int]]:
        """The S rows as lists, in one copy from the device."""
        values = self.values.tolist()
        return [values[begin:end] for begin, end in pairwise(self.offsets.tolist())]

    def row_of(self) -> Tensor:
        """[N] int64: which row each value belongs to, on the device of the values."""
        return upload(torch.repeat_interleave(self.lengths), self.values.device)


def upload(values: Tensor | Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A tensor, or lists of integers, on the device, without waiting for what the device is doing."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
