"""CUDA graphs of decode steps: captured once for each shape, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 2  # runs before a capture: Triton compiles, cuBLAS picks, workspaces are allocated


class StepGraphs:
    """Runs steps that read and write tensors of fixed addresses: as graphs, or eagerly where `enabled` is false."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None  # one pool for all: they never run at the same time

    def clear(self) -> None:
        """Forget all graphs: a tensor that they use has moved."""
        if self._graphs:
            torch.cuda.synchronize()  # none may still be running
        self._graphs.clear()
        self._memory = None

    def run(self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Run `step` once.

        Args:
            key: names everything that the host decides in `step`; steps of one key are the same launches.
            step: reads and writes on the device only, without a synchronisation.
            state: what it changes, restored after the runs that warm up.
        """
        if not self.enabled:
            return step()
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, state)
        self._graphs[key].replay()

    def _capture(self, step: Callable[[], None], state: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in state]
        for _ in range(_WARM_UP):
            step()
            # each time: a second step would write to the next slot, which may be another row's
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return self._record(step)

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            step()
        self._memory = self._memory or graph.pool()
        return graph
