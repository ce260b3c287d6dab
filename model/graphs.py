"""CUDA graphs of prefills, decode steps and pictures are captured once for each shape, and replayed with one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch

from ..kernels.dispatch import choose, dependent_launches


def use_graphs(asked: bool | Literal["auto"], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps become CUDA graphs. "auto" = if the GPU can run Triton's kernels; otherwise it warns.

    Where Triton is missing or does not take the dtype, plain PyTorch replaces its kernels. That waits for the device in
    the middle of a step, which a CUDA graph cannot contain.

    Raises:
        ValueError: `asked` is True, and there is no GPU or Triton's kernels cannot run.
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
    """Runs steps that read and write tensors of fixed addresses, as CUDA graphs, or eagerly without a `stream`.

    Args:
        stream: captures the steps. The kernels of a graph keep this stream's priority wherever the graph is replayed.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        # off until a GPU has shown that it saves time (python -m bicot.bench.bench_rollout compares)
        self.dependent_launches = False
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None  # one pool for all: they never run at the same time

    @property
    def enabled(self) -> bool:
        return self.stream is not None

    @property
    def missing(self) -> bool:
        """Whether graphs are used, but there are none yet (at first, and after `clear`)."""
        return self.enabled and not self._graphs

    def clear(self) -> None:
        """Drop all graphs, because a tensor that they use has moved."""
        if self.stream and self._graphs:
            torch.cuda.synchronize(self.stream.device)  # none may still be running
        self._graphs.clear()
        self._memory = None

    def lacks(self, key: Hashable) -> bool:
        """Whether `capture` would capture a graph."""
        return self.enabled and key not in self._graphs

    def capture(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Capture the graph of `times` steps, if there is none yet.

        Args:
            key: identifies the graph. It has everything that the host decides in `step`, so that steps with the same
                key launch the same kernels.
            step: works on the device only, and never waits for it. It runs once before the capture, and must not
                change a result then.
            times: how often the graph repeats the step. Launching a long graph costs the host as little as a short one.
        """
        if not self.lacks(key):
            return
        with dependent_launches(self.dependent_launches):
            step()  # Triton compiles, cuBLAS picks, workspaces are allocated
            self._graphs[key] = self._record(lambda: _repeat(step, times))

    def run(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Run `step` `times` times, by the graph that was captured for the key, or eagerly."""
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
