"""step_profile: a training step's time, phase by phase and stream by stream, and what stands between it and its floor.

python -m bicot.bench.step_profile [--device cpu|cuda] [--shape Janus-Pro-1B] [--steps 3] [--output FILE.json]
A `Trainer` takes real steps: first they are only timed, then as many under torch.profiler. On a CPU a phase's time is
the host's in the first pass, and its gap the part in which no operator runs. On a GPU it is, in the second pass, the
time in which its kernels run beside none of an earlier phase, and its gap, in which none runs and the host is in the
phase; it is busy as long as its kernels run, hidden ones too. Floors: the bytes at the measured rate of a copy, or the
FLOPs at that of a matrix product, whichever takes longer. FILE.trace.json.gz is for https://ui.perfetto.dev. What the
first pass took is written before the second begins.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig
from transformers.utils import logging

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.trainer import Trainer
from .harness import copy_gbps, finish, gemm_tflops, hardware, quantiles, save, short_collections, write_svg
from .models import SHAPES, ShapeTrainer, published_config, toy_config
from .power import Sampler
from .ranges import Charge, Recorder, Segment, Work, attribute, charge, innermost, longest, read_trace
from .step_work import NO_FLOOR, PHASES, STEP, TARGETS

COMMAND = "python -m bicot.bench.step_profile"
IDLE = "idle"  # what the results call the time that no phase covers
Make = Callable[[Config, Ranks], Trainer]
WARM_UP = 2
CLOSE = 0.6  # of the floor's rate: the phase is bound by what the floor is of
SHORT_US = {"cpu": 20.0, "cuda": 5.0}  # an operator or a kernel that takes less does little but start
# The parts of a step whose kernels are listed by name.
LISTED = {phase: [phase] for phase in ("text decode", "image decode", "reference")}
LISTED["update"] = ["forward", "loss", "backward", "optimizer"]
SHOWN = 6  # of those, in RESULTS.md
TINY = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 6}


def measure(
    make: Make,
    config: Config,
    ranks: Ranks,
    steps: int,
    trace: Path,
    tiny: bool = False,
    write: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Profile that many steps of a run with these settings; writes the Chrome `trace` (gzip).

    `write` is given what is known before the profiler starts.
    """
    device, main = ranks.device.type, threading.get_native_id()
    on_gpu = device == "cuda"
    timed, starting, traced = (Recorder(on_gpu) for _ in range(3))
    images = config.prompts_per_device * config.num_generations
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(replace(config, output_dir=folder, resume=None, eval_file=None), ranks)
        _take(WARM_UP, trainer, Recorder(on_gpu))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with Sampler(ranks.device) as sampler, short_collections():
            _take(steps, trainer, timed)
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None
        copy, gemm = copy_gbps(device, tiny), gemm_tflops(device, getattr(torch, config.dtype), tiny)
        step_ms = _milliseconds(timed)
        known = {
            "steps": steps,
            "images": images * ranks.size,  # of a step
            "step_ms": [round(ms, 2) for ms in quantiles(step_ms)],
            "images_per_second": float(f"{1e3 * images * ranks.size * steps / sum(step_ms):.4g}"),
            "peak_mib": peak,
            "power": sampler.summary(images * steps),
            "ceilings": {"copy_gbps": round(copy, 1), "gemm_tflops": {config.dtype: round(gemm, 3)}},
            "rows": [],
            "kernels": {},
            "streams": {},
            "missing": [sampler.missing] if sampler.missing else [],
        }
        write(known)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        every_thread = _ExperimentalConfig(profile_all_threads=True)
        profiling = torch.profiler.profile(activities=activities, experimental_config=every_thread)
        with profiling as profiler, short_collections():
            _take(1, trainer, starting)  # the profiler's own beginning is in it
            _take(steps, trainer, traced)
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        launches = read_trace(plain, [*starting.ranges, *traced.ranges], main)
        with plain.open("rb") as events, gzip.open(trace, "wb", compresslevel=1) as out:  # 9 takes half a minute
            shutil.copyfileobj(events, out)
    busy = attribute(traced.ranges, launches, main)
    alone, profiled = (innermost(r for r in recorder.ranges if r.thread == main) for recorder in (timed, traced))
    charges, shown = charge(profiled, busy, rank), traced if on_gpu else timed
    if not on_gpu:  # the times without the profiler; which part of them operators take, it tells
        gaps = {phase: each.gap / each.total for phase, each in charges.items()}
        charges = {
            phase: Charge(each.total, each.total * gaps.get(phase, 1))
            for phase, each in charge(alone, [], rank).items()
        }
    total = sum(each.total for each in charges.values())
    listed = {name: longest((s for s in busy if s.phase in phases), steps) for name, phases in LISTED.items()}
    return known | {
        "profiled_step_ms": [round(ms, 2) for ms in quantiles(_milliseconds(traced))],
        "covered_pct": round(100 - 100 * charges.get(STEP, Charge()).total / total, 2),
        "rows": phase_rows(charges, busy, shown, steps, device, (copy, gemm)),
        "kernels": {name: kernels for name, kernels in listed.items() if kernels},
        "streams": stream_rows(busy, steps) if on_gpu else {},
    }


def _take(steps: int, trainer: Trainer, recorder: Recorder) -> None:
    with recorder.recording(TARGETS):
        for _ in range(steps):
            trainer._train_step()


def _milliseconds(recorder: Recorder) -> list[float]:
    return [(r.end - r.start) / 1e3 for r in recorder.ranges if r.name == STEP]


def rank(phase: str) -> int:
    """The place of a phase in a step: each reward after all others, and what is idle last."""
    return PHASES.index(phase) if phase in PHASES else len(PHASES) + (phase == STEP)


def phase_rows(
    charges: dict[str, Charge],
    busy: Sequence[Segment],
    recorder: Recorder,
    steps: int,
    device: str,
    rates: tuple[float, float],
) -> list[dict[str, Any]]:
    """A row a phase, in the order of a step; numbers are of one step. `rates`: GB/s of a copy, TFLOP/s of a product."""
    launches, work_us = Counter(s.phase for s in busy), defaultdict[str, float](float)
    for segment in busy:
        work_us[segment.phase] += segment.end - segment.start
    calls = Counter(r.name for r in recorder.ranges)
    total = sum(each.total for each in charges.values())
    rows = []
    for phase in sorted(charges.keys() | launches.keys(), key=lambda phase: (rank(phase), phase)):
        each, work = charges.get(phase, Charge()), recorder.work.get(phase)
        row: dict[str, Any] = {
            "phase": IDLE if phase == STEP else phase,
            "ms": round(each.total / steps / 1e3, 3),
            "pct": round(100 * each.total / total, 2),
            "calls": calls[phase] / steps,
            "gap_ms": round(each.gap / steps / 1e3, 3),
            "busy_ms": round(work_us[phase] / steps / 1e3, 3),
            "launches": round(launches[phase] / steps, 1),
            "launch_us": round(work_us[phase] / launches[phase], 1) if launches[phase] else None,
            "floor_ms": None,
            "floor_of": None,
        }
        if work:
            ms, of = floor(work, *rates)
            row |= {"floor_ms": round(ms / steps, 3), "floor_of": of}
        rows.append(row | {"binds": binds(row, device)})
    return rows


def floor(work: Work, gbps: float, tflops: float) -> tuple[float, str]:
    """Milliseconds that the work takes at least, and what of it."""
    return max((work.bytes / gbps / 1e6, "bandwidth"), (work.flops / tflops / 1e9, "compute"))


def binds(row: dict[str, Any], device: str) -> str:
    """What a phase is bound by, in a sentence, from its row."""
    if row["phase"] == IDLE:
        return "host: what the program does between the phases"
    unit, ms = ("kernels" if device == "cuda" else "operators"), row["ms"]
    hidden = row["busy_ms"] - ms
    if hidden > ms:
        return f"hidden: {hidden:.3g} ms of its {unit} run beside an earlier phase"
    if row["gap_ms"] > ms / 2:
        return f"host: in {row['gap_ms'] / ms:.0%} of it none of its {unit} runs"
    reached = row["floor_ms"] / ms if row["floor_ms"] and ms else 0.0
    if reached >= CLOSE:
        return f"{row['floor_of']}: {reached:.0%} of the floor's rate"
    mean = row["launch_us"] or 0.0
    each = f"{row['launches']:.0f} {unit} of {mean:.{0 if mean >= 100 else 1}f} µs"
    kind = "launch" if mean < SHORT_US[device] else "work"
    return f"{kind}: {each}" + (f", {reached:.0%} of the floor's rate ({row['floor_of']})" if reached else "")


def stream_rows(busy: Sequence[Segment], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step's kernels on each stream, by phase."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for segment in busy:
        found[segment.stream][IDLE if segment.phase == STEP else segment.phase] += segment.end - segment.start
    return {
        stream: {phase: round(us / steps / 1e3, 3) for phase, us in found[stream].items()} for stream in sorted(found)
    }


def profile(
    config: Config,
    ranks: Ranks,
    output: Path | None,
    steps: int = 3,
    *,
    command: str = COMMAND,
    make: Make = Trainer,
    tiny: bool = False,
    brief: bool = False,
) -> dict[str, Any]:
    """Profile, print the table, and write `output` (.json) with the picture and the trace beside it, on the main rank.

    On other ranks the result is theirs and nothing is written. `brief`: print no more than a terminal shows.
    """
    main, device = ranks.main, ranks.device.type
    with tempfile.TemporaryDirectory() as folder:
        kept = output if output and main else None
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
        what, _, _, *how = (__doc__ or "").strip().splitlines()
        what = what.removeprefix("step_profile: ")
        result: dict[str, Any] = {
            "bench": "step_profile",
            "about": " ".join([what[0].upper() + what[1:], *how]),
            "command": command,
            **hardware(device),
            "device": device,
        }
        trace = kept.with_suffix(".trace.json.gz") if kept else Path(folder) / "trace.json.gz"
        result |= measure(make, config, ranks, steps, trace, tiny, lambda known: save(result | known, kept))
    result["trace"] = trace.name if kept else None
    if kept:
        try:
            draw(result, kept.with_suffix(".svg"))
        except ImportError as error:
            result["missing"].append(f"the picture: {error}")
    if main and brief:
        save(result, kept)
        print(short_table(result))
    elif main:
        print(section(result))
        finish(result, kept)
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """The step, its floors, and on a GPU the kernels of each stream."""
    rows = result["rows"]
    bars = {"step": {row["phase"]: row["ms"] for row in rows}}
    bars["floors"] = {row["phase"]: row["floor_ms"] or 0.0 for row in rows}
    stacked(bars | result["streams"], "ms of a step", path)


def stacked(bars: dict[str, dict[str, float]], unit: str, path: Path) -> None:
    """Bars of phases, with one colour for each of those that the first bar has; what is none of them is grey."""
    from matplotlib.figure import Figure

    bars = {fill(name, 40): bar for name, bar in bars.items()}
    figure = Figure(figsize=(10, 1.8 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(bars, 0.0)
    for i, phase in enumerate(next(iter(bars.values()))):
        widths = [bar.get(phase, 0.0) for bar in bars.values()]
        colour = "lightgrey" if phase in (IDLE, "rest") else f"C{i % 10}"
        axes.barh(
            list(bars), widths, left=list(left.values()), color=colour, hatch="//" * (i // 10), edgecolor="white",
            label=phase,
        )  # fmt: skip
        left = {name: left[name] + width for name, width in zip(bars, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    write_svg(figure, path)


def short_table(result: dict[str, Any]) -> str:
    """The phases that take at least 1 % of a step, within 100 columns."""
    lines = [f"{'phase':<22}{'ms':>9}{'%':>7}   bound by"]
    for row in result["rows"]:
        if row["pct"] >= 1:
            why = shorten(row["binds"], 59, placeholder=" …")
            lines.append(f"{shorten(row['phase'], 22, placeholder='…'):<22}{row['ms']:>9.1f}{row['pct']:>7.1f}   {why}")
    total = f"{result['step_ms'][1]:.1f} ms for {result['images']} images, {result['images_per_second']} images/s"
    return "\n".join([*lines, f"a step: {total}"])


def section(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    from .report import machine, number, table

    gpu = result["device"] == "cuda"
    header = ["phase", "ms", "%", "calls", "gap ms", *(["busy ms"] if gpu else []), "floor ms", "× floor", "bound by"]
    lines = []
    for row in result["rows"]:
        beyond = f"{row['ms'] / row['floor_ms']:.1f}" if row["floor_ms"] else ""
        why = "" if row["floor_ms"] or row["phase"] not in NO_FLOOR else f" (no floor: {NO_FLOOR[row['phase']]})"
        lines.append(
            [
                row["phase"],
                number(row["ms"]),
                f"{row['pct']:.1f}",
                f"{row['calls']:.3g}",
                number(row["gap_ms"]),
                *([number(row["busy_ms"])] if gpu else []),
                "" if row["floor_ms"] is None else number(row["floor_ms"]),
                beyond,
                row["binds"] + why,
            ]
        )
    p20, p50, p80 = map(number, result["step_ms"])
    copy, gemm = result["ceilings"]["copy_gbps"], result["ceilings"]["gemm_tflops"]
    said = [
        f"A step of {result['images']} images takes {p50} ms [{p20} to {p80}]: {number(result['images_per_second'])} "
        "images a second.",
        f"Under the profiler it takes {number(result['profiled_step_ms'][1])} ms. The phases cover "
        f"{result['covered_pct']:.1f} % of it."
        if lines
        else "The profile of it did not end.",
        f"Ceilings: copy {number(copy)} GB/s, {', '.join(f'{d} {number(rate)} TFLOP/s' for d, rate in gemm.items())}.",
    ]
    if any(row["floor_ms"] and row["floor_ms"] > row["ms"] for row in result["rows"]):
        said.append("A phase can pass its floor: the ceilings are of one large copy and one square matrix product.")
    if result["power"]:
        said.append(f"Power: {', '.join(f'{name} {value}' for name, value in result['power'].items())}.")
    said += [f"Missing: {missing}." for missing in result["missing"]]
    streams = "".join(
        f"\n- {stream}: {', '.join(f'{phase} {number(ms)} ms' for phase, ms in phases.items())}"
        for stream, phases in result["streams"].items()
    )
    names = [
        [part if not i else "", f"`{name}`", number(count), number(us)]
        for part, kernels in result.get("kernels", {}).items()
        for i, (name, count, us) in enumerate(kernels[:SHOWN])
    ]
    unit = "kernel" if gpu else "operator"
    by_name = f"\n{table(['of a step', unit, 'count', 'µs'], names)}\n" if names else ""
    return f"""## step_profile on {result.get("gpu", "the CPU")}

`{result["command"]}` on {machine(result)}.
{result["about"]} {" ".join(said)}

{table(header, lines)}
{by_name}{streams}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--shape", choices=[*SHAPES], default="toy", help="random weights, unless it is the toy")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, in each of the two passes")
    parser.add_argument("--tiny", action="store_true", help="few small samples: walks the code, measures nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, picture and trace beside it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    shape = arguments.shape
    command = f"{COMMAND} --device {arguments.device}{'' if shape == 'toy' else f' --shape {shape}'}"
    several = "WORLD_SIZE" in os.environ or arguments.device == "cuda"
    ranks = Ranks.start() if several else Ranks(0, 1, torch.device("cpu"))
    settings = toy_config if shape == "toy" else published_config
    config = settings(**TINY if arguments.tiny else {})
    make = partial(ShapeTrainer, shape, 16 if shape == "tiny" else 576)
    try:
        profile(config, ranks, arguments.output, arguments.steps, command=command, make=make, tiny=arguments.tiny)
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
