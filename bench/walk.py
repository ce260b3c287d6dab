"""Benches and tests one after the other, each in a process of its own: `gpu.sh` and `run.sh` are this file.

    bash bench/gpu.sh --quick OUTDIR    within 170 s on a GPU: a smoke test, a step's profile, decode steps
    bash bench/gpu.sh OUTDIR            within 9 minutes: test and profile, whole steps against the published algorithm,
                                        Janus-Pro-7B, training variants, rewards, each kernel against its peers
    bash bench/gpu.sh --tests OUTDIR    within 9.5 minutes: all tests for a GPU -> OUTDIR/tests.json
    bash bench/run.sh OUTDIR            every bench, and steps of several sizes and of several ranks, however long they
                                        take: OUTDIR/results/*.json with their pictures, and OUTDIR/RESULTS.md

gpu.sh leaves a page, RESULTS.md, an archive of all results, results.json (`python -m bicot.bench.report results.json`
makes them the package's own), and the profile's trace.json.gz; as long as it runs, each result lies in OUTDIR/results.
--device cpu takes the same way without a GPU, and --tiny with small shapes, which measure nothing.

Nothing has to be installed but torch, triton, transformers, numpy and pytest; peers take part where they import (extend
PYTHONPATH), pictures need matplotlib. A failed step does not stop the others; the last line names it and the exit
status is 1. PYTHON is the interpreter; BICOT_COMMIT names the commit where the files are no git repository.

This process imports what most benches need, and each bench is a fork of it: on a slow host the imports take longer than
many a bench. It leaves CUDA alone, so a bench that loses its context takes no other one with it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 8  # seconds of its limit that a bench which can end in time leaves
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it torch refuses deterministic products on a GPU
# What a step is measured along: the setting, its values, and the model if not the first of bench_step.
VARIED: dict[str, list[tuple[str, ...]]] = {
    "cpu": [
        ("num_generations", "2 4 8 16 32"),
        ("gradient_accumulation_steps", "1 2 4 8 16"),
        ("rollout_max_rows", "2 4 8 16"),
        ("image_tokens", "36 64 144 256", "--model", "tiny"),
    ],
    "cuda": [
        ("num_generations", "4 8 16 32"),
        ("gradient_accumulation_steps", "1 2 4 8"),
        ("rollout_max_rows", "8 16 32 64"),
        ("image_tokens", "64 144 256 576"),
    ],
}


class Step(NamedTuple):
    """`run` is given its limit, in a process of its own; `seconds` are its part of the whole.

    `imports`: it needs what is imported here.
    """

    name: str
    seconds: int
    run: Callable[[float | None], object]
    imports: bool = True


def program(name: str, seconds: int, *command: str, **environment: str) -> Step:
    def run(limit: float | None) -> None:
        sys.exit(subprocess.run(command, env={**os.environ, **environment}).returncode)

    return Step(name, seconds, run, imports=False)


def steps(mode: str, device: str, tiny: bool, out: Path) -> list[Step]:
    """Of the modes "quick", "full", "tests", and "all", which is run.sh."""
    gpu, results = device == "cuda", out / "results"

    def bench(name: str, seconds: int, *options: str, module: str = "", ends: bool = True) -> Step:
        """`ends`: it takes the option --seconds."""
        given = ["--device", device, *["--tiny"] * tiny, *options, "--output", str(results / f"{name}_{device}.json")]
        own = module or (f"bench_{name}" if name in ("step", "train", "rollout", "rewards") else "kernels")
        return Step(name, seconds, partial(_module, own, [*[name] * (own == "kernels"), *given], ends))

    def profile(seconds: int, count: int) -> Step:
        options = ["--shape", "Janus-Pro-1B"] * gpu + ["--steps", str(count)]
        return bench("step_profile", seconds, *options, module="step_profile", ends=False)

    smoke = program("smoke", 80, sys.executable, "-m", "pytest", "-q", "tests/test_smoke.py", **DETERMINISTIC)
    if mode == "quick":
        return [smoke, profile(60, 1), bench("rollout", 25)]
    if mode == "tests":
        options = ["--output", str(out / "tests.json"), *(["--seconds", "550"] if gpu else ["--collect-only"])]
        tests = program("tests", 560, sys.executable, "-m", "bicot.bench.gpu_tests", *options, **DETERMINISTIC)
        return [tests]
    if mode == "full":
        large = ["--model", "Janus-Pro-7B" if gpu else "tiny", "--ours-alone", "--repeats", "2"]
        whole = [bench("step", 105, *["--model", "Janus-Pro-1B"] * gpu, "--repeats", "2")]
        whole.append(bench("step_7b", 50, *large, module="bench_step"))
        seconds = {"train": 30, "rewards": 45, "rollout": 20, "decode_attention": 15, "token_logprobs": 20}
        seconds |= {"linear_logprobs": 20, "grpo_loss": 20, "cfg_sample": 10, "rms_norm": 15, "silu_mul": 15}
        seconds |= {"rope_kv_write": 15, "group_advantages": 15}
        return [smoke, profile(60, 1), *whole, *(bench(name, limit) for name, limit in seconds.items())]
    few = 2 if tiny else None
    varied = [
        bench(f"step_{axis}", 0, *model, "--vary", axis, *values.split()[:few], module="bench_step", ends=False)
        for axis, values, *model in VARIED[device]
    ]
    ranks = importlib.import_module("torch").cuda.device_count() if gpu else 2
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    together += ["-m", "bicot.bench.bench_step", "--device", device, *["--tiny"] * tiny]
    together += ["--output", str(results / f"step_ranks_{device}.json")]
    return [
        profile(0, 2 if gpu else 5),
        *(bench(name, 0) for name in ["step", "train", *importlib.import_module("bicot.bench.report").KERNELS]),
        *varied,
        *([program("step_ranks", 0, sys.executable, *together)] if ranks > 1 else []),
        program("report", 0, sys.executable, "-m", "bicot.bench.report", str(results)),
    ]


def _module(name: str, arguments: Sequence[str], ends: bool, limit: float | None) -> None:
    within = [] if limit is None or not ends else ["--seconds", f"{limit - MARGIN:.0f}"]
    sys.argv = [name, *arguments, *within]
    runpy.run_module(f"bicot.bench.{name}", run_name="__main__", alter_sys=True)


def _preload() -> None:
    """No module that runs as a bench may be among these."""
    for module in ("bench.models", "rewards.git_vqa", "rewards.grounding", "rewards.hps", "rewards.orm"):
        importlib.import_module(f"bicot.{module}")


def walk(todo: Sequence[Step], begin: float | None = None) -> list[str]:
    """Run the steps -> the names of those that failed.

    `begin`: since when the limits count; no step goes on beyond the sum of those up to it. None: there are no limits.
    """
    allowed, failed, imports = 0, [], any(step.imports for step in todo)
    for step in todo:
        allowed += step.seconds
        print(f"\n===== {step.name}", flush=True)
        if step.imports:
            _preload()
        start = time.monotonic()
        limit = None if begin is None else max(1.0, begin + allowed - start)
        process: Any = multiprocessing.get_context("fork").Process(target=_leader, args=(step, limit))
        process.start()
        try:
            if imports:
                _preload()  # while a step runs that does not need it
            process.join(limit and max(0.0, start + limit - time.monotonic()))
            status = 124 if process.is_alive() else process.exitcode
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.kill()
            process.join()
        print(f"===== {step.name}: exit status {status} after {time.monotonic() - start:.0f} s", flush=True)
        failed += [step.name] if status else []
    return failed


def _leader(step: Step, limit: float | None) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    step.run(limit)


def pack(out: Path) -> None:
    """A page, an archive of the results and the trace, in the place of their folder."""
    from bicot.bench.report import render

    results = out / "results"
    found = {path.name: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    (out / "results.json").write_text(json.dumps(found) + "\n")
    for trace in results.glob("*.trace.json.gz"):
        trace.replace(out / "trace.json.gz")
    (out / "RESULTS.md").write_text(render(results, pictures=False))
    shutil.rmtree(results)


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for mode in ("quick", "tests", "all"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="else a GPU, and for run.sh what there is")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    arguments = parser.parse_args()
    mode, out = arguments.mode, arguments.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # how many GPUs there are, without a CUDA context
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a killed bench has said stays
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.chdir(ROOT)
    if "BICOT_COMMIT" not in os.environ:  # now: the results will make the checkout dirty
        with suppress(OSError):  # there is no git
            told = subprocess.run(
                ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
            )
            os.environ["BICOT_COMMIT"] = told.stdout.strip()
    with tempfile.TemporaryDirectory() as links:
        # The repository root is the package: a link of that name makes it importable without an installation.
        (Path(links) / "bicot").symlink_to(ROOT)
        sys.path[0] = links  # where this file lies there are modules of common names
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [links, os.environ.get("PYTHONPATH")]))
        device = arguments.device or "cuda"
        if mode == "all" and not arguments.device:
            device = "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"
        (out if mode == "tests" else out / "results").mkdir(parents=True, exist_ok=True)
        limited = device == "cuda" and mode != "all"
        failed = walk(steps(mode, device, arguments.tiny, out), begin if limited else None)
        if mode in ("quick", "full"):
            pack(out)
    print(f"\n===== results in {out} after {time.monotonic() - begin:.0f} s")
    if failed:
        print(f"FAILED: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
