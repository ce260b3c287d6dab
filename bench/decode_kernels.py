"""decode_kernels: the kernels of a decode step by name, how long each takes, and how long none runs.

python -m bicot.bench.decode_kernels [--device cpu|cuda] [--dependent_launches] [--output FILE.json]
Our steps of bench_rollout at Janus-Pro-1B's shapes (on a CPU the toy's, and operators in the place of kernels): first
they are timed, then profiled. The gaps are the time from the first kernel to the last in which none runs. Floor: as in
bench_rollout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..grpo.profile import STEP, Launch, attributed, longest, read_trace
from ..kernels.dispatch import has_dependent_launch
from .bench_rollout import IMAGE, TEXT, TINY_IMAGE, TINY_TEXT, TOY_IMAGE, TOY_TEXT, Stage, floor_bytes, inputs, ours
from .harness import Provider, command_line, copy_gbps, finish, quantiles, save, short, start, times_ms


def cases(device: str, tiny: bool) -> list[tuple[str, torch.dtype, Stage, int, int]]:
    """Model, dtype, stage, rows and steps."""
    if tiny:
        return [("tiny", torch.float32, TINY_IMAGE, 6, 4), ("tiny", torch.float32, TINY_TEXT, 9, 4)]
    if device == "cpu":
        return [("toy", torch.float32, TOY_IMAGE, 32, 64), ("toy", torch.float32, TOY_TEXT, 16, 40)]
    stages = [(IMAGE, 32), (IMAGE, 256), (TEXT, 16)]
    return [("Janus-Pro-1B", torch.bfloat16, stage, rows, 64) for stage, rows in stages]


def traced(run: Callable[[], object], on_gpu: bool) -> list[Launch]:
    """The kernels (without a GPU, the operators) of the second of two runs, in the order of time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            with record_function(STEP):
                run()
                if on_gpu:
                    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        ranges, launches = read_trace(file)
    return sorted((launch for _, launch in attributed(ranges, launches, ranges[0].thread)), key=lambda x: x.start)


def gap_us(launches: list[Launch]) -> float:
    """From the first start to the last end, what none of them covers; `launches` in the order of time."""
    gaps, end = 0.0, launches[0].end
    for launch in launches:
        gaps += max(0.0, launch.start - end)
        end = max(end, launch.end)
    return gaps


def measure(
    model: str, dtype: torch.dtype, stage: Stage, rows: int, steps: int, device: str, tiny: bool, dependent: bool
) -> dict[str, Any]:
    """The row of a case; `dependent` times it with dependent launches too."""
    drawn = (stage.length - steps) // 2
    samples = rows // 2 if stage.name == "image" else rows
    x = inputs(model, dtype, device, "auto", stage, samples, drawn, steps)
    ms = [t / steps for t in times_ms({"": (Provider(ours), x)}, 5, device)[""]]  # the first run warms up
    launches = traced(lambda: ours(x), device == "cuda")
    floor = floor_bytes(model, dtype.itemsize, stage, samples, drawn + (steps + 1) / 2, False)
    middle = quantiles(ms)[1]
    row: dict[str, Any] = {
        "case": {"model": model, "stage": stage.name, "rows": rows, "context": stage.prompt + drawn, "steps": steps}
        | {"dtype": short(dtype)},
        "ms": [round(t, 4) for t in quantiles(ms)],
        "floor_gb": float(f"{floor / 1e9:.4g}"),
        "floor_pct": round(100 * floor / copy_gbps(device, tiny) / 1e6 / middle, 1),
        "launches": round(len(launches) / steps, 1),
        "busy_us": round(sum(launch.end - launch.start for launch in launches) / steps, 1),
        "gap_us": round(gap_us(launches) / steps, 1),
        "kernels": longest(launches, steps),
    }
    if dependent:
        x.engine.graphs.clear()
        x.engine.graphs.dependent_launches = True
        again = times_ms({"": (Provider(ours), x)}, 5, device)[""]
        row["dependent_launches_ms"] = [round(t / steps, 4) for t in quantiles(again)]
    return row


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--dependent_launches", action="store_true", help="compare steps with and without them")
    arguments, result = start(parser, __doc__, "decode_kernels")
    device, tiny = arguments.device, arguments.tiny
    if arguments.dependent_launches and not has_dependent_launch(torch.device(device)):
        parser.error("--dependent_launches needs a GPU of compute capability 9.0, and a Triton that has them")
    result |= {"ceilings": {"copy_gbps": round(copy_gbps(device, tiny), 1)}, "rows": []}
    for case in cases(device, tiny):
        result["rows"].append(measure(*case, device, tiny, arguments.dependent_launches))
        save(result, arguments.output)
    finish(result, arguments.output)


if __name__ == "__main__":
    main()
