"""scaling: what a training step costs against samples a prompt, prompts, image tokens, rows of a step, and ranks.

python -m bicot.bench.scaling [--device cpu|cuda] [--repeats N] [--output FILE.json]; under torchrun: its ranks alone.
A `Trainer` takes real steps, always with the same prompts and seeds: of the toy, and for image tokens of random weights
of the "tiny" shape; on a GPU, all of random weights of Janus-Pro-1B's. A micro-batch has one prompt; the reward reads
pixels, and its phase is what the rollout does not hide. The points of a series take turns in one process; ranks, each
with the same share of prompts (so that no growth is perfect), run in processes of their own. Seconds are medians,
fitted by x^exponent with least squares on logarithms; the residual is the root of their mean square, none for two
points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.utils import logging

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from .harness import copy_gbps, finish, gemm_tflops, hardware, launch_us, short, short_collections, write_svg
from .models import ShapeTrainer, published_config, toy_config
from .step_work import picture_work

COMMAND = "python -m bicot.bench.scaling"
TOY_TOKENS = 64
LINK_BYTES = 2**26


@dataclass(frozen=True)
class Size:
    """Of a step on one rank."""

    generations: int
    prompts: int
    image_tokens: int
    rows: int


class Series(NamedTuple):
    axis: str
    model: str
    sizes: dict[int, Size]  # by x


def base_size(device: str, tiny: bool) -> tuple[str, Size]:
    """Model and size that all series have in common, and that ranks take."""
    if device == "cuda" and not tiny:
        return "Janus-Pro-1B", Size(generations=8, prompts=2, image_tokens=576, rows=256)
    return "toy", Size(generations=2 if tiny else 4, prompts=1 if tiny else 2, image_tokens=TOY_TOKENS, rows=64)


def all_series(device: str, tiny: bool) -> list[Series]:
    """Around the base; a step has more images where rows split them."""
    model, base = base_size(device, tiny)
    values: dict[str, Sequence[int]]
    if tiny:
        values = {"generations": (2, 4), "image_tokens": (4, 16), "rows": (1, 2)}
    elif device == "cpu":
        values = {"generations": (2, 4, 8, 16, 32), "prompts": (1, 2, 4, 8, 16), "image_tokens": (36, 64, 144, 256)}
        values["rows"] = (2, 4, 8, 16)
    else:
        values = {"generations": (4, 8, 16, 32), "prompts": (1, 2, 4, 8), "image_tokens": (64, 144, 256, 576)}
        values["rows"] = (8, 16, 32, 64)
    series = []
    for field, xs in values.items():
        around = replace(base, prompts=4) if field == "rows" else base
        named = "tiny" if model == "toy" and field == "image_tokens" else model
        series.append(Series(field.replace("_", " "), named, {x: replace(around, **{field: x}) for x in xs}))
    return series


def config_of(device: str, folder: str) -> Config:
    make = published_config if device == "cuda" else toy_config
    return make(output_dir=folder, learning_rate=1e-6, per_device_train_batch_size=1, sample_steps=0)


class SizedTrainer(ShapeTrainer):
    """Takes steps of any size, with pictures of at most `image_tokens`."""

    def _roll_out(self, examples: Any) -> Any:
        result = super()._roll_out(examples)
        self.rollout = result[0]
        return result

    def resize(self, size: Size) -> None:
        """What a step of another size has to build, it builds anew: take one before one is timed."""
        self.config = replace(self.config, num_generations=size.generations, gradient_accumulation_steps=size.prompts)
        engine = self.engine
        engine.max_rows, engine.plan_stage, engine.image_stage = size.rows, None, None
        engine.graphs.clear()
        if self.shape != "toy":
            for policy in (self.policy, self.reference):
                if policy:
                    policy.config.vision_config.num_image_tokens = size.image_tokens
            engine.weights.image_decoder.model.quantize.quant_state_dims = [math.isqrt(size.image_tokens)] * 2

    def take(self) -> dict[str, float]:
        """Seconds of the first step of a run, and of its phases."""
        self.step = 0
        metrics, _ = self._train_step()
        return {k.removeprefix("seconds/"): v for k, v in metrics.items() if k.startswith("seconds/")}

    def described(self, size: Size) -> dict[str, Any]:
        """What `step_model` has to know of the step that was taken."""
        rollout, decoder = self.rollout, self.engine.weights.image_decoder
        plans, prompts, pictures = (
            [len(ids) for ids in packed.tolist()] for packed in (rollout.plans, rollout.prompts, rollout.image_prompts)
        )
        step = {
            "prompts": size.prompts,
            "generations": size.generations,
            "prompt_tokens": fmean(prompts),
            "image_prompt_tokens": fmean(pictures) - 1,
            "image_tokens": size.image_tokens,
            "rows_per_image": 1 if self.config.cfg_weight == 1 else 2,
            "max_rows": size.rows,
            "accumulation": size.prompts,
            "itemsize": self.policy.dtype.itemsize,
            "reference": self.reference is not None,
            "recompute": self.config.gradient_checkpointing is True,
            "vq_flops": picture_work(rollout.images, decoder, rollout.image_tokens[:1])["VQ"].flops,
        }
        lengths = [round(fmean(plans), 2), round(pstdev(plans), 2), max(plans)]
        return {"model": self.shape, "dtype": short(self.policy.dtype), "plans": lengths, "step": step}


def measure(trainer: SizedTrainer, sizes: dict[int, Size], repeats: int) -> list[dict[str, Any]]:
    """A point for each size, all of which take turns; the first turn warms up."""
    taken: dict[int, list[dict[str, float]]] = {x: [] for x in sizes}
    known = {}
    with short_collections():
        for turn in range(repeats + 1):
            for x, size in sizes.items():
                trainer.resize(size)
                if trainer.engine.graphs.enabled and turn:
                    trainer.take()  # captures its graphs
                seconds = trainer.take()
                if turn:
                    taken[x].append(seconds)
                else:
                    known[x] = trainer.described(size)
    points = []
    for x, turns in taken.items():
        phases = {name: median(seconds[name] for seconds in turns) for name in turns[0]}
        points.append({"x": x, "seconds": phases.pop("step"), "phases": phases, **known[x]})
    return points


def measure_ranks(device: str, counts: Sequence[int], tiny: bool, repeats: int, threads: int) -> list[dict[str, Any]]:
    """A point for each number of ranks, in processes that have as many threads each, whatever the number."""
    points = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "point.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command += ["-m", "bicot.bench.scaling", "--device", device, "--repeats", str(repeats)]
            command += ["--threads", str(max(1, threads // max(counts))), "--output", str(file)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
                {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            )
            subprocess.run([*command, *["--tiny"] * tiny], check=True, env=environment, stdout=subprocess.DEVNULL)
            points.append(json.loads(file.read_text()))
    return points


def one_of_the_ranks(device: str, tiny: bool, repeats: int) -> dict[str, Any]:
    """The point of this group of ranks, and what its links carry: the best of five sums of 64 MiB."""
    ranks = Ranks.start()
    try:
        model, size = base_size(device, tiny)
        with tempfile.TemporaryDirectory() as folder:
            trainer = SizedTrainer(model, size.image_tokens, config_of(device, folder), ranks)
            (point,) = measure(trainer, {ranks.size: size}, repeats)
        return point | {"ranks": ranks.size, "link_gbps": link_gbps(ranks)}
    finally:
        ranks.close()


def link_gbps(ranks: Ranks) -> float | None:
    """GB/s that each rank sends in a ring's all-reduce."""
    if ranks.size == 1:
        return None
    value, times = torch.ones(LINK_BYTES // 4, device=ranks.device), []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        ranks.sum(value).max().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * (ranks.size - 1) / ranks.size * value.nbytes / min(times) / 1e9


def fit(xs: Sequence[float], seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """Exponent and residual of seconds ~ x^exponent; None where there are too few points, or no seconds."""
    if len(xs) < 2 or min(seconds) <= 0:
        return None, None
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, seconds, strict=True)]
    x0, y0 = (fmean(column) for column in zip(*logs, strict=True))
    slope = sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)
    squares = [(y - y0 - slope * (x - x0)) ** 2 for x, y in logs]
    return round(slope, 3), round(math.sqrt(fmean(squares)), 4) if len(xs) > 2 else None


def fitted(axis: str, model: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """A series as it is in the results."""
    xs = [point["x"] for point in points]
    exponent, residual = fit(xs, [point["seconds"] for point in points])
    phases = {name: fit(xs, [point["phases"][name] for point in points])[0] for name in points[0]["phases"]}
    series = {"axis": axis, "model": model, "points": points, "exponent": exponent, "residual": residual}
    return series | {"phase_exponents": phases}


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a series: the step, its phases, and the fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(result["series"]), 3.6), layout="constrained")
    panels = figure.subplots(1, len(result["series"]), squeeze=False)[0]
    for axes, series in zip(panels, result["series"], strict=True):
        points = series["points"]
        xs, seconds = ([point[key] for point in points] for key in ("x", "seconds"))
        for i, name in enumerate(points[0]["phases"]):
            axes.plot(xs, [p["phases"][name] for p in points], ".-", color=f"C{i + 1}", lw=1, label=name)
        axes.plot(xs, seconds, "o", color="black", label="step")
        if (exponent := series["exponent"]) is not None:
            scale = math.exp(fmean(math.log(s / x**exponent) for x, s in zip(xs, seconds, strict=True)))
            axes.plot(xs, [scale * x**exponent for x in xs], "--", color="black", label="fit")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(series["axis"])
        axes.set_title(f"{series['model']}: {_exponent(series['exponent'])}", fontsize="medium")
    panels[0].set_ylabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    write_svg(figure, path)


def _exponent(exponent: float | None) -> str:
    return "" if exponent is None else f"x^{exponent:.2f}"


def section(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    from .report import machine, number, table

    names, rows = list(result["series"][0]["points"][0]["phases"]), []
    for series in result["series"]:
        for point in series["points"]:
            images = point["step"]["prompts"] * point["step"]["generations"] * point.get("ranks", 1)
            times = [number(1e3 * t) for t in (point["seconds"], *(point["phases"][name] for name in names))]
            first = f"{series['axis']}, {series['model']}" if point is series["points"][0] else ""
            rows.append([first, str(point["x"]), *times, number(images / point["seconds"])])
        exponents = map(_exponent, (series["exponent"], *(series["phase_exponents"][name] for name in names)))
        residual = "" if series["residual"] is None else f"residual {series['residual']:.3f}"
        rows.append(["", "fit", *exponents, residual])
    product = ", ".join(f"{name} {number(rate)} TFLOP/s" for name, rate in result["ceilings"]["gemm_tflops"].items())
    links = [number(p["link_gbps"]) for s in result["series"] for p in s["points"] if p.get("link_gbps")]
    said = [
        f"Ceilings: copy {number(result['ceilings']['copy_gbps'])} GB/s, {product}, "
        f"{number(result['ceilings']['launch_us'])} µs a kernel."
    ]
    said += [f"The sum of 64 MiB over the ranks: {', '.join(links)} GB/s."] if links else []
    said += [f"Not run: {reason}." for reason in result["skipped"]]
    return f"""## scaling on {result.get("gpu", "the CPU")}

`{result["command"]}` on {machine(result)}.
{result["about"]} {" ".join(said)}

{table(["series", "x", "step ms", *(f"{name} ms" for name in names), "images/s"], rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, help="timed steps of each point (7 on a CPU, 3 on a GPU)")
    parser.add_argument("--tiny", action="store_true", help="few small steps: walks the code, measures nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    device, tiny, output = arguments.device, arguments.tiny, arguments.output
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    repeats = arguments.repeats or (1 if tiny else 3 if device == "cuda" else 7)
    if "RANK" in os.environ:
        point = one_of_the_ranks(device, tiny, repeats)
        if os.environ["RANK"] == "0":
            finish(point, output)
        return
    what, _, _, *how = (__doc__ or "").strip().splitlines()
    what = what.removeprefix("scaling: ")
    result: dict[str, Any] = {"bench": "scaling", "about": " ".join([what[0].upper() + what[1:], *how])}
    result |= {"command": f"{COMMAND} --device {device}", **hardware(device), "device": device}
    result |= {"series": [], "skipped": []}
    rates = {short(dtype): round(gemm_tflops(device, dtype, tiny), 3) for dtype in (torch.float32, torch.bfloat16)}
    result["ceilings"] = {"copy_gbps": round(copy_gbps(device, tiny), 1), "gemm_tflops": rates}
    result["ceilings"]["launch_us"] = round(launch_us(device), 2)

    trainer, ranks = None, Ranks(0, 1, torch.device(device))
    every = all_series(device, tiny)
    with tempfile.TemporaryDirectory() as folder:
        for i, series in enumerate(every):
            if trainer is None or trainer.shape != series.model:
                del trainer  # there may be no room for two
                most = max(
                    size.image_tokens for each in every for size in each.sizes.values() if each.model == series.model
                )
                trainer = SizedTrainer(series.model, most, config_of(device, f"{folder}/{i}"), ranks)
            points = measure(trainer, series.sizes, repeats)
            result["series"].append(fitted(series.axis, series.model, points))
    del trainer
    counts = [1, 2] if device == "cpu" else [2**n for n in range(torch.cuda.device_count().bit_length())]
    if len(counts) > 1:
        if device == "cuda":
            torch.cuda.empty_cache()
        points = measure_ranks(device, counts[-1:] if tiny else counts, tiny, repeats, arguments.threads)
        result["series"].append(fitted("ranks", base_size(device, tiny)[0], points))
    else:
        result["skipped"].append("ranks: there is one GPU")
    print(section(result))
    finish(result, output)


if __name__ == "__main__":
    main()
