"""Sequences of different lengths travel between modules as one flat tensor with offsets, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def int64(values: Sequence[int]) -> Tensor:
    """Python integers -> int64 on the CPU. NumPy reads them eight times as fast as torch.tensor."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


@dataclass(frozen=True)
class Packed:
    """S sequences of different lengths: sequence s is `values[offsets[s]:offsets[s + 1]]`.

    Args:
        values: [N], any dtype.
        offsets: [S + 1] int64 on the CPU, because the host needs the lengths for the shapes of tensors.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]] | Sequence[Tensor]) -> Packed:
        """Pack lists of token ids (int64, on the CPU) or 1-D tensors (their dtype and device)."""
        tensors = [seq if isinstance(seq, Tensor) else int64(seq) for seq in sequences]
        lengths = torch.tensor([0, *map(len, tensors)])
        values = torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int64)
        return cls(values, lengths.cumsum(0))

    @classmethod
    def cat(cls, several: Sequence[Packed]) -> Packed:
        """Join the sequences of several, in order."""
        return cls(
            torch.cat([packed.values for packed in several]),
            torch.cat([torch.zeros(1, dtype=torch.int64), *(packed.lengths for packed in several)]).cumsum(0),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, which: slice) -> Packed:
        """Contiguous sequences, as a view."""
        start, stop, _ = which.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Packed(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    @property
    def lengths(self) -> Tensor:
        """[S] int64 on the CPU."""
        return self.offsets.diff()

    def unpack(self) -> list[Tensor]:
        """The S sequences as views."""
        return list(self.values.split(self.lengths.tolist()))

    def tolist(self) -> list[list[int]]:
        """The S sequences as lists, in one copy from the device."""
        values = self.values.tolist()
        return [values[begin:end] for begin, end in pairwise(self.offsets.tolist())]
