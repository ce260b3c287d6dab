"""step_model: images a second of a training step as `step_costs` predicts it, for any GPU, number of GPUs and model.

python -m bicot.bench.step_model [--gpu H200 --gpus 64 --model Janus-Pro-7B --zero 2 ...] [--output FILE.json]
The step that was asked for, phase by phase; then what goes into RESULTS.md: the floors that this project holds itself
to, a projection to many GPUs, and predictions beside what the results in bench/results measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import step_costs
from .harness import finish, hardware, label
from .models import SHAPES
from .step_costs import GPU, GPUS, Cluster, Plans, Step, efficiency, image_step, launches, predict, text_step

COMMAND = "python -m bicot.bench.step_model"
RESULTS = Path(__file__).resolve().parent / "results"

# Images a second of one H200 by images a step: decoding, body and pictures alone, no prompt shared in training.
FLOOR_IMAGES = (8, 16, 32, 64, 128)
FLOORS = {"Janus-Pro-1B": (10.4, 14.0, 17.0, 18.9, 20.1), "Janus-Pro-7B": (2.5, 3.5, 4.4, 5.1, 5.5)}
FLOOR_ROWS = {"held": "held", "the same parts": "same_parts", "all parts": "all_parts", "prompts shared": "shared"}
FLOOR_PARTS = ("plan/decode", "draw/decode", "decode/pictures", "reference/body", "train/body")

PROJECTED = (8, 64, 512, 4096)
LENGTHS = Plans(80, 20, 1024)  # no distribution of a trained model's plans is known
ITEMSIZE = {"float32": 4, "bfloat16": 2}
Point = tuple[str, float, float]  # what, predicted and measured seconds


def floors() -> list[dict[str, Any]]:
    """The table above beside the model's, of the same parts and of all; memory is not asked for."""
    rows = []
    for model, held in FLOORS.items():
        for images, value in zip(FLOOR_IMAGES, held, strict=True):
            step = Step(SHAPES[model], prompts=images // 8, accumulation=images // 8)
            alone = replace(step, prompts=images, generations=1)
            h200 = Cluster(GPUS["H200"]._replace(gib=math.inf, launch_us=0))
            found, apart = predict(step, h200), predict(alone, h200).costs
            every = found.costs | {part: apart[part] for part in ("train/body", "reference/body")}
            row = {"model": model, "images": images, "held": value}
            row["same_parts"] = round(images / sum(every[part].seconds for part in FLOOR_PARTS), 2)
            row["all_parts"] = round(images / sum(cost.seconds for cost in every.values()), 2)
            rows.append(row | {"shared": round(found.images_per_second, 2)})
    return rows


def project() -> list[dict[str, Any]]:
    """The published settings, two prompts of eight samples on each GPU, from one node to 4,096 GPUs."""
    rows = []
    for model in FLOORS:
        step = Step(SHAPES[model], plans=LENGTHS, recompute=True)
        for name, gpu in GPUS.items():
            for cluster in (Cluster(gpu, gpus, zero) for zero in (2, 3) for gpus in PROJECTED):
                row = {"model": model, "gpu": name, "zero": cluster.zero, "gpus": cluster.gpus}
                rows.append(row | summary(step, cluster))
    return rows


def summary(step: Step, cluster: Cluster) -> dict[str, Any]:
    found = predict(step, cluster)
    bound, share = found.binds()
    return {
        "images_per_second": float(f"{found.images_per_second:.4g}"),
        "efficiency": round(efficiency(step, cluster), 3),
        "bound": bound,
        "bound_share": round(share, 3),
        "state_gib": round(found.state_gib, 1),
    }


def ceilings(result: dict[str, Any], results: Sequence[dict[str, Any]], dtype: str) -> tuple[GPU, str]:
    """What the run measured, or else the median of its machine's other runs; and what none of them did."""
    same = [r for r in results if all(r.get(key) == result.get(key) for key in ("cpu", "gpu", "threads"))]
    rates, missing = [], []
    for what in ("copy_gbps", "gemm_tflops"):
        own, *others = (each.get("ceilings", {}).get(what) for each in (result, *same))
        own, *others = (rate.get(dtype) if isinstance(rate, dict) else rate for rate in (own, *others))
        known = [rate for rate in others if rate]
        if not own and not known:
            missing.append(f"{what} of {dtype}")
        rates.append(own or (median(known) if known else math.inf))
    copy, product = rates
    took = [each["ceilings"]["launch_us"] for each in (result, *same) if each.get("ceilings", {}).get("launch_us")]
    return GPU(copy, product, math.inf, took[0] if took else 0.0), ", ".join(missing)


def rollout_points(row: dict[str, Any], gpu: GPU) -> Iterator[Point]:
    """A decode step of the rollout bench, at the mean context of its run."""
    case = row["case"]
    step = Step(SHAPES[case["model"]], itemsize=ITEMSIZE[case["dtype"]], fp8="kv" in case)
    context = case["context"] + (case["steps"] + 1) / 2
    image = case["stage"] == "image"
    cost = image_step(step, case["rows"] / 2, context, gpu) if image else text_step(step, case["rows"], context, gpu)
    yield "decode step", cost.seconds + launches(step, gpu), row["ms"][1] / 1e3


def scaling_points(point: dict[str, Any], gpu: GPU) -> Iterator[Point]:
    """A step of the scaling bench, and its phases but for the rewards' wait, of which nothing is known."""
    step = Step(SHAPES[point["model"]], plans=Plans(*point["plans"]), **point["step"])
    link = point.get("link_gbps") or math.inf
    found = predict(step, Cluster(gpu, point.get("ranks", 1), within=link, across=link))
    yield "step", found.seconds, point["seconds"]
    for phase, seconds in found.by("phase").items():
        if phase != "reward" and point["phases"].get(phase):
            yield phase, seconds, point["phases"][phase]


def validate(folder: Path) -> list[dict[str, Any]]:
    """Predicted beside measured, for all decode steps and training steps among the results in `folder`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = []
    for result in results:
        measured: list[tuple[str, str, Callable[[GPU], Iterator[Point]]]] = []
        if result["bench"] == "rollout":
            ours = [row for row in result["rows"] if row["provider"] == "ours"]
            measured = [(label(row["case"]), row["case"]["dtype"], partial(rollout_points, row)) for row in ours]
        elif result["bench"] == "scaling":
            points = [(series["axis"], point) for series in result["series"] for point in series["points"]]
            measured = [
                (f"{axis} {p['x']}, {p['model']}", p["dtype"], partial(scaling_points, p)) for axis, p in points
            ]
        for case, dtype, points_of in measured:
            gpu, missing = ceilings(result, results, dtype)
            for what, predicted, seconds in points_of(gpu):
                row = {"bench": result["bench"], "on": result.get("gpu", "the CPU"), "case": case, "what": what}
                row |= {"predicted_ms": round(1e3 * predicted, 3), "measured_ms": round(1e3 * seconds, 3)}
                rows.append(row | {"ratio": float(f"{predicted / seconds:.3g}"), "missing": missing})
    return rows


def section(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    from .report import number, table

    held = [
        [model, what, *(f"{row[key]:.1f}" for row in result["floors"] if row["model"] == model)]
        for model in FLOORS
        for what, key in FLOOR_ROWS.items()
    ]
    projected: dict[tuple[str, ...], list[str]] = {}
    for row in result["projection"]:
        cell = f"{number(row['images_per_second'])} ({row['efficiency']:.0%}; {row['bound']} {row['bound_share']:.0%})"
        fits = row["images_per_second"] > 0
        cells = projected.setdefault((row["model"], row["gpu"], f"ZeRO-{row['zero']}"), [])
        cells.append(cell if fits else f"does not fit: {row['state_gib']:.0f} GiB but for keys and values")
    gpus = "; ".join(
        f"{name} {g.gbps:g} GB/s, {g.tflops:g} TFLOP/s, {g.gib:g} GiB, {g.launch_us:g} µs a launch"
        for name, g in GPUS.items()
    )
    assumed = (
        f"Assumed: plans of {LENGTHS.mean:g} ± {LENGTHS.deviation:g} tokens and at most {LENGTHS.longest}; nodes of "
    )
    assumed += (
        f"{Cluster.per_node}; links of {Cluster.within:g} GB/s a GPU within and {Cluster.across:g} across; {gpus}"
    )
    checked: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["validation"]:
        checked.setdefault((f"{row['bench']} on {row['on']}", row["case"]), {})[row["what"]] = row
    lines = []
    for case, (whole, *phases) in ((case, list(parts.values())) for case, parts in checked.items()):
        said = ", ".join(f"{row['what']} {row['ratio']:.2f}" for row in phases)
        said = f"without {whole['missing']}" if whole["missing"] else said
        times = [number(whole["predicted_ms"]), number(whole["measured_ms"])]
        lines.append([*case, whole["what"], *times, f"{whole['ratio']:.2f}", said])
    ratios = sorted(row["ratio"] for row in result["validation"] if row["what"] in ("step", "decode step"))
    spread = (
        f" They run from {ratios[0]:.2f} to {ratios[-1]:.2f}, the median is {median(ratios):.2f}." if ratios else ""
    )
    return f"""## step_model: what a step should take

`{result["command"]}` at commit {result["commit"]}.
{result["about"]}

Images a second of one H200 by images a step: the floors held, which are of decoding, body and pictures, every sample
trained with a prompt of its own; the same by the model; all parts, with prefill, heads and optimizer; and these as
bicot trains, a prompt once for its group.

{table(["model", "", *map(str, FLOOR_IMAGES)], held)}

**Projected, not measured:** images a second of all GPUs (efficiency; what most of the step is bound by, and how much
of it). Each GPU has two prompts of eight samples and recomputes activations. {assumed}. Efficiency is against GPUs that
never wait for each other and have memory for all rows.

{table(["model", "GPU", "", *(f"{n:,} GPUs" for n in PROJECTED)], [[*key, *cells] for key, cells in projected.items()])}

Predicted beside measured, with the measuring machine's own ceilings and training at {Step.mfu:.0%} of them. Below 1 the
machine takes longer than the model: attention, caches and the host between kernels are not in it. Above 1 it takes
less: what a copy or a square product reaches is not the most that another shape, or an algorithm with fewer products,
can reach.
{spread}

{table(["bench", "case", "of", "predicted ms", "measured ms", "ratio", "ratios of its phases"], lines)}
"""


def _add(parser: argparse.ArgumentParser, cls: type) -> list[str]:
    """An option for each field of a dataclass that has a plain default -> their names."""
    plain = {
        name: getattr(cls, name) for name in cls.__annotations__ if isinstance(getattr(cls, name, None), (int, float))
    }
    for name, default in plain.items():
        about = f"of {cls.__name__.lower()}; default {default:g}"
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=about)
    return list(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", choices=[*GPUS], default="H200", help="whose rates and memory hold unless given")
    parser.add_argument("--model", choices=[*FLOORS], default="Janus-Pro-1B")
    parser.add_argument("--plans", type=int, nargs=3, default=LENGTHS, metavar=("MEAN", "DEVIATION", "LONGEST"))
    for name in GPU._fields:
        parser.add_argument(f"--{name}", type=float, help="of one GPU")
    of_cluster, of_step = (_add(parser, cls) for cls in (Cluster, Step))
    parser.add_argument("--results", type=Path, default=RESULTS, help="what was measured")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    given = vars(parser.parse_args())
    gpu = GPUS[given["gpu"]]._replace(**{name: given[name] for name in GPU._fields if given[name] is not None})
    try:
        cluster = Cluster(gpu, **{name: given[name] for name in of_cluster})
    except ValueError as error:
        parser.error(str(error))
    step = Step(SHAPES[given["model"]], plans=Plans(*given["plans"]), **{name: given[name] for name in of_step})
    for name, cost in predict(step, cluster).costs.items():
        print(f"{name:20}{1e3 * cost.seconds:10.1f} ms  {cost.bound}")
    asked = summary(step, cluster)
    print(", ".join(f"{name} {value}" for name, value in asked.items()))
    about = " ".join((step_costs.__doc__ or "").split())
    result = {"bench": "step_model", "about": about, "command": COMMAND, "commit": hardware()["commit"], "asked": asked}
    result |= {"floors": floors(), "projection": project(), "validation": validate(given["results"])}
    finish(result, given["output"])


if __name__ == "__main__":
    main()
