"""Measures where a training step's time goes, by phase and by stream: `train.py --profile FILE.json`.

Trainer, engine and rewards name their phases with `torch.profiler.record_function`. A kernel belongs to the phase that
launched it, and all kernels of a CUDA graph belong to the phase that replayed the graph.

Every moment of a step is charged to one phase. If kernels of several phases run, it is the first of these in `PHASES`.
If no kernel runs, it is the phase that the host is in, and the moment counts as a gap. Busy time, by contrast, counts
all kernels of a phase, also those that run while an earlier phase is still running.

Without a GPU, PyTorch's operators take the place of kernels. Times in a trace are in microseconds.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, record_function

from .config import Config
from .distributed import Ranks
from .files import whole
from .trainer import Trainer, short_collections

STEP, IDLE = "step", "idle"  # the range around all phases; the name in the results for time outside of all phases
# In the order of a step. Rewards come after them, under their own names.
PHASES = ["data", "weights", "tokenizer", "prefill", "text decode", "image decode", "layout", "reference", "forward"]
PHASES += ["loss", "backward", "optimizer", "communication", "metrics", "VQ", "reward wait"]
# The parts of a step whose kernels are listed by name.
LISTED = {phase: [phase] for phase in ("text decode", "image decode", "reference")}
LISTED["update"] = ["forward", "loss", "backward", "optimizer"]
WARM_UP = 2
SHORT_US = {"cpu": 20.0, "cuda": 5.0}  # below this, launching a kernel or an operator costs more than its work
NAMES, LETTERS = 25, 120  # maximum length of a list of kernels, and of a name, which C++ templates can make very long


class Range(NamedTuple):
    """A time span that the host spends in one phase."""

    name: str
    start: float
    end: float
    thread: int


class Launch(NamedTuple):
    """A kernel, a copy, or without a GPU an operator: when which thread called it, and when it ran on which stream."""

    called: float
    thread: int
    start: float
    end: float
    stream: str
    name: str


def trained_ms(trainer: Trainer, steps: int) -> list[float]:
    """Take `steps` steps without the profiler -> milliseconds of each."""
    ends = [time.perf_counter()]
    with short_collections():
        for _ in range(steps):
            trainer._train_step()
            ends.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in itertools.pairwise(ends)]


def profiled(trainer: Trainer, steps: int, trace: Path) -> dict[str, Any]:
    """Profile `steps` steps and write their Chrome trace (gzip) -> their phases, kernels and streams."""
    on_gpu = trainer.ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    threads = _ExperimentalConfig(profile_all_threads=True)  # rewards have threads of their own
    with torch.profiler.profile(activities=activities, experimental_config=threads) as profiler:
        for _ in range(1 + steps):  # the first step includes the start of the profiler, and is left out
            with record_function(STEP):
                trainer._train_step()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        ranges, launches = read_trace(plain)
        with plain.open("rb") as events, gzip.open(trace, "wb", compresslevel=1) as out:  # level 9 takes half a minute
            shutil.copyfileobj(events, out)
    return described(ranges, launches, steps, trainer.ranks.device.type)


def read_trace(path: Path) -> tuple[list[Range], list[Launch]]:
    """Read a Chrome trace -> the phases of all steps but the first, and all launches."""
    of: dict[str, list[Any]] = defaultdict(list)
    for event in json.loads(path.read_bytes())["traceEvents"]:
        if event.get("ph") == "X":
            of[event.get("cat", "")].append(event)
    ranges = [
        Range(e["name"], e["ts"], e["ts"] + e["dur"], e["tid"])
        for e in of["user_annotation"]
        if e["name"] in (STEP, *PHASES) or e["name"].startswith("reward ")
    ]
    begin = sorted(r.start for r in ranges if r.name == STEP)[1]
    calls = (e for kind in ("cuda_runtime", "cuda_driver") for e in of[kind] if "correlation" in e.get("args", {}))
    called = {e["args"]["correlation"]: e for e in calls}
    work = [(e, f"stream {e['args']['stream']}") for kind in ("kernel", "gpu_memcpy", "gpu_memset") for e in of[kind]]
    launches = []
    for e, stream in work or [(e, "operators") for e in outermost(of["cpu_op"])]:
        call = called.get(e.get("args", {}).get("correlation"), e)
        launches.append(Launch(call["ts"], call["tid"], e["ts"], e["ts"] + e["dur"], stream, e["name"]))
    return [r for r in ranges if r.start >= begin], launches


def outermost(operators: Iterable[Any]) -> list[Any]:
    """The operators that were not called by another operator of the same thread."""
    ends: dict[int, float] = {}
    found = []
    for event in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= ends.get(event["tid"], 0.0):
            ends[event["tid"]] = event["ts"] + event["dur"]
            found.append(event)
    return found


def innermost(ranges: Iterable[Range]) -> list[Range]:
    """Split the nested ranges of one thread into consecutive parts, each with the name of its innermost range."""
    edges = [(r.start, 1, -r.end, r) for r in ranges]
    edges += [(r.end, 0, 0.0, r) for _, _, _, r in edges]
    found: list[Range] = []
    stack: list[Range] = []
    now = 0.0
    for at, begins, _, each in sorted(edges):
        if stack and at > now:
            found.append(stack[-1]._replace(start=now, end=at))
        stack.append(each) if begins else stack.pop()
        now = at
    return found


def attributed(ranges: Sequence[Range], launches: Iterable[Launch], main: int) -> list[tuple[str, Launch]]:
    """Each launch with the phase in which it was called. Launches outside of all phases are left out.

    If the thread of a launch is in no phase at that time, the phase of the thread `main` counts: autograd, for example,
    has a thread of its own.
    """
    of = {thread: innermost(r for r in ranges if r.thread == thread) for thread in {r.thread for r in ranges}}
    starts = {thread: [part.start for part in parts] for thread, parts in of.items()}
    found = []
    for launch in launches:
        for thread in (launch.thread, main):
            at = bisect_right(starts.get(thread, []), launch.called) - 1
            if at >= 0 and launch.called < of[thread][at].end:
                found.append((of[thread][at].name, launch))
                break
    return found


def rank(phase: str) -> int:
    """The place of a phase in `PHASES`. Rewards come after all of them, and idle time comes last."""
    return PHASES.index(phase) if phase in PHASES else len(PHASES) + (phase == STEP)


def charged(host: Sequence[Range], busy: Sequence[tuple[str, Launch]]) -> dict[str, tuple[float, float]]:
    """Phase -> its time, and how much of it is gaps. The times of all phases add up to the time of `host`."""
    edges = [(at, step, name, False) for name, run in busy for at, step in ((run.start, 1), (run.end, -1))]
    edges += [(at, step, part.name, True) for part in host for at, step in ((part.start, 1), (part.end, -1))]
    working: Counter[str] = Counter()
    asking, now = "", 0.0
    times: dict[str, tuple[float, float]] = {}
    for at, step, name, of_host in sorted(edges):
        if asking and at > now:
            phase = min(+working, key=rank, default=asking)
            total, gap = times.get(phase, (0.0, 0.0))
            times[phase] = total + at - now, gap if +working else gap + at - now
        now = at
        if of_host:
            asking = name if step > 0 else ""
        else:
            working[name] += step
    return times


def described(ranges: Sequence[Range], launches: Sequence[Launch], steps: int, device: str) -> dict[str, Any]:
    """The part of a result that describes the profiled steps. All numbers are for one step."""
    whole_steps = [r for r in ranges if r.name == STEP]
    main = whole_steps[0].thread
    busy = attributed(ranges, launches, main)
    times, calls = charged(innermost(r for r in ranges if r.thread == main), busy), Counter(r.name for r in ranges)
    total = sum(ms for ms, _ in times.values())
    rows, streams = [], defaultdict[str, Counter[str]](Counter)
    for name, run in busy:
        streams[run.stream][name] += run.end - run.start  # type: ignore[assignment]
    for phase in sorted(times.keys() | {name for name, _ in busy}, key=lambda phase: (rank(phase), phase)):
        (us, gap), own = times.get(phase, (0.0, 0.0)), [run for name, run in busy if name == phase]
        work = sum(run.end - run.start for run in own)
        row = {
            "phase": IDLE if phase == STEP else phase,
            "ms": round(us / steps / 1e3, 3),
            "pct": round(100 * us / total, 2),
            "calls": calls[phase] / steps,
            "gap_ms": round(gap / steps / 1e3, 3),
            "busy_ms": round(work / steps / 1e3, 3),
            "launches": round(len(own) / steps, 1),
            "launch_us": round(work / len(own), 1) if own else None,
        }
        rows.append(row | {"binds": binds(row, device)})
    kernels = {part: longest((run for name, run in busy if name in names), steps) for part, names in LISTED.items()}
    return {
        "profiled_step_ms": spread([(r.end - r.start) / 1e3 for r in whole_steps]),
        "covered_pct": round(100 - 100 * times.get(STEP, (0.0, 0.0))[0] / total, 2),
        "rows": rows,
        "kernels": {part: names for part, names in kernels.items() if names},
        "streams": {
            stream: {IDLE if name == STEP else name: round(us / steps / 1e3, 3) for name, us in streams[stream].items()}
            for stream in sorted(streams)
        }
        if device == "cuda"
        else {},
    }


def spread(ms: Sequence[float]) -> list[float]:
    return [round(of(ms), 2) for of in (min, statistics.median, max)]


def longest(launches: Iterable[Launch], steps: float) -> list[list[Any]]:
    """[name, calls in a step, microseconds in a step] of the kernels that take the most time."""
    count, us = Counter[str](), defaultdict[str, float](float)
    for launch in launches:
        count[launch.name] += 1
        us[launch.name] += launch.end - launch.start
    names = sorted(us, key=lambda name: -us[name])[:NAMES]
    return [[name[:LETTERS], round(count[name] / steps, 3), round(us[name] / steps, 2)] for name in names]


def binds(row: dict[str, Any], device: str) -> str:
    """What limits the speed of a phase, in a few words, from its row."""
    if row["phase"] == IDLE:
        return "host: work outside all phases"
    unit, ms = ("kernels" if device == "cuda" else "operators"), row["ms"]
    hidden = row["busy_ms"] - ms
    if hidden > ms:
        return f"overlap: {hidden:.3g} ms of its {unit} run beside another phase"
    if row["gap_ms"] > ms / 2:
        return f"host: no {unit} run for {row['gap_ms'] / ms:.0%} of this phase"
    mean = row["launch_us"] or 0.0
    kind = "launch" if mean < SHORT_US[device] else "work"
    return f"{kind}: {row['launches']:.0f} {unit} of {mean:.{0 if mean >= 100 else 1}f} µs"


def table(result: dict[str, Any]) -> str:
    """The phases that take at least 1 % of a step, as text of 100 columns."""
    lines = [f"{'phase':<22}{'ms':>9}{'%':>7}   bound by"]
    for row in result["rows"]:
        if row["pct"] >= 1:
            lines.append(f"{row['phase'][:22]:<22}{row['ms']:>9.1f}{row['pct']:>7.1f}   {row['binds'][:59]}")
    lines.append(
        f"a step: {result['step_ms'][1]:.1f} ms, and {result['profiled_step_ms'][1]:.1f} ms under the profiler"
    )
    return "\n".join([*lines, f"{result['images']} images a step, {result['images_per_second']} images/s"])


def step_times(trainer: Trainer, steps: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """The part of a result that describes steps without the profiler, after `warm_up` steps that are not timed."""
    trained_ms(trainer, warm_up)
    images = trainer.config.prompts_per_device * trainer.config.num_generations * trainer.ranks.size
    times = trained_ms(trainer, steps)
    return {
        "steps": steps,
        "images": images,
        "step_ms": spread(times),
        "images_per_second": float(f"{1e3 * images * steps / sum(times):.4g}"),
    }


def for_profile(config: Config, folder: str, steps: int) -> Config:
    """The settings of a run of `steps` steps that evaluates nothing, and writes only to `folder` (with rollout_only,
    also the rollouts)."""
    changes: dict[str, Any] = {"eval_file": None, "eval_steps": None, "load_best_model_at_end": False}
    changes |= {"rewards": replace(config.rewards, heldout=[]), "push_to_hub": False, "hub_model_id": None}
    if not config.rollout_only:
        changes |= {"save_rollouts": None, "save_rollout_images": False}
    if config.replay:  # it needs the files of these steps
        changes |= {"max_steps": steps, "stop_after": None}
    return replace(config, output_dir=folder, resume=None, **changes)


def profile(config: Config, file: Path, steps: int = 3) -> None:
    """Profile steps of a run instead of training. Print a table, and write `file` (JSON) and a trace beside it."""
    ranks = Ranks.start(config.ddp_timeout)
    try:
        with ranks.naming_the_lost(), tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(for_profile(config, folder, WARM_UP + 2 * steps + 1), ranks)
            result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
            result |= {"device": ranks.device.type, **step_times(trainer, steps)}
            if ranks.main:
                file.parent.mkdir(parents=True, exist_ok=True)
            trace = file.with_suffix(".trace.json.gz")
            result |= profiled(trainer, steps, trace if ranks.main else Path(folder) / trace.name)
            if ranks.main:
                with whole(file) as part:
                    part.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{table(result)}\nmore in {file}; {trace} is for https://ui.perfetto.dev")
    finally:
        ranks.close()
