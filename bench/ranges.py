"""Named ranges around the methods of a running program, and what the time between them was spent on.

A `Recorder` wraps functions for as long as it records, and gives them back as they were. What it notes is on the host's
clock; a kernel's range is the one in which it was launched, which torch.profiler's trace tells (for all kernels of a
CUDA graph, the range that replayed it). Times are in microseconds, as in such a trace.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import threading
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events
CALLS = ("cuda_runtime", "cuda_driver")
LISTED, LETTERS = 25, 120  # kernels in a table, and of their names, which template arguments make long
OPERATORS = "operators"  # what stands in for a stream where there is no GPU


class Work(NamedTuple):
    """What no implementation can do without."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.bytes + other.bytes, self.flops + other.flops)


class Target(NamedTuple):
    """A function to be wrapped: `owner.attribute`, a method or a module's function.

    `name` of its range, or a function of its arguments that gives it. `work(result, *arguments)` says what a call was
    worth: Work by the name of a range.
    """

    owner: Any
    attribute: str
    name: str | Callable[..., str]
    work: Callable[..., Mapping[str, Work]] | None = None


class Range(NamedTuple):
    name: str
    start: float
    end: float
    thread: int


class Recorder:
    """Notes the ranges of all threads, and the work done in them."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.ranges: list[Range] = []
        self.work: dict[str, Work] = defaultdict(Work)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """In the trace of torch.profiler and, on a GPU, in that of Nsight Systems too."""
        with torch.profiler.record_function(name):
            if self.on_gpu:
                torch.cuda.nvtx.range_push(name)
            start = time.perf_counter_ns()
            try:
                yield
            finally:
                self.ranges.append(Range(name, start / 1e3, time.perf_counter_ns() / 1e3, threading.get_native_id()))
                if self.on_gpu:
                    torch.cuda.nvtx.range_pop()

    @contextmanager
    def recording(self, targets: Sequence[Target]) -> Iterator[None]:
        """Wrap the targets for as long as this lasts."""
        before = [vars(target.owner)[target.attribute] for target in targets]
        for target, function in zip(targets, before, strict=True):
            setattr(target.owner, target.attribute, self._wrapped(function, target))
        try:
            yield
        finally:
            for target, function in zip(targets, before, strict=True):
                setattr(target.owner, target.attribute, function)

    def _wrapped(self, function: Callable[..., Any], target: Target) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            name = target.name if isinstance(target.name, str) else target.name(*args, **options)
            with self.range(name):
                result = function(*args, **options)
            if target.work:
                for phase, work in target.work(result, *args, **options).items():
                    self.work[phase] += work
            return result

        return wrapper


class Segment(NamedTuple):
    """A stretch of a thread, or of a stream of the device, that belongs to one phase."""

    start: float
    end: float
    phase: str
    stream: str = ""
    name: str = ""  # of the kernel


def innermost(ranges: Iterable[Range]) -> list[Segment]:
    """Of one thread: at every time the innermost range, in order and without overlap."""
    found: list[Segment] = []
    stack: list[Range] = []
    now = 0.0
    for each in [*sorted(ranges, key=lambda r: (r.start, -r.end)), Range("", math.inf, math.inf, 0)]:
        while stack:
            end = min(stack[-1].end, each.start)
            if end > now:
                found.append(Segment(now, end, stack[-1].name))
            now = end
            if stack[-1].end > each.start:
                break
            stack.pop()
        now = each.start
        stack.append(each)
    return found


class Launch(NamedTuple):
    """A kernel or a copy (without a GPU, an operator): when and where it was asked for, and when and where it ran."""

    called: float
    thread: int
    start: float
    end: float
    stream: str
    name: str


def read_trace(path: Path, ranges: Sequence[Range], thread: int) -> list[Launch]:
    """The launches of a Chrome trace of torch.profiler, on the clock of `ranges`, recorded together with it.

    `thread` is one whose ranges the trace holds: they tell the two clocks apart.
    """
    events = [event for event in json.loads(path.read_bytes())["traceEvents"] if event.get("ph") == "X"]
    of: dict[str, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        of[event.get("cat", "")].append(event)
    names = {r.name for r in ranges}
    noted = [e["ts"] for e in of["user_annotation"] if e["tid"] == thread and e["name"] in names]
    recorded = sorted(r.start for r in ranges if r.thread == thread)
    offset = statistics.median(r - t for r, t in zip(recorded, noted, strict=True))
    calls = {e["args"]["correlation"]: e for c in CALLS for e in of[c] if "correlation" in e.get("args", {})}
    work = [(e, f"stream {e['args']['stream']}") for category in DEVICE_WORK for e in of[category]]
    found = []
    for e, stream in work or ((e, OPERATORS) for e in _outermost(of["cpu_op"])):
        call = calls.get(e.get("args", {}).get("correlation"), e)
        start = e["ts"] + offset
        found.append(Launch(call["ts"] + offset, call["tid"], start, start + e["dur"], stream, e["name"]))
    return found


def _outermost(operators: Sequence[Any]) -> Iterator[Any]:
    """Those that no other one of their thread called; `operators` in the order of time."""
    ends: dict[int, float] = {}
    for event in operators:
        if event["ts"] >= ends.get(event["tid"], -math.inf):
            ends[event["tid"]] = event["ts"] + event["dur"]
            yield event


def attribute(ranges: Sequence[Range], launches: Sequence[Launch], main: int) -> list[Segment]:
    """Each launch with the phase that it was called in; those of no phase are left out.

    A thread that has no range at that time, such as autograd's, works for the thread `main`.
    """
    of = {thread: innermost(r for r in ranges if r.thread == thread) for thread in {r.thread for r in ranges}}
    starts = {thread: [segment.start for segment in segments] for thread, segments in of.items()}
    found = []
    for launch in launches:
        for thread in (launch.thread, main):
            at = bisect_right(starts.get(thread, []), launch.called) - 1
            if at >= 0 and launch.called < of[thread][at].end:
                found.append(Segment(launch.start, launch.end, of[thread][at].phase, launch.stream, launch.name))
                break
    return found


def longest(launches: Iterable[Launch | Segment], steps: float) -> list[list[Any]]:
    """[name, count a step, microseconds a step] of the kernels that take most of the time, the longest first."""
    count, us = Counter[str](), defaultdict[str, float](float)
    for launch in launches:
        count[launch.name] += 1
        us[launch.name] += launch.end - launch.start
    names = sorted(us, key=lambda name: -us[name])[:LISTED]
    return [[name[:LETTERS], round(count[name] / steps, 3), round(us[name] / steps, 2)] for name in names]


class Charge(NamedTuple):
    """Of a phase: the time that it cost, and how much of it nothing ran but the host."""

    total: float = 0.0
    gap: float = 0.0


def charge(host: Sequence[Segment], busy: Sequence[Segment], rank: Callable[[str], int]) -> dict[str, Charge]:
    """Give every moment of the thread `host` to one phase: of those at work on the device the one of least rank, and
    where none is, the host's own. So the totals add up to the time of `host`, whatever overlaps.
    """
    edges = [(time, step, s, False) for s in busy for time, step in ((s.start, 1), (s.end, -1))]
    edges += [(time, step, s, True) for s in host for time, step in ((s.start, 1), (s.end, -1))]
    working: Counter[str] = Counter()
    asking: Segment | None = None
    charges: dict[str, Charge] = defaultdict(Charge)
    now = 0.0
    for at, step, segment, of_host in sorted(edges, key=lambda edge: edge[:2]):
        if asking and at > now:
            total, gap = charges[phase := min(working, key=rank, default=asking.phase)]
            charges[phase] = Charge(total + at - now, gap if working else gap + at - now)
        now = at
        if of_host:
            asking = segment if step > 0 else None
        else:
            working[segment.phase] += step
            if not working[segment.phase]:
                del working[segment.phase]
    return dict(charges)
