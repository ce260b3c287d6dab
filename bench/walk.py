"""Run benches or tests one after the other, each in a process of its own. `gpu.sh` and `run.sh` call this file.

    bash bench/gpu.sh --quick OUTDIR    at most 170 s on a GPU: a smoke test, the profile of a step, decode steps
    bash bench/gpu.sh OUTDIR            at most 9 minutes: also whole steps against the published algorithm, a step of
                                        Janus-Pro-7B, training, and each kernel against its peers
    bash bench/gpu.sh --tests OUTDIR    at most 9.5 minutes: all tests for a GPU, in parallel; needs pytest-xdist
    bash bench/run.sh OUTDIR            every bench, without a time limit

The benches leave OUTDIR/results/*.json and OUTDIR/RESULTS.md. A bench writes its file after each case, so one that is
ended at its limit (exit status 124) leaves the cases that were measured. The tests leave
OUTDIR/tests.log with a line for each test that ended, and OUTDIR/tests.xml. A test that takes over two minutes, and a
test that breaks its process, fails alone. `--device cpu` runs the same steps without a GPU, and `--tiny` uses
small shapes, whose times mean nothing.

The benches need torch, triton, transformers, numpy and pytest. Other libraries take part if they can be imported. A
failed step does not stop the others: the last line names it, and the exit status is 1. PYTHON names the interpreter,
and BICOT_COMMIT the commit if the files are not in a git repository.

Imports take longer than many a bench, so this process imports what the benches need once, and each bench is a fork of
it. This process does not initialise CUDA, so a bench that breaks its CUDA context does no harm to the next one.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {  # the limit of each bench in the 9 minutes of gpu.sh
    "train": 40, "rollout": 40, "decode_attention": 15, "decode_linear": 15, "rms_norm": 10, "silu_mul": 10,
    "rope_kv_write": 10, "group_advantages": 10, "token_logprobs": 20, "linear_logprobs": 25, "grpo_loss": 20,
    "cfg_sample": 15, "adamw": 10,
}  # fmt: skip
PRELOADED = "bicot.bench.models"  # imports what the benches need, and is not run as a bench
FILES = ("step", "train", "rollout")  # bench_step.py and so on; the other benches are in kernels.py
# Without this variable, PyTorch refuses deterministic matrix products on a GPU.
PYTEST = ["env", "CUBLAS_WORKSPACE_CONFIG=:4096:8", sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


class Step(NamedTuple):
    """A bench (a module of bicot.bench and its options) or a program (a command)."""

    name: str
    seconds: int
    words: list[str]
    is_bench: bool = True


def parallel_tests(out: Path, seconds: int, selected: Sequence[str] = ("-m", "gpu or triton")) -> list[str]:
    """The command that runs the tests; it prints each result at once, and what failed when its time is up."""
    limit = ["timeout", "--foreground", "--signal", "INT", "--kill-after", "15", str(seconds)]
    workers = ["-n", str(os.cpu_count()), "--dist", "worksteal", "--max-worker-restart", "1000"]
    each = ["-v", "--continue-on-collection-errors", "-o", "faulthandler_timeout=120"]
    each += ["-o", "faulthandler_exit_on_timeout=true", f"--junitxml={out / 'tests.xml'}"]
    command = ["env", "OMP_NUM_THREADS=1", *limit, *PYTEST, *workers, *each, *selected]
    return ["bash", "-o", "pipefail", "-c", '"$@" 2>&1 | tee "$0"', str(out / "tests.log"), *command]


def steps(mode: str, device: str, tiny: bool, out: Path) -> list[Step]:
    """The steps of the modes "quick", "full", "tests", and "all" (run.sh)."""
    gpu = device == "cuda"

    def bench(name: str, seconds: int, *options: str, module: str = "") -> Step:
        module = module or (f"bench_{name}" if name in FILES else "kernels")
        file = out / "results" / f"{name}_{device}.json"
        words = [module, *[name] * (module == "kernels"), "--device", device, *["--tiny"] * tiny, *options]
        return Step(name, seconds, [*words, "--output", str(file)])

    if mode == "tests":
        collect = [*PYTEST, "-q", "--collect-only", "-m", "gpu or triton"]
        return [Step("tests", 560, parallel_tests(out, 530) if gpu else collect, is_bench=False)]
    shape = ["--shape", "Janus-Pro-1B"] * gpu
    profile = bench("step_profile", 60, *shape, module="step_profile")
    every = [bench(name, seconds) for name, seconds in SECONDS.items()]
    if mode == "all":
        return [profile, bench("step", 0), *every]
    smoke = Step("smoke", 80, [*PYTEST, "-q", "tests/test_smoke.py"], is_bench=False)
    profile = profile._replace(words=[*profile.words, "--steps", "1"])
    if mode == "quick":
        return [smoke, profile, bench("rollout", 25)]
    large = ["--model", "Janus-Pro-7B" if gpu else "tiny", "--ours-alone", "--repeats", "2"]
    whole = bench("step", 105, *["--model", "Janus-Pro-1B"] * gpu, "--repeats", "2")
    return [smoke, profile, whole, bench("step_7b", 50, *large, module="bench_step"), *every]


def _run(step: Step) -> None:
    os.setpgid(0, 0)  # whoever ends this process can end what it starts too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not step.is_bench:
        sys.exit(subprocess.run(step.words).returncode)
    sys.argv = step.words
    runpy.run_module(f"bicot.bench.{step.words[0]}", run_name="__main__", alter_sys=True)


def walk(todo: Sequence[Step], begin: float | None = None) -> list[str]:
    """Run the steps; return the names of those that failed.

    Args:
        begin: the time from which the limits count. A step may also use what the steps before it left. None: there is
            no limit.
    """
    allowed, failed = 0, []
    for step in todo:
        allowed += step.seconds
        print(f"\n===== {step.name}", flush=True)
        if step.is_bench:
            importlib.import_module(PRELOADED)
        start = time.monotonic()
        limit = None if begin is None else max(1.0, begin + allowed - start)
        process: Any = multiprocessing.get_context("fork").Process(target=_run, args=(step,))
        process.start()
        try:
            if any(other.is_bench for other in todo):
                importlib.import_module(PRELOADED)  # while a program runs
            process.join(limit and max(0.0, start + limit - time.monotonic()))
            status = 124 if process.is_alive() else process.exitcode
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        print(f"===== {step.name}: exit status {status} after {time.monotonic() - start:.0f} s", flush=True)
        failed += [step.name] if status else []
    return failed


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for mode in ("quick", "tests", "all"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU; for run.sh a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="few small shapes, whose times mean nothing")
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    arguments = parser.parse_args()
    mode, out = arguments.mode, arguments.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() must not initialise CUDA
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # keeps what a killed bench printed
    os.chdir(ROOT)
    if "BICOT_COMMIT" not in os.environ and shutil.which("git"):  # now: writing the results makes the checkout dirty
        describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        os.environ["BICOT_COMMIT"] = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as links:
        # The repository root is the package: a link of that name makes it importable without an installation.
        (Path(links) / "bicot").symlink_to(ROOT)
        sys.path[0] = links  # this file's own folder has modules with common names
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [links, os.environ.get("PYTHONPATH")]))
        device = arguments.device or "cuda"
        if mode == "all" and not arguments.device:
            device = "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"
        (out if mode == "tests" else out / "results").mkdir(parents=True, exist_ok=True)
        limited = device == "cuda" and mode != "all"
        failed = walk(steps(mode, device, arguments.tiny, out), begin if limited else None)
        if mode != "tests":
            importlib.import_module("bicot.bench.report").write(out / "results")
    print(f"\n===== results in {out} after {time.monotonic() - begin:.0f} s")
    if failed:
        print(f"FAILED: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
