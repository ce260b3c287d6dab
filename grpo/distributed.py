"""Data parallelism: one process (rank) per device, started by torchrun, or a single process without it.

The loss is divided by the counts of the whole step over all ranks, so gradients are summed, not averaged. Two ranks
train like one rank with twice as many gradient accumulation steps.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

TIMEOUT = 1800.0
_DEATH_SECONDS = 2.0  # when a rank ends, its connection breaks up to this long before its process is gone


Result = TypeVar("Result")
Item = TypeVar("Item")


class RankLost(RuntimeError):
    """Another rank ended or hangs, and this one cannot go on without it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and what they do together. In a single process, every method returns its input."""

    rank: int
    size: int
    device: torch.device
    processes: tuple[tuple[str, int], ...] = ()  # host and pid of every rank
    store: Any = None  # torchrun's key-value store, if there are several ranks
    timeout: float = TIMEOUT
    watch: _Watch | None = None  # under torchrun
    turns: Iterator[int] = field(default_factory=itertools.count)  # numbers the meetings, equally on all ranks

    @classmethod
    def start(cls, timeout: float = TIMEOUT) -> Ranks:
        """Join the process group that torchrun's environment variables describe, with NCCL on GPUs and gloo without.

        If torchrun ends for whatever reason, its ranks end too. A collective may take `timeout` seconds; if one takes
        longer, NCCL ends the process by itself.
        """
        watch = _Watch(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        rank, size, store = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), None
        if size > 1:
            limit = timedelta(seconds=timeout)
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, rank=rank, world_size=size, store=store)
            store = dist.PrefixStore("bicot", store)
        alone = cls(rank, size, device, store=store, timeout=timeout, watch=watch)
        return replace(alone, processes=tuple(alone.gather([(socket.gethostname(), os.getpid())])))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.watch:
            self.watch.stop()
        if dist.is_initialized():  # in a single process DeepSpeed does that
            dist.destroy_process_group()

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Raise RankLost if another rank ended, instead of the connection error or torchrun's SIGTERM."""
        try:
            yield
        except (RuntimeError, KeyboardInterrupt) as error:
            broken = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
            if not broken and str(error) != "SIGTERM":
                raise
            # torchrun sends SIGTERM to the remaining ranks: ignore it until the reason is found
            previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = self._lost(_DEATH_SECONDS if broken else 0.0)
            signal.signal(signal.SIGTERM, previous)
            if lost is not None:
                raise self._ended(lost) from error
            if "Timed out waiting" in str(error):
                place = self._at(self.rank).partition(" ")[2] or "the start"
                late = f"another rank did not come to a collective within {self.timeout:g} s (ddp_timeout)"
                raise RankLost(f"{late}; all were last seen at {place}") from error
            if broken and len({host for host, _ in self.processes}) > 1:
                why = "a rank on another machine ended, or the network failed; see the logs there"
                raise RankLost(f"{why}: {error}") from error
            raise

    def _lost(self, seconds: float) -> int | None:
        """The first rank on this host whose process is gone, or goes within `seconds`; None if there is none."""
        here, deadline = socket.gethostname(), time.monotonic() + seconds
        while True:
            for rank, (host, pid) in enumerate(self.processes):
                if host == here and not _alive(pid):
                    return rank
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def _ended(self, rank: int) -> RankLost:
        return RankLost(f"{self._name(rank)} ended, so this rank ends too; {_log_of(rank)}")

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self.processes[rank][1]})"

    def _at(self, rank: int) -> str:
        """Where a rank was at its last meeting: the meeting's number, a space, the place; empty before the first."""
        return self.store.get(f"at {rank}").decode() if self.store.check([f"at {rank}"]) else ""

    def _wait(self, key: str, seconds: float = math.inf) -> bool:
        """Wait up to `seconds` for a key in the store -> whether it came. The store's `wait` would block signals."""
        start = time.monotonic()
        while True:
            lost = self._lost(0)
            if self.store.check([key]):
                return True
            if lost is not None:
                raise self._ended(lost)
            if (waited := time.monotonic() - start) > seconds:
                return False
            time.sleep(min(0.1, max(0.001, waited / 50)))

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 -> its result, on every rank. The others wait without a timeout."""
        if self.store is None:
            return work()
        key = f"done {next(self.turns)}"
        if not self.main:
            self._wait(key)
            if not (done := self.store.get(key)):
                raise RankLost(f"{self._name(0)} failed, so this rank ends too; {_log_of(0)}")
            return pickle.loads(done)
        done = b""
        try:
            result = work()
            done = pickle.dumps(result)
        finally:
            self.store.set(key, done)
        return result

    @record_function("communication")
    def meet(self, step: int) -> dict[str, float]:
        """Wait for all ranks in the middle of a step -> the longest wait, and the slowest rank, which waited least.

        Raises:
            RankLost: a rank did not come within the timeout.
        """
        if self.store is None:
            return {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start, turn = time.perf_counter(), next(self.turns)
        self.store.set(f"at {self.rank}", f"{turn} step {step}")
        if self.store.add(f"came {turn}", 1) == self.size:
            self.store.set(f"all {turn}", "")
        if not self._wait(f"all {turn}", self.timeout):
            late = next(rank for rank in range(self.size) if not self._at(rank).startswith(f"{turn} "))
            raise RankLost(
                f"step {step}: {self._name(late)} still has no scores, {self.timeout:g} s (ddp_timeout) after "
                f"{self._name(self.rank)}: it hangs or is slow; {_log_of(late)}"
            )
        waits = self.cat(torch.tensor([time.perf_counter() - start]))
        return {"seconds/wait": waits.max().item(), "slowest_rank": int(waits.argmin())}

    @record_function("communication")
    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    @record_function("communication")
    def max(self, value: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def begin_sum(self, value: Tensor) -> Any:
        """Begin to sum over the ranks, in place; `.wait()` of the result makes this stream wait for the sum."""
        return dist.all_reduce(value, async_op=True)

    @record_function("communication")
    def cat(self, value: Tensor) -> Tensor:
        """[n, …] of every rank -> [size·n, …] in rank order, on the device of `value`. n must be equal on all ranks."""
        if self.size == 1:
            return value
        own = value.to(self.device).contiguous()  # NCCL cannot send host memory
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts).to(value.device)

    @record_function("communication")
    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, joined in rank order, on every rank. Their values must be picklable."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


def buckets(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Divide the items, in order, into lists of total size `most` at most, but of at least one item."""
    bucket: list[Item] = []
    total = 0
    for item in items:
        if bucket and total + size(item) > most:
            yield bucket
            bucket, total = [], 0
        bucket.append(item)
        total += size(item)
    if bucket:
        yield bucket


class _Watch:
    """A thread that ends this process when its parent is gone, since nobody else would.

    PR_SET_PDEATHSIG would act too early, when the thread that started this process ends.
    """

    def __init__(self, parent: int) -> None:
        self.parent, self.stopped = parent, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread. If it still ran when Python ends, Python would break it off, and the process may abort."""
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        while os.getppid() == self.parent:
            if self.stopped.wait(0.5):
                return
        try:  # not `print`, since the main thread may be inside it
            said = f"\ntorchrun (process {self.parent}) ended, so this rank ends too; continue with --resume auto\n"
            os.write(2, said.encode())
        finally:
            os._exit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _log_of(rank: int) -> str:
    """Text that says where to find the log of a rank on this host."""
    # torchrun's variable names …/<local rank>/error.json; stderr.log is beside it if torchrun keeps logs
    own, first = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")), int(os.environ.get("RANK", 0))
    local = rank - first + int(os.environ.get("LOCAL_RANK", 0))
    log = own.parent.parent / str(local) / "stderr.log"
    written = "its log is above; torchrun --log-dir DIR --tee 3 writes one per rank"
    return f"log of rank {rank}: {log}" if log.is_file() else written


def resume_command() -> str:
    """The command that continues this run from its newest checkpoint."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([*sys.orig_argv, "--resume", "auto"])
    several = " …" if int(os.environ["GROUP_WORLD_SIZE"]) > 1 else ""  # each machine has options of its own
    command = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}{several}"
    return f"{command} {shlex.join([*sys.argv, '--resume', 'auto'])}"
