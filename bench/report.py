"""Write RESULTS.md and its pictures from the JSON files in bench/results: what was measured, on what, by which command.

python -m bicot.bench.report [FOLDER]

FOLDER is another folder of results. To keep the results of a GPU, copy OUTDIR/results/*.json of gpu.sh to bench/results
before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ..grpo.files import whole

UNITS = {"gbps": "GB/s", "tflops": "TFLOP/s"}
SHOWN = 6  # kernels by name of a part of a step

Result = Mapping[str, Any]


def label(labels: Mapping[str, Any]) -> str:
    """Name a case: numbers with their names, words without."""
    return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in labels.items())


def dumps(result: Mapping[str, Any]) -> str:
    """Write JSON with one line for each item of a list."""
    lines = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  {}\n ]".format(",\n  ".join(map(json.dumps, value)))
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without its empty columns."""
    shown = [i for i, name in enumerate(header) if not rows or not name or any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in shown)} |" for line in lines)


def number(x: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}".rstrip(".")


def spread(times: Sequence[float]) -> str:
    low, middle, high = map(number, times)
    return f"{middle} [{low} to {high}]"


def machine(result: Result) -> str:
    versions = f"torch {result['torch']}, commit {result['commit']}"
    if "gpu" in result:
        return f"{result['gpu']} ({result['gpu_state']}), triton {result['triton']}, {versions}"
    mhz = f"{result['cpu_mhz']} MHz, " if result.get("cpu_mhz") else ""
    return f"{result['cpu']} ({result['isa']}), {mhz}{result['threads']} threads, {versions}"


def head(result: Result, title: str = "", more: str = "") -> str:
    """The beginning of every section: what ran where, and how."""
    title = title or f"{result['bench']} on {result.get('gpu', 'the CPU')}"
    said = " ".join(filter(None, [result.get("about"), more, result.get("note")]))
    command = f"`{result['command']}` on" if "command" in result else "On"
    return f"## {title}\n\n{command} {machine(result)}.\n{said}\n"


def bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in dict.fromkeys(lines))


def ceilings(result: Result) -> str:
    found = result.get("ceilings", {})
    rates = [f"copy {number(found['copy_gbps'])} GB/s"] if found.get("copy_gbps") else []
    rates += [f"{name} {number(rate)} TFLOP/s" for name, rate in found.get("gemm_tflops", {}).items()]
    return f"Ceilings: {', '.join(rates)}." if rates else ""


def without(result: Result) -> list[str]:
    """What was not measured, and why."""
    return [
        f"{entry['provider']}: {words}: {entry['reason']}"
        for kind, words in (("skipped", "not run"), ("failed", "FAILED"))
        for entry in result.get(kind, [])
    ]


def tables(result: Result) -> str:
    """Tables as they are in the file."""
    parts = [head(result, result["title"], ceilings(result))]
    for each in result["tables"]:
        named = filter(None, [each.get("title"), "command" in each and f"`{each['command']}`"])
        title = f"{', '.join(named)}:\n\n" if "title" in each else ""
        notes = f"\n{bullets(each['notes'])}" if each["notes"] else ""
        parts.append(f"{title}{table(each['header'], each['rows'])}\n{notes}")
    return "\n".join(parts)


def kernel(result: Result) -> str:
    """The section of a bench with cases and providers: one table, and the notes on the providers."""
    ours = {label(row["case"]): row["ms"][1] for row in result["rows"] if row["provider"] == "ours"}
    rows, above = [], ""
    for row in result["rows"]:
        case = label(row["case"])
        more = "" if case not in ours or row["provider"] == "ours" else f"{row['ms'][1] / ours[case]:.2f}×"
        floor, peak = ("" if row[key] is None else f"{row[key]:.0f}" for key in ("floor_pct", "peak_mib"))
        achieved = [f"{number(row['per_s'])} {row['makes']}/s"] if "makes" in row else []
        achieved += [f"{number(row[unit])} {name}" for unit, name in UNITS.items() if row.get(unit) is not None]
        cells = [row["provider"], spread(row["ms"]), ", ".join(achieved), floor, peak, f"{row['error']:.0e}", more]
        rows.append(["" if case == above else case, *cells])
        above = case
    said = f"Medians [p20 to p80] of interleaved runs. {ceilings(result)}".strip()
    if any((row["floor_pct"] or 0) > 100 for row in result["rows"]):
        said += " A case can be above 100 % of the floor: caches are faster than a large copy, and so is reading alone."
    remarks = [f"{row['provider']}: {row['note']}" for row in result["rows"] if row["note"]] + without(result)
    header = ["case", "provider", "ms", "achieved", "% of floor", "peak MiB", "error", "× ours"]
    return f"{head(result, more=said)}\n{table(header, rows)}\n\n{bullets(remarks)}"


def step(result: Result) -> str:
    """The section of whole steps of ours and of the baseline, compared by the image."""
    rows, phases = [], []
    ours: dict[str, float] = {}
    for row in result["rows"]:
        first, case = row["provider"] == "ours", label(row["case"])
        ms = {name: 1e3 * s / row["images"] for name, s in {"step": row["seconds"][1], **row["phases"]}.items()}
        ours = ms if first else ours
        longer = {} if first else {name: f"{number(ms[name] / ours[name])}×" for name in ms if ours[name]}
        named = [case if first else "", row["provider"]]
        peak, joules = ("" if row[key] is None else number(row[key]) for key in ("peak_mib", "joules_per_image"))
        cells = [f"{row['steps']} × {row['images']}", spread(row["seconds"]), number(row["images_per_s"]), peak, joules]
        rows.append([*named, *cells, f"{row['plan_tokens']:.1f}", longer.get("step", "")])
        phases.append(
            [*named, *(f"{number(ms[x])} ({longer[x]})" if x in longer else number(ms[x]) for x in row["phases"])]
        )
    header = ["case", "provider", "steps × images", "seconds a step", "images/s", "peak MiB", "J/image", "plan tokens"]
    notes = [f"{row['provider']}: {row['note']}" for row in result["rows"] if row["note"]]
    entries = [label(entry["case"]) for kind in ("skipped", "failed") for entry in result[kind]]
    notes += [f"{case}, {line}" for case, line in zip(entries, without(result), strict=True)]
    return f"""{head(result, more="Medians [p20 to p80] of steps taken in turn.")}
{table([*header, "× ours"], rows)}

Milliseconds of each phase per image, in brackets as a multiple of ours:

{table(["case", "provider", *(result["rows"][0]["phases"] if result["rows"] else [])], phases)}

{bullets(notes)}"""


def step_profile(result: Result) -> str:
    on_gpu = result["device"] == "cuda"
    rows = []
    for row in result["rows"]:
        floor = row["floor_ms"]
        beyond = ["" if floor is None else number(floor), f"{row['ms'] / floor:.1f}" if floor else ""]
        numbers = [number(row["ms"]), f"{row['pct']:.1f}", f"{row['calls']:.3g}", number(row["gap_ms"])]
        busy = number(row["busy_ms"]) if on_gpu else ""
        rows.append([row["phase"], *numbers, busy, *beyond, row["binds"]])
    said = f"A step of {result['images']} images takes {spread(result['step_ms'])} ms: "
    said += f"{number(result['images_per_second'])} images a second. "
    if rows:
        said += f"Under the profiler it takes {number(result['profiled_step_ms'][1])} ms. "
        said += f"The phases cover {result['covered_pct']:.1f} % of it. "
    else:
        said += "The profile of it did not end. "
    said += ceilings(result)
    if any(row["floor_ms"] and row["floor_ms"] > row["ms"] for row in result["rows"]):
        said += " A phase can pass its floor: the ceilings are of one large copy and one square matrix product."
    if result["power"]:
        said += f" Power: {', '.join(f'{name} {value}' for name, value in result['power'].items())}."
    names = [
        [part if not i else "", f"`{name}`", number(count), number(us)]
        for part, kernels in result.get("kernels", {}).items()
        for i, (name, count, us) in enumerate(kernels[:SHOWN])
    ]
    streams = [
        f"{stream}: {', '.join(f'{phase} {number(ms)} ms' for phase, ms in phases.items())}"
        for stream, phases in result["streams"].items()
    ]
    by_name = table(["of a step", "kernel" if on_gpu else "operator", "count", "µs"], names) if names else ""
    header = ["phase", "ms", "%", "calls", "gap ms", "busy ms", "floor ms", "× floor", "bound by"]
    return "\n\n".join(filter(None, [head(result, more=said) + "\n" + table(header, rows), by_name, bullets(streams)]))


def draw(result: Result, path: Path) -> None:
    """Draw a PNG of stacked bars with a colour for each phase. Time outside of phases is grey."""
    from matplotlib.figure import Figure

    unit, named = "ms of a step", {}
    if result["bench"] == "step":
        unit = "seconds per image"
        for row in result["rows"]:
            bar = {phase: seconds / row["images"] for phase, seconds in row["phases"].items()}
            named[f"{label(row['case'])}: {row['provider']}"] = bar
    else:
        named["step"] = {row["phase"]: row["ms"] for row in result["rows"]}
        named |= {"floors": {row["phase"]: row["floor_ms"] or 0.0 for row in result["rows"]}} | result["streams"]
    figure = Figure(figsize=(10, 1.8 + 0.4 * len(named)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(named)
    for i, phase in enumerate(next(iter(named.values()))):
        widths = [bar.get(phase, 0.0) for bar in named.values()]
        colour = "lightgrey" if phase in ("idle", "rest") else f"C{i % 10}"
        names, hatch = [fill(name, 40) for name in named], "//" * (i // 10)
        axes.barh(names, widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": None})


# The sections of RESULTS.md, in their order, by the name of the bench.
PARTS: dict[str, Callable[[Result], str]] = {"tables": tables, "step": step, "step_profile": step_profile}
KERNELS = ["train", "rollout", "decode_attention", "decode_linear", "rms_norm", "silu_mul", "rope_kv_write"]
KERNELS += ["group_advantages", "token_logprobs", "linear_logprobs", "grpo_loss", "cfg_sample", "adamw"]
PARTS |= dict.fromkeys([*KERNELS, "rewards"], kernel)  # rewards: a bench of earlier commits


def render(folder: Path, pictures: bool = True) -> str:
    """RESULTS.md from the JSON files in `folder`; the pictures are drawn beside them.

    Raises:
        ValueError: a file is not the JSON object of a bench that has a section.
    """
    about = "Generated by `python -m bicot.bench.report` from bench/results; do not edit. Commands are those of today."
    results = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for path, result in results.items():
        if (bench := result.get("bench")) not in PARTS:
            raise ValueError(f"{path}: no section for bench {bench!r}; there are {', '.join(PARTS)}")
    order, sections = list(PARTS), [f"# Results\n\n{about}\n"]
    for path, result in sorted(results.items(), key=lambda x: (order.index(x[1]["bench"]), x[1].get("device", ""))):
        sections.append(PARTS[result["bench"]](result))
        picture = path.with_suffix(".png")
        if pictures and result["bench"] in ("step", "step_profile") and result["rows"]:
            draw(result, picture)
        if picture.exists():
            sections.append(f"![{result['bench']}]({folder.name}/{picture.name})\n")
    return "\n".join(sections)


def write(folder: Path) -> None:
    """Write RESULTS.md beside `folder`."""
    page = render(folder, pictures=importlib.util.find_spec("matplotlib") is not None)
    with whole(folder.parent / "RESULTS.md") as part:
        part.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    help = "a folder of JSON files; RESULTS.md is written beside it"
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("results"), help=help)
    try:
        write(parser.parse_args().results.resolve())
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
