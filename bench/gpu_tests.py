"""All tests that need a GPU, in parallel on one: what fails is written down at once, and takes no other test with it.

    python -m bicot.bench.gpu_tests --output FILE.json [--seconds S] [--jobs N] [--collect-only]

Each of N pytest processes takes some tests at a time, so that none is left with a whole large file. A process ends with
the first test after which CUDA is unusable, with one that dies and with one that hangs; a new process goes on with the
tests that are left. A test that runs out of memory, which others may hold, runs once more at the end. FILE.json has
"passed", "failed", "skipped", "not_run", "seconds", "failures": [{"id", "why"}] and "not_run_ids", and is written anew
with every failure. The exit status is 0 if every test ran and none failed.

`pytest -p bicot.bench.gpu_tests` skips test files that need a package which is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ("-m", "gpu or triton")
TEST_SECONDS = 120.0  # a test that takes longer hangs
CHANNEL = "BICOT_GPU_TESTS_CHANNEL"
UNUSABLE = ("CUDA error", "Triton Error [CUDA]")  # in the message of whatever first meets a broken CUDA context
TAIL = 1000  # characters of a message that are kept


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A test file that needs a package which is not here is skipped; without our own package it is an error."""
    report: Any = yield
    lines = [line for line in str(report.longrepr).splitlines() if "ModuleNotFoundError" in line]
    if report.failed and lines and "bicot" not in lines[-1]:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {lines[-1]}")
    return report


def pytest_configure(config: pytest.Config) -> None:
    if descriptor := os.environ.pop(CHANNEL, None):  # popped: a test may start another pytest
        config.pluginmanager.register(_Loop(socket.socket(fileno=int(descriptor))))


class _Loop:
    """In a worker, in place of pytest's own loop: runs the tests that it is sent, and sends their outcomes."""

    def __init__(self, channel: socket.socket) -> None:
        channel.set_inheritable(False)
        self.lines, self.reports = channel.makefile("rw"), list[Any]()
        self.errors: dict[str, str] = {}

    def send(self, **message: Any) -> None:
        self.lines.write(json.dumps(message) + "\n")
        self.lines.flush()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = report.longreprtext[-TAIL:]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """A kernel's illegal access belongs to the test that launched it, and not to the next that waits for CUDA."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # for the other processes

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.send(tests=list(items), errors=self.errors)
        for line in self.lines:
            batch = [items[test] for test in json.loads(line)]
            for item, following in zip(batch, [*batch[1:], None], strict=True):
                self.reports.clear()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                seen = {report.outcome for report in self.reports}  # of setup, call and teardown
                outcome = next((kind for kind in ("failed", "skipped") if kind in seen), "passed")
                why = "\n".join(report.longreprtext for report in self.reports if report.failed) or outcome
                unusable = any(words in why for words in UNUSABLE)
                self.send(outcome=outcome, why=why[-TAIL:], unusable=unusable)
                if unusable:
                    os._exit(1)  # the rest of pytest, and of CUDA, may hang
        return True


class _Worker:
    """A pytest process and the channel to it."""

    def __init__(self, arguments: Sequence[str], folder: Path, threads: int) -> None:
        ours, theirs = socket.socketpair()
        self.socket, self.lines = ours, ours.makefile("rw")
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": str(threads), **os.environ}
        plugins = ("-p", "no:cacheprovider", "-p", "bicot.bench.gpu_tests")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", *plugins, *arguments],
                cwd=folder,
                env={**environment, CHANNEL: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts ends with it
            )

    def send(self, tests: list[str]) -> None:
        self.lines.write(json.dumps(tests) + "\n")
        self.lines.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """TimeoutError after `seconds`, another OSError if the process is gone."""
        self.socket.settimeout(max(seconds, 0.01))
        line = self.lines.readline()
        if not line.endswith("\n"):
            raise ConnectionError
        return json.loads(line)

    def status(self) -> int | None:
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            return None

    def printed(self) -> str:
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - TAIL))
        return self.output.read().decode(errors="replace")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self.process.wait()
        self.socket.close()
        self.output.close()


class GpuTests:
    """A run of the tests that `arguments` select in `folder`."""

    def __init__(
        self,
        output: Path | None = None,
        *,
        arguments: Sequence[str] = GPU_TESTS,
        folder: Path = ROOT,
        seconds: float = 86400,
        jobs: int = os.cpu_count() or 1,
        test_seconds: float = TEST_SECONDS,
    ) -> None:
        self.output, self.jobs, self.test_seconds = output, jobs, test_seconds
        self.command = (arguments, folder, max(1, (os.cpu_count() or 1) // jobs))
        self.start, self.seconds, self.lock = time.monotonic(), seconds, threading.RLock()
        self.tests: list[str] | None = None
        self.batches: deque[list[str]] = deque()
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.workers: list[_Worker] = []
        self.again: set[str] = set()

    @property
    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def collect(self, worker: _Worker) -> None:
        """Deal out what the first worker to get here has collected; all of them collect the same."""
        message = worker.receive(self.left)
        with self.lock:
            if self.tests is None:
                self.tests = message["tests"]
                size = max(1, len(self.tests) // (4 * self.jobs))
                for _, group in groupby(self.tests, lambda test: test.partition("::")[0]):
                    file = list(group)
                    self.batches += [file[i : i + size] for i in range(0, len(file), size)]
                for test, why in message["errors"].items():
                    self.record(test, "failed", why)

    def record(self, test: str, outcome: str, why: str) -> None:
        with self.lock:
            self.outcomes[test] = (outcome, why)
            if outcome == "failed":
                lines = why.splitlines()
                print(f"FAILED {test}: {next((s for s in lines if s.startswith('E ')), lines[0])}", flush=True)
                self.write()

    def report(self) -> dict[str, Any]:
        counts = {kind: sum(o == kind for o, _ in self.outcomes.values()) for kind in ("passed", "failed", "skipped")}
        not_run = [test for test in self.tests or () if test not in self.outcomes]
        failures = [{"id": test, "why": why} for test, (outcome, why) in self.outcomes.items() if outcome == "failed"]
        seconds = round(time.monotonic() - self.start, 1)
        return {**counts, "not_run": len(not_run), "seconds": seconds, "failures": failures, "not_run_ids": not_run}

    def write(self) -> None:
        if self.output is not None:
            file = self.output.with_suffix(".tmp")
            file.write_text(json.dumps(self.report(), indent=1))
            file.replace(self.output)

    def work(self) -> None:
        """One process after the other, until no test or no time is left."""
        batch: list[str] = []
        while (batch or self.batches or self.tests is None) and self.left > 0:
            worker = _Worker(*self.command)
            self.workers.append(worker)
            ready = usable = False
            try:
                self.collect(worker)
                ready = usable = True
                while usable and (batch := batch or self.take()):
                    worker.send(batch)
                    while usable and batch:
                        message = worker.receive(min(self.test_seconds, self.left))
                        self.settle(batch.pop(0), message["outcome"], message["why"])
                        usable = not message["unusable"]
            except OSError as error:
                if self.left <= 0:
                    return
                hung = isinstance(error, TimeoutError)
                why = f"no end after {self.test_seconds} s" if hung else f"died with status {worker.status()}"
                self.record(batch.pop(0) if ready else "collection", "failed", f"{why}\n{worker.printed()}")
                if not ready:  # nor would the next one be
                    return
            finally:
                worker.end()

    def settle(self, test: str, outcome: str, why: str) -> None:
        if "out of memory" in why and test not in self.again:
            self.again.add(test)
            self.batches.append([test])
        else:
            self.record(test, outcome, why)

    def take(self) -> list[str]:
        with self.lock:
            return self.batches.popleft() if self.batches else []

    def run(self) -> bool:
        """Whether every test ran and none failed."""
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.jobs)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # also where somebody ends this process: what runs on would disturb whoever measures next
            self.seconds = 0
            for worker in self.workers:
                worker.kill()
            self.write()
        report = self.report()
        print(", ".join(f"{report[key]} {key}" for key in ("passed", "failed", "skipped", "not_run")), flush=True)
        return bool(self.tests) and not report["failed"] and not report["not_run"]

    def collect_only(self) -> bool:
        """Print how many tests there are; whether all files could be read."""
        worker = _Worker(*self.command)
        try:
            self.collect(worker)
        finally:
            worker.end()
        print(f"{len(self.tests or ())} tests")
        return not self.outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="All tests that need a GPU, in parallel.")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--seconds", type=float, default=86400, help="what has not run by then is not run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--collect-only", action="store_true", help="print how many tests there are")
    options = parser.parse_args()
    tests = GpuTests(options.output, seconds=options.seconds, jobs=options.jobs)
    return not (tests.collect_only() if options.collect_only else tests.run())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, which ends the workers too
    sys.exit(main())
