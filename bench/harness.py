"""What the kernel benches share: command line, check before timing, timer, ceilings, and one JSON object as the output.

A bench is a list of cases. A case says what every provider is given, what is true (in float64) and how many bytes or
FLOPs no implementation can do without: its floor, at this machine's measured copy bandwidth and matrix product rate.
Bytes count the tensors that must be read and written once; caches are not counted on.

    {"bench", "about", "command", <machine>, "device", "ceilings": {"copy_gbps", "gemm_tflops": {dtype}},
     "rows": [{"case", "provider", "ms": [p20, p50, p80], "gbps" | "tflops", "floor_pct", "peak_mib", "error", "note"}],
     "skipped" and "failed": [{"case", "provider", "reason"}]}

Times are of one step where a case has steps. peak_mib is what one run allocates at most, its results included (null on
a CPU). A provider that cannot run here is in "skipped"; one that raises or is wrong is in "failed", has no time, and
the exit status is 1.

On a GPU no run finds its inputs in the L2 cache: it is flushed before each, and small inputs take turns with copies of
them. On a CPU there is neither, since no rotation would be fair there: what overwrites its input is given a copy that
was written just now. All find theirs as warm as the run before left them, and small cases can pass the copy rate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..grpo.files import whole
from ..kernels.dispatch import Impl
from .report import PARTS, dumps, label

ROOT = Path(__file__).resolve().parent.parent
Outputs = Sequence[Tensor | None]  # None: this provider does not compute it

# Of `relative_error`. bfloat16: eight bits, and logits that a head rounds to them before the softmax.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FLUSH_BYTES, FLUSHES = 2**28, 16  # several times the L2 cache of any GPU; together about a millisecond on a large one
SMALL_BYTES, TURNS = 2**26, 5  # inputs of at most so many bytes, which an L2 cache might hold, are there so many times
GPU_STATE = {  # of `hardware`, and what nvidia-smi calls it
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "enforced.power.limit",
}


class Unavailable(Exception):
    """A provider cannot run here, and why."""


@dataclass(frozen=True)
class Provider:
    """`run` is timed on what `prepare` makes of the case's inputs: a fresh copy where `run` overwrites its input.

    `checked` is checked in the place of a `run` that draws at random: the same but for the draw.
    """

    run: Callable[[Any], Outputs]
    note: str = ""
    prepare: Callable[[Any], Any] | None = None
    checked: Callable[[Any], Outputs] | None = None

    def given(self, inputs: Any) -> Any:
        return self.prepare(inputs) if self.prepare else inputs


@dataclass(frozen=True, eq=False)
class Case:
    """`truth(inputs)` gives the function that measures a provider's error; `bytes` or `flops` is the floor, if any.

    A run of `steps` steps is reported by the step: times, the floor, and of what it `makes` how many (name, number).
    `tolerance` of the error is that of the dtype unless given.
    `seconds` limits the timed runs of all providers together, which are three each at the least.
    """

    labels: dict[str, Any]
    dtype: torch.dtype
    inputs: Callable[[], Any]
    truth: Callable[[Any], Callable[[Outputs], float]]
    providers: dict[str, Provider]
    bytes: int = 0
    flops: int = 0
    steps: int = 1
    makes: tuple[str, float] | None = None
    tolerance: float | None = None
    seconds: float = 6

    def check(self, provider: Provider, inputs: Any, error_of: Callable[[Outputs], float]) -> float:
        """The provider's error; AssertionError beyond the tolerance, and for NaN."""
        error = error_of((provider.checked or provider.run)(provider.given(inputs)))
        tolerance = TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance
        assert error <= tolerance, f"error {error:.2g} beyond {tolerance}"
        return error


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel(device: str) -> Impl:
    """Our implementation for this device, by name: one that cannot run is an error and never another one's time."""
    return "triton" if device == "cuda" else "native"


def notes(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0, std: float = 1) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)


def with_gradients(
    run: Callable[[Any], Outputs], *, trained: int, weights: Sequence[float] | None = None
) -> Callable[[Any], Outputs]:
    """`run` and its backward pass: its outputs, and the gradients of its first `trained` inputs for the sum of the
    first outputs times their weights; None: for the sum of the outputs' squares halved."""

    def both(inputs: Sequence[Any]) -> Outputs:
        leaves = [x.detach().requires_grad_() for x in inputs[:trained]]
        given = [x.view_as(x) for x in leaves]  # what overwrites its input refuses a leaf
        outputs: list[Any] = list(run((*given, *inputs[trained:])))
        ups = [torch.full_like(out, w) for out, w in zip(outputs, weights or (), strict=False)]
        ups = ups or [out.detach() for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs[: len(ups)], given, ups)]

    return both


def against_eager(
    labels: dict[str, Any],
    dtype: torch.dtype,
    inputs: Callable[[], Any],
    ours: Callable[[Any], Outputs],
    eager: Callable[[Any], Outputs],
    impl: Impl,
    *,
    notes: tuple[str, str] = ("", ""),
    fresh: Callable[[Any], Any] | None = None,
    wrap: Any = torch.no_grad(),  # noqa: B008
    more: Mapping[str, Provider] | None = None,
    bytes: int = 0,
    flops: int = 0,
) -> Case:
    """A kernel of ours, the formula in PyTorch (in float64 the truth), and that compiled.

    Args:
        notes: on ours and on eager.
        fresh: makes a copy for ours, which overwrites its input.
        wrap: makes of ours and of eager what is timed, such as `with_gradients`.
        more: other providers, complete.
    """
    exact = partial(tree_map, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
    providers = {
        "ours": Provider(wrap(ours), "; ".join(filter(None, [f'impl="{impl}"', notes[0]])), fresh),
        "eager": Provider(wrap(eager), notes[1]),
        "torch.compile": Provider(wrap(compiled(eager)), "of eager"),
    }
    truth = lambda x: expect(wrap(eager)(exact(x)))  # noqa: E731
    return Case(labels, dtype, inputs, truth, {**providers, **(more or {})}, bytes=bytes, flops=flops)


def gpu_only(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise Unavailable("its kernel needs a GPU")


def relative_error(outputs: Outputs, expected: Sequence[Tensor]) -> float:
    """The largest over the outputs of ‖x - true‖ / ‖true‖ and max|x - true| / max|true|. NaN gives NaN."""
    errors = []
    for x, true in zip(outputs, expected, strict=True):
        if x is not None:
            difference = x.detach().double().reshape(true.shape) - true
            for norm in (torch.linalg.vector_norm, lambda t: t.abs().amax()):
                errors.append(norm(difference) / norm(true).clamp(min=1e-30))
    return float(torch.stack(errors).amax())


def expect(expected: Outputs) -> Callable[[Outputs], float]:
    return partial(relative_error, expected=[t.detach() for t in expected if t is not None])


def turns(case: Case, inputs: Any) -> list[Any]:
    """More copies of the inputs if they are small tensors. Other inputs, such as a policy, are not copied."""
    leaves = tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = all(leaf is None or isinstance(leaf, (Tensor, int, float)) for leaf in leaves)
    small = plain and sum(tensor.nbytes for tensor in tensors) <= SMALL_BYTES
    return [case.inputs() for _ in range(TURNS - 1)] if small else []


def times_ms(
    runs: Mapping[str, tuple[Provider, Any]],
    repeats: int,
    device: str,
    seconds: float = math.inf,
    copies: Sequence[Any] = (),
) -> dict[str, list[float]]:
    """All times of each, interleaved so that a busy machine slows them all alike; the first round warms up.

    No round begins after `seconds`, but for the first three. `copies` of the inputs take turns with them, run by run.

    On a GPU the time is that between two events on the device, after the L2 cache was flushed. The flushing also keeps
    the device busy while the host queues the run, so that launches are not timed unless they outlast it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    on_gpu = device == "cuda"
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=device)
    end_of_rounds, turn = time.perf_counter() + seconds, itertools.count()
    for repeat in range(repeats + 1):
        if repeat > 3 and time.perf_counter() > end_of_rounds:
            break
        for name, (provider, inputs) in runs.items():
            given = provider.given([inputs, *copies][next(turn) % (1 + len(copies))])
            if on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                for _ in range(FLUSHES):
                    flush.zero_()
                start.record()
                outputs = provider.run(given)
                end.record()
                torch.cuda.synchronize()
                ms = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                outputs = provider.run(given)  # freed behind the clock: malloc may return others' memory with it
                ms = 1e3 * (time.perf_counter() - begin)
            del given, outputs  # before the next one is made: there may be no room for two
            if repeat:
                times[name].append(ms)
    return times


def quantiles(times: Sequence[float]) -> list[float]:
    """The quantiles p20, p50 and p80. A single value stands for all three."""
    if len(times) == 1:
        return [*times] * 3
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[i] for i in (1, 4, 7)]


def _best_ms(run: Callable[[], Tensor], device: str) -> float:
    return min(times_ms({"": (Provider(lambda _: [run()]), None)}, 10, device)[""])


def peak_mib(provider: Provider, inputs: Any, device: str) -> float | None:
    """Peak memory of one run, in MiB, without what was allocated before it."""
    if device != "cuda":
        return None
    given = provider.given(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.run(given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@functools.cache
def copy_gbps(device: str, tiny: bool) -> float:
    """GB/s of one large copy, read and written bytes counted; the best of ten."""
    source = torch.ones(2**20 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_ms(lambda: target.copy_(source), device) / 1e6


@functools.cache
def gemm_tflops(device: str, dtype: torch.dtype, tiny: bool) -> float:
    """TFLOP/s of one large square matrix product of random numbers; the best of ten."""
    size = 256 if tiny else 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best_ms(lambda: a @ a, device) / 1e9


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Machine, clocks, versions and commit. BICOT_COMMIT gives the commit if the files are not a git repository."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    mhz = [float(line.split(": ", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    described = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")
    machine: dict[str, Any] = {
        "cpu": models[0] if models else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": round(max(mhz)) if mhz else None,  # of the fastest core now: the others may be idle
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": os.environ.get("BICOT_COMMIT") or described,
    }
    if device == "cuda":
        import triton

        machine |= {"gpu": torch.cuda.get_device_name(), **gpu_state(), "triton": triton.__version__}
    return machine


def gpu_state() -> dict[str, Any]:
    """The current GPU's driver, clocks (measured just after some work, and the maximum) and power limit, if known."""
    work = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(100 * FLUSHES):  # about a tenth of a second
        work.zero_()
    torch.cuda.synchronize()
    uuid = torch.cuda.get_device_properties("cuda").uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(GPU_STATE.values())}"]
    driver, *told = _output(*query, "--format=csv,noheader,nounits").split(", ")
    numbers = [float(cell) if re.fullmatch(r"[\d.]+", cell) else None for cell in told]
    return dict.fromkeys(GPU_STATE) | dict(zip(GPU_STATE, [driver, *numbers], strict=False))


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
    """Print the result's section, and as the last line its JSON, which is also saved -> the exit status."""
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


def start(parser: argparse.ArgumentParser, doc: str | None, module: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line -> its arguments, and the fields that every result has.

    `doc`: "name: what", a blank, `python -m` with the module's command if it is a module's, then how.
    """
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    first, *how = [line for line in (doc or "").strip().splitlines() if line and not line.startswith("python -m")]
    name, _, what = first.partition(": ")
    words = ["python -m", f"bicot.bench.{module}", "--device", arguments.device]
    for option, value in vars(arguments).items():
        said = option not in ("device", "tiny", "output", "repeats", "seconds", "steps")
        if said and value != parser.get_default(option):
            given = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{option.replace('_', '-')}", *map(str, given)]
    about = " ".join([what[0].upper() + what[1:], *how])
    result = {"bench": name, "about": about, "command": " ".join(words), **hardware(arguments.device)}
    return arguments, result | {"device": arguments.device}


def _measure(case: Case, result: dict[str, Any], repeats: int, device: str, tiny: bool) -> None:
    """Check every provider of one case, time those that are right, and add them to the result."""
    torch.compiler.reset()  # past its recompile limit torch.compile would silently time eager

    def without(kind: str, name: str, problem: object) -> None:
        result[kind].append({"case": case.labels, "provider": name, "reason": str(problem).split("\n")[0]})

    try:
        inputs = case.inputs()
    except (Unavailable, torch.OutOfMemoryError) as problem:
        for name in case.providers:
            without("skipped", name, problem)
        return
    error_of = case.truth(inputs)
    right: dict[str, tuple[float, float | None]] = {}
    for name, provider in case.providers.items():
        try:
            right[name] = case.check(provider, inputs, error_of), peak_mib(provider, inputs, device)
        except (ImportError, Unavailable, torch.OutOfMemoryError) as problem:
            without("skipped", name, problem)
        except Exception as problem:  # recorded, and the bench ends non-zero; the others' times are still good
            without("failed", name, f"{type(problem).__name__}: {problem}")
    del error_of
    copies = turns(case, inputs) if device == "cuda" else []
    times = times_ms({name: (case.providers[name], inputs) for name in right}, repeats, device, case.seconds, copies)

    floor_ms, unit, work = 0.0, "gbps", case.bytes / 1e6
    if case.bytes:
        rate = result["ceilings"]["copy_gbps"] = round(copy_gbps(device, tiny), 1)
        floor_ms = case.bytes / rate / 1e6
    if case.flops:
        rate = round(gemm_tflops(device, case.dtype, tiny), 3)
        result["ceilings"].setdefault("gemm_tflops", {})[short(case.dtype)] = rate
        floor_ms, unit, work = case.flops / rate / 1e9, "tflops", case.flops / 1e9
    for name, values in times.items():
        ms, (error, peak) = [t / case.steps for t in quantiles(values)], right[name]
        row: dict[str, Any] = {"case": case.labels, "provider": name, "ms": [round(t, 4) for t in ms]}
        row[unit] = round(work / ms[1], 3) if work else None
        row["floor_pct"] = round(100 * floor_ms / ms[1], 1) if work else None
        row["peak_mib"] = None if peak is None else round(peak, 1)
        if case.makes:
            row |= {"makes": case.makes[0], "per_s": float(f"{1e3 * case.makes[1] / ms[1]:.4g}")}
        result["rows"].append(row | {"error": float(f"{error:.1e}"), "note": case.providers[name].note})


def main(doc: str | None, cases: Callable[[str, bool], list[Case]], module: str = "") -> int:
    """Run a bench of cases from its command line -> the exit status. `doc`: as of `start`."""
    begin, parser = time.perf_counter(), command_line(doc)
    parser.add_argument("--repeats", type=int, help="timed runs of each provider (15 on a CPU, 50 on a GPU)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case that would outlast them begins")
    arguments, result = start(parser, doc, module or f"bench_{(doc or '').partition(':')[0]}")
    device, tiny = arguments.device, arguments.tiny
    if tiny:
        torch.compiler.set_stance("force_eager")  # compiling would take far longer than all that runs
    repeats = arguments.repeats or (2 if tiny else 50 if device == "cuda" else 15)
    result |= {"ceilings": {}, "rows": [], "skipped": [], "failed": []}
    longest = 0.0
    for case in cases(device, tiny):
        before = time.perf_counter()
        if before + longest < begin + arguments.seconds:
            _measure(case, result, repeats, device, tiny)
            longest = max(longest, time.perf_counter() - before)
        else:
            late = {"case": case.labels, "reason": "no time was left"}
            result["skipped"] += [late | {"provider": name} for name in case.providers]
        for row in (row for row in result["rows"] if row["case"] is case.labels):
            print(f"{label(case.labels):60} {row['provider']:16} {row['ms'][1]:10.4f} ms", flush=True)
        save(result, arguments.output)  # what is measured stays should a later case outlast its time limit
    return finish(result, arguments.output)
