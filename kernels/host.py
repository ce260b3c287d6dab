"""Copies to a device and times on a device, without making the host wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[Any], device: torch.device) -> Tensor:
    """Copy a tensor or (nested lists of) numbers to the device, after the work that is already queued there."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # a copy from pageable memory would make the host wait
    return tensor.to(device, non_blocking=True)


def now(device: torch.device) -> Any:
    """A point in time: an event on the current stream of a GPU, or seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one point in time to a later one; waits for the later one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
