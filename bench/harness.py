"""What every bench shares: interleaved timing, the machine it ran on, and one JSON object as the last line."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def quantiles_ms(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """p20, p50 and p80 of each, interleaved so that a busy machine slows them all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up and compiles
                seconds[name].append(time.perf_counter() - start)
    deciles = {name: statistics.quantiles(values, n=10) for name, values in seconds.items()}
    return {name: [1e3 * cuts[i] for i in (1, 4, 7)] for name, cuts in deciles.items()}


def hardware() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "cpu": models[0] if models else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def finish(result: dict[str, Any], output: str | None) -> None:
    """Print the result as the last line, and write it to the file `output` if given."""
    if output:
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
