"""What the benches share: command line, check before timing, timer, ceilings, and one JSON object as the output.

A bench is a list of cases. A case says what every provider is given, what the true result is (in float64), and how many
bytes or FLOPs every implementation needs. These are its floor, at the measured rate of a copy or of a matrix product.
Bytes count each tensor that must be read or written once; caches are not counted on.

    {"bench", "about", "command", <machine>, "device", "ceilings": {"copy_gbps", "gemm_tflops": {dtype}},
     "rows": [{"case", "provider", "ms": [p20, p50, p80], "gbps" | "tflops", "floor_pct", "peak_mib", "error", "note"}],
     "skipped" and "failed": [{"case", "provider", "reason"}]}

If a case has steps, the times are of one step. peak_mib is the memory that one run allocates at most, its results
included (null on a CPU). A provider that cannot run here is in "skipped". One that raises or is wrong is in "failed",
has no time, and makes the exit status 1.

On a GPU the L2 cache is flushed before each run. A CPU's caches are not flushed: each run finds its inputs as the run
before left them, so a small case can be faster than the measured rate of a copy.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..grpo.files import whole
from ..kernels.dispatch import Impl
from .report import PARTS, dumps, label

Outputs = Sequence[Tensor | None]  # None: this provider does not compute it

# The largest `relative_error`. bfloat16 has eight bits, and a head rounds its logits to it before the softmax.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FLUSH_BYTES, FLUSHES = 2**28, 16  # several times the L2 cache of any GPU; together about a millisecond on a large one
SECONDS = {"cpu": 8, "cuda": 3}  # of the timed runs of a case, after three of each provider
GPU_STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "enforced.power.limit")  # of nvidia-smi


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`run` is timed on what `prepare` makes of the case's inputs: a fresh copy if `run` overwrites them.

    If `run` draws at random, `checked` is checked in its place.
    """

    run: Callable[[Any], Outputs]
    note: str = ""
    prepare: Callable[[Any], Any] | None = None
    checked: Callable[[Any], Outputs] | None = None

    def given(self, inputs: Any) -> Any:
        return self.prepare(inputs) if self.prepare else inputs


@dataclass(frozen=True, eq=False)
class Case:
    """What the providers are compared on.

    `truth` takes the inputs, and returns the function that measures a provider's error; `tolerance` is by default that
    of the dtype. `bytes` or `flops` (or a function of the inputs) is the floor. Times and floor are those of one of
    the `steps` of a run. `makes` is the name and number of the things that one step produces.
    """

    labels: dict[str, Any]
    dtype: torch.dtype
    inputs: Callable[[], Any]
    truth: Callable[[Any], Callable[[Outputs], float]]
    providers: dict[str, Provider]
    bytes: int = 0
    flops: int | Callable[[Any], float] = 0
    steps: int = 1
    makes: tuple[str, float] | None = None
    tolerance: float | None = None

    def check(self, provider: Provider, inputs: Any, error_of: Callable[[Outputs], float]) -> float:
        """The provider's error; AssertionError if it is beyond the tolerance or NaN."""
        error = error_of((provider.checked or provider.run)(provider.given(inputs)))
        tolerance = TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance
        assert error <= tolerance, f"error {error:.2g} beyond {tolerance}"
        return error


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel(device: str) -> Impl:
    """Our implementation for this device. It is asked for by name, so that no other one is ever timed in its place."""
    return "triton" if device == "cuda" else "native"


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0, std: float = 1) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)


class _Output(torch.autograd.Function):
    """The memory of x as the output of an operation, which a gradient may overwrite, unlike a leaf or its views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.new_empty(0).set_(x)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_gradients(
    run: Callable[[Any], Outputs], *, trained: int, weights: Sequence[float] | None = None
) -> Callable[[Any], Outputs]:
    """Add the backward pass to `run`: its outputs, then the gradients of its first `trained` inputs.

    The loss is the sum of the first outputs times `weights`, or without weights half the sum of the squared outputs.
    """

    def both(inputs: Sequence[Any]) -> Outputs:
        leaf = torch.zeros((), requires_grad=True)
        given = [_Output.apply(x.detach(), leaf) for x in inputs[:trained]]
        outputs: list[Any] = list(run((*given, *inputs[trained:])))
        ups = [torch.full_like(out, w) for out, w in zip(outputs, weights or (), strict=False)]
        ups = ups or [out.detach() for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs[: len(ups)], given, ups)]

    return both


def against_eager(
    labels: dict[str, Any],
    dtype: torch.dtype,
    inputs: Callable[[], Any],
    ours: Provider,
    eager: Provider,
    more: Mapping[str, Provider] | None = None,
    *,
    trained: int = 0,
    weights: Sequence[float] | None = None,
    bytes: int = 0,
    flops: int = 0,
) -> Case:
    """The case of a kernel: ours, the formula in PyTorch, that formula compiled, and more providers.

    The truth is the formula in float64. If `trained`, each provider runs forward and backward: see `with_gradients`.
    """
    wrap: Any = partial(with_gradients, trained=trained, weights=weights) if trained else torch.no_grad()
    compiled = Provider(torch.compile(eager.run, dynamic=False, fullgraph=True), "of eager", eager.prepare)
    providers = {"ours": ours, "eager": eager, "torch.compile": compiled, **(more or {})}
    providers = {name: replace(each, run=wrap(each.run)) for name, each in providers.items()}

    def truth(x: Any) -> Callable[[Outputs], float]:
        exact = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, x)
        return expect(providers["eager"].run(exact))

    return Case({**labels, "dtype": short(dtype)}, dtype, inputs, truth, providers, bytes=bytes, flops=flops)


def gpu_only(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise Unavailable("its kernel needs a GPU")


def relative_error(outputs: Outputs, expected: Sequence[Tensor]) -> float:
    """The largest of ‖x - true‖ / ‖true‖ and max|x - true| / max|true| over the outputs. NaN gives NaN."""
    errors = []
    for x, true in zip(outputs, expected, strict=True):
        if x is not None:
            difference = x.detach().double().reshape(true.shape) - true
            for norm in (torch.linalg.vector_norm, lambda t: t.abs().amax()):
                errors.append(norm(difference) / norm(true).clamp(min=1e-30))
    return float(torch.stack(errors).amax())


def expect(expected: Outputs) -> Callable[[Outputs], float]:
    return partial(relative_error, expected=[t.detach() for t in expected if t is not None])


def _run(provider: Provider, inputs: Any, flush: Tensor | None) -> tuple[float, float]:
    """Run once -> milliseconds, and the peak of allocated MiB."""
    given = provider.given(inputs)
    if flush is None:
        begin = time.perf_counter()
        outputs = provider.run(given)  # kept until the clock has stopped: freeing them takes time too
        return 1e3 * (time.perf_counter() - begin), 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(FLUSHES):
        flush.zero_()
    start.record()
    outputs = provider.run(given)  # noqa: F841
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 2**20


def measured(
    runs: Mapping[str, tuple[Provider, Any]], repeats: int, device: str, seconds: float = math.inf
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds and peak MiB of each run. Providers take turns, so that a busy machine slows them all alike.

    The first round warms up. No round begins after `seconds`, except for the first three that are timed.

    On a GPU the time is between two events on the device, after the L2 cache was flushed. Flushing also keeps the
    device busy while the host queues the run, so launches are only timed if they take longer than that.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    end_of_rounds = time.perf_counter() + seconds
    for repeat in range(repeats + 1):
        if repeat > 3 and time.perf_counter() > end_of_rounds:
            break
        for name, (provider, inputs) in runs.items():
            run = _run(provider, inputs, flush)
            found[name] += [run] if repeat else []
    return found


def quantiles(times: Sequence[float]) -> list[float]:
    """The quantiles p20, p50 and p80. A single value stands for all three."""
    if len(times) == 1:
        return [*times] * 3
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[i] for i in (1, 4, 7)]


def _best_ms(run: Callable[[], Tensor], device: str) -> float:
    return min(measured({"": (Provider(lambda _: [run()]), None)}, 10, device)[""])[0]


@functools.cache
def copy_gbps(device: str, tiny: bool) -> float:
    """GB/s of one large copy, read and written bytes counted; the best of ten."""
    source = torch.ones(2**20 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _best_ms(lambda: target.copy_(source), device) / 1e6, 1)


@functools.cache
def gemm_tflops(device: str, dtype: torch.dtype, tiny: bool) -> float:
    """TFLOP/s of one large square matrix product of random numbers; the best of ten."""
    size = 256 if tiny else 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    return round(2 * size**3 / _best_ms(lambda: a @ a, device) / 1e9, 3)


def joules() -> float | None:
    """The energy that the GPU has used since its driver was loaded; None if nvidia-ml-py cannot tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties('cuda').uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
    except pynvml.NVMLError:
        return None


def hardware(device: str) -> dict[str, Any]:
    """Machine, clocks, versions and commit. BICOT_COMMIT gives the commit if the files are not in a git repository."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model, mhz = re.search(r"model name\s*: (.*)", info), re.findall(r"cpu MHz\s*: (.*)", info)
    described = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")
    machine: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": round(max(map(float, mhz))) if mhz else None,  # of the fastest core now: the others may be idle
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": os.environ.get("BICOT_COMMIT") or described,
        "device": device,
    }
    if device == "cuda":
        import triton

        machine |= {"gpu": torch.cuda.get_device_name(), "gpu_state": gpu_state(), "triton": triton.__version__}
    return machine


def gpu_state() -> str:
    """The GPU's driver, clocks (now, after some work, and the maximum) and power limit."""
    work = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(100 * FLUSHES):  # about a tenth of a second
        work.zero_()
    torch.cuda.synchronize()
    query = [f"--id=GPU-{torch.cuda.get_device_properties('cuda').uuid}", f"--query-gpu={','.join(GPU_STATE)}"]
    told = _output("nvidia-smi", *query, "--format=csv,noheader").split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(GPU_STATE, told, strict=False))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def save(result: Mapping[str, Any], output: Path | None) -> None:
    if output:
        with whole(output) as part:
            part.write_text(dumps(result))


def finish(result: Mapping[str, Any], output: Path | None) -> int:
    """Print the result's section and, as the last line, its JSON, and save it -> the exit status."""
    save(result, output)
    print(f"\n{PARTS[result['bench']](result)}\n{json.dumps(result)}")
    return 1 if result.get("failed") else 0


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benches have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="few small shapes: walks the code, measures nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    return parser


def start(parser: argparse.ArgumentParser, doc: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line -> its arguments, and the fields that every result has.

    `doc` has a line "name: what is measured", a line with the command, and lines that say how it is measured.
    """
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    first, command, *how = filter(None, (doc or "").strip().splitlines())
    name, _, what = first.partition(": ")
    hidden = r" --(output|repeats|steps)[ =]\S+| --tiny"
    typed = re.sub(hidden, "", " ".join([command.split(" [")[0], *sys.argv[1:]]))
    about = " ".join([what[0].upper() + what[1:], *how])
    return arguments, {"bench": name, "about": about, "command": typed, **hardware(arguments.device)}


def left_out(result: dict[str, Any], kind: str, labels: Any, provider: str, problem: object) -> None:
    """Note that a provider has no time in a case; `kind` is "skipped" or "failed"."""
    reason = f"{type(problem).__name__}: {problem}" if kind == "failed" else str(problem)
    result[kind].append({"case": labels, "provider": provider, "reason": reason.split("\n")[0]})


def _measure(case: Case, result: dict[str, Any], repeats: int, device: str, tiny: bool) -> None:
    """Check every provider of one case, time those that are right, and add them to the result."""
    torch.compiler.reset()  # beyond its recompile limit torch.compile would silently run eager
    try:
        inputs = case.inputs()
    except (Unavailable, torch.OutOfMemoryError) as problem:
        for name in case.providers:
            left_out(result, "skipped", case.labels, name, problem)
        return
    error_of, flops = case.truth(inputs), case.flops(inputs) if callable(case.flops) else case.flops
    errors: dict[str, float] = {}
    for name, provider in case.providers.items():
        try:
            errors[name] = case.check(provider, inputs, error_of)
        except (ImportError, Unavailable, torch.OutOfMemoryError) as problem:
            left_out(result, "skipped", case.labels, name, problem)
        except Exception as problem:  # the exit status will be 1; the others' times are still good
            left_out(result, "failed", case.labels, name, problem)
    del error_of
    runs = measured({name: (case.providers[name], inputs) for name in errors}, repeats, device, SECONDS[device])

    floor_ms, unit, work = 0.0, "gbps", case.bytes / 1e6
    if case.bytes:
        rate = result["ceilings"]["copy_gbps"] = copy_gbps(device, tiny)
        floor_ms = case.bytes / rate / 1e6
    if flops:
        rate = gemm_tflops(device, case.dtype, tiny)
        result["ceilings"].setdefault("gemm_tflops", {})[short(case.dtype)] = rate
        floor_ms, unit, work = flops / rate / 1e9, "tflops", flops / 1e9
    for name, error in errors.items():
        times, peaks = zip(*runs[name], strict=True)
        ms, peak = [t / case.steps for t in quantiles(times)], round(max(peaks), 1) if device == "cuda" else None
        row: dict[str, Any] = {"case": case.labels, "provider": name, "ms": [round(t, 4) for t in ms]}
        row[unit] = round(work / ms[1], 3) if work else None
        row |= {"floor_pct": round(100 * floor_ms / ms[1], 1) if work else None, "peak_mib": peak}
        if case.makes:
            row |= {"makes": case.makes[0], "per_s": float(f"{1e3 * case.makes[1] / ms[1]:.4g}")}
        result["rows"].append(row | {"error": float(f"{error:.1e}"), "note": case.providers[name].note})
        print(f"{label(case.labels):60} {name:16} {ms[1]:10.4f} ms", flush=True)


def main(doc: str | None, cases: Callable[[str, bool], list[Case]]) -> int:
    """Run a bench of cases from its command line -> the exit status. `doc`: as of `start`."""
    parser = command_line(doc)
    parser.add_argument("--repeats", type=int, help="timed runs of each provider (15 on a CPU, 50 on a GPU)")
    arguments, result = start(parser, doc)
    device, tiny = arguments.device, arguments.tiny
    if tiny:
        torch.compiler.set_stance("force_eager")  # compiling would take longer than everything else
    repeats = arguments.repeats or (2 if tiny else 50 if device == "cuda" else 15)
    result |= {"ceilings": {}, "rows": [], "skipped": [], "failed": []}
    for case in cases(device, tiny):
        _measure(case, result, repeats, device, tiny)
        save(result, arguments.output)  # now, in case this process is ended before its last case
    return finish(result, arguments.output)
