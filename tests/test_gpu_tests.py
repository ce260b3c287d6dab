"""The parallel run of the GPU tests, on throw-away tests: a bad test fails alone, whatever it does to its process."""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bicot.bench import gpu_tests
from bicot.bench.gpu_tests import GpuTests

GPU = ["-m", "gpu"]
GOOD = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(6))
def test_passes(i):
    pass

@pytest.mark.gpu
def test_skips():
    pytest.skip("not today")

@pytest.mark.gpu
def test_fails():
    assert 1 + 1 == 3

def test_for_a_cpu():
    raise AssertionError("not selected")
"""
POISONED = """
import pytest

poisoned = False
pytestmark = pytest.mark.gpu

def use_cuda():
    if poisoned:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(3))
def test_before(i):
    use_cuda()

def test_poisons():
    global poisoned
    poisoned = True
    use_cuda()

@pytest.mark.parametrize("i", range(9))
def test_after(i):
    use_cuda()
"""
LATE = """
import sys
import types

import pytest

pytestmark = pytest.mark.gpu
broken = False

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: unspecified launch failure")

cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize, empty_cache=lambda: None)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_launches_what_fails_later():
    global broken
    broken = True

def test_after():
    assert not broken
"""
DEADLY = """
import os
import time

import pytest

pytestmark = pytest.mark.gpu

def test_before():
    pass

def test_dies():
    os.kill(os.getpid(), 9)

def test_between():
    pass

def test_hangs():
    time.sleep(600)

def test_after():
    pass
"""
SLOW = """
import time

import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(9))
def test_sleeps(i):
    time.sleep(0.5)
"""

TIGHT = """
import pytest

tried = False

@pytest.mark.gpu
def test_fits_at_the_second_time():
    global tried
    before, tried = tried, True
    if not before:
        raise RuntimeError("CUDA out of memory")
"""


def write(folder: Path, **files: str) -> Path:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    return folder


def run(folder: Path, *, jobs: int = 2, **options: Any) -> tuple[bool, dict]:
    """Whether all is well, and the report."""
    output = folder / "report.json"
    options = {"arguments": GPU, "seconds": 60, "test_seconds": 2} | options
    good = GpuTests(output, folder=folder, jobs=jobs, **options).run()
    return good, json.loads(output.read_text())


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_bad_test_fails_alone(jobs: int, tmp_path: Path) -> None:
    write(tmp_path, good=GOOD, poisoned=POISONED, late=LATE, deadly=DEADLY, broken="1 / 0", needs="import no_such")
    good, report = run(tmp_path, jobs=jobs)
    whys = {failure["id"].rpartition("::")[2]: failure["why"] for failure in report["failures"]}
    expected = {
        "test_fails": "assert (1 + 1) == 3",
        "test_poisons": "CUDA error: an illegal memory access",
        "test_launches_what_fails_later": "CUDA error: unspecified launch failure",
        "test_dies": "died with status -9",
        "test_hangs": "no end after 2 s",
        "test_broken.py": "ZeroDivisionError",
    }
    assert whys.keys() == expected.keys() and all(words in whys[name] for name, words in expected.items())
    assert (report["passed"], report["failed"], report["skipped"]) == (6 + 3 + 9 + 1 + 3, 6, 1)
    assert not good and report["not_run"] == 0 and not report["not_run_ids"] and report["seconds"] > 2


def test_all_is_well(tmp_path: Path) -> None:
    good, report = run(write(tmp_path, good=GOOD.replace("== 3", "== 2"), needs="import no_such", tight=TIGHT))
    assert good and report["passed"] == 8 and report["skipped"] == 1 and not report["failures"]


def test_what_time_does_not_suffice_for_is_not_run(tmp_path: Path) -> None:
    good, report = run(write(tmp_path, slow=SLOW), jobs=1, seconds=2)
    assert not good and report["failed"] == 0 and 1.9 < report["seconds"] < 6
    assert report["not_run"] == len(report["not_run_ids"]) == 9 - report["passed"] > 2
    assert report["not_run_ids"][-1] == "test_slow.py::test_sleeps[8]"


def test_no_tests_and_no_pytest_are_no_success(tmp_path: Path) -> None:
    write(tmp_path, slow="")
    assert not run(tmp_path)[0]
    good, report = run(tmp_path, arguments=["--no-such-option"])
    assert not good and "no-such-option" in report["failures"][0]["why"]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here = functools.partial(GpuTests, arguments=GPU, folder=write(tmp_path, good=GOOD))
    monkeypatch.setattr(gpu_tests, "GpuTests", here)
    for options, status, printed in (
        (["--collect-only"], 0, "8 tests"),
        (["--jobs", "2", "--output", str(tmp_path / "out.json")], 1, "6 passed, 1 failed, 1 skipped, 0 not_run"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_tests", *options])
        assert gpu_tests.main() == status and capsys.readouterr().out.splitlines()[-1] == printed


def test_whoever_ends_it_ends_its_processes(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    write(tmp_path, slow=SLOW.replace("0.5", "600").replace("    time", "    open('begun', 'w').close()\n    time"))

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    tests = GpuTests(arguments=GPU, folder=tmp_path, jobs=1)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        tests.run()
    signal.signal(signal.SIGINT, before)
    assert [worker.process.wait(10) for worker in tests.workers] == [-signal.SIGKILL]
