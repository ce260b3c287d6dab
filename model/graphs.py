"""CUDA graphs of a rollout's passes: captured once for each shape, replayed without the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch

from ..kernels.dispatch import choose, dependent_launches


def use_graphs(asked: bool | Literal["auto"], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps become CUDA graphs. "auto" means on a GPU with Triton's kernels; a GPU without them warns.

    PyTorch replaces Triton's kernels where Triton is missing or does not take the dtype. It waits for the device in the
    middle of a step, which no graph can hold.

    Raises:
        ValueError: graphs are asked for and there is no GPU, or Triton's kernels cannot run.
    """
    if not asked:
        return False
    if device.type != "cuda":
        if asked is True:
            raise ValueError(f"cuda_graphs=True needs a policy on a GPU; this one is on {device}")
        return False
    try:
        choose("triton", device, dtype)
    except ValueError as error:
        if asked is True:
            raise ValueError(f"cuda_graphs=True needs the Triton kernels: {error}") from None
        warnings.warn(f"rollouts run without CUDA graphs, slower: {error}", stacklevel=3)
        return False
    return True


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


class StepGraphs:
    """Runs steps that read and write tensors of fixed addresses: as graphs, or eagerly without a `stream`.

    Args:
        stream: where steps are captured. A graph's kernels keep the priority of this stream wherever it is replayed.
        dependent_launches: captured kernels are launched as `dispatch.dependent_launches` says. Off until a GPU has
            shown that it saves time (python -m bicot.bench.decode_kernels compares).
    """

    def __init__(self, stream: torch.cuda.Stream | None, dependent_launches: bool = False) -> None:
        self.stream = stream
        self.dependent_launches = dependent_launches
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None  # one pool for all: they never run at the same time

    @property
    def enabled(self) -> bool:
        return self.stream is not None

    @property
    def missing(self) -> bool:
        """Whether graphs are wanted and there are none: at first, and after `clear`."""
        return self.enabled and not self._graphs

    def clear(self) -> None:
        """Forget all graphs: a tensor that they use has moved."""
        if self.stream and self._graphs:
            torch.cuda.synchronize(self.stream.device)  # none may still be running
        self._graphs.clear()
        self._memory = None

    def lacks(self, key: Hashable) -> bool:
        """Whether `capture` has something to do."""
        return self.enabled and key not in self._graphs

    def capture(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Make the graph of `times` steps, if there is none yet.

        Args:
            key: names everything that the host decides in `step`; steps of one key are the same launches.
            step: reads and writes on the device only, without a synchronisation. It is run, and so must change
                nothing that counts.
            times: how often the graph repeats it: launching a graph costs the host the same however long it is.
        """
        if not self.lacks(key):
            return
        with dependent_launches(self.dependent_launches):
            step()  # Triton compiles, cuBLAS picks, workspaces are allocated
            self._graphs[key] = self._record(lambda: _repeat(step, times))

    def run(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Run `step` so many times: by the graph that was captured under its key, or eagerly."""
        if self.enabled:
            return self._graphs[key].replay()
        _repeat(step, times)

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        assert self.stream
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.stream.device)
        with torch.cuda.graph(graph, pool=self._memory, stream=self.stream, capture_error_mode="thread_local"):
            step()
        self._memory = self._memory or graph.pool()
        return graph
