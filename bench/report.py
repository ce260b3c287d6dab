"""Write RESULTS.md and its pictures from the JSON files in bench/results: what was measured, on what, by which command.

python -m bicot.bench.report [RESULTS]

RESULTS is another folder, or the archive of a walk of gpu.sh, whose results then join those in bench/results.
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
HERE = Path(__file__).resolve().parent
SHOWN = 6  # kernels by name of a part of a step
NO_FLOOR = {
    "communication": "the links between ranks are not measured",
    "weights": "a copy, which could be avoided",
}

Result = Mapping[str, Any]


def label(labels: Mapping[str, Any]) -> str:
    """A case in a few words: numbers with their names, words without."""
    return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in labels.items())


def dumps(result: Mapping[str, Any]) -> str:
    """JSON with an item of each list on a line of its own."""
    lines = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  {}\n ]".format(",\n  ".join(map(json.dumps, value)))
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns that are empty."""
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
    clocks = {"sm_mhz": "SM {} MHz", "sm_mhz_max": "at most {}", "memory_mhz": "memory {} MHz", "power_limit_w": "{} W"}
    said = clocks if "gpu" in result else {"cpu_mhz": "{} MHz"}
    known = "".join(f"{words.format(f'{result[key]:.0f}')}, " for key, words in said.items() if result.get(key))
    if "gpu" in result:
        return f"{result['gpu']}, {known}" + ", ".join(
            f"{k} {result[k]}" for k in ("driver", "torch", "triton", "commit")
        )
    threads = f"{result['threads']} threads, torch {result['torch']}, commit {result['commit']}"
    return f"{result['cpu']} ({result['isa']}), {known}{threads}"


def head(result: Result, title: str = "", more: str = "") -> str:
    """Of every section: what ran where, and how."""
    title = title or f"{result['bench']} on {result.get('gpu', 'the CPU')}"
    said = " ".join(filter(None, [result.get("about"), more, result.get("note")]))
    command = f"`{result['command']}` on" if "command" in result else "On"
    return f"## {title}\n\n{command} {machine(result)}.\n{said}\n"


def bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in dict.fromkeys(lines))


def ceilings(result: Result) -> list[str]:
    found = result.get("ceilings", {})
    rates = [f"copy {number(found['copy_gbps'])} GB/s"] if found.get("copy_gbps") else []
    return rates + [f"{name} {number(rate)} TFLOP/s" for name, rate in found.get("gemm_tflops", {}).items()]


def without(result: Result) -> list[str]:
    """What was not measured, and why."""
    return [
        f"{entry['provider']}: {words}: {entry['reason']}"
        for kind, words in (("skipped", "not run"), ("failed", "FAILED"))
        for entry in result.get(kind, [])
    ]


def tables(result: Result) -> str:
    """Tables as they are; where one names a command, it was taken by hand with parts of it."""
    measured = f"Ceilings: {', '.join(ceilings(result))}." if "ceilings" in result else ""
    parts = [head(result, result["title"], measured)]
    for each in result["tables"]:
        named = filter(None, [each.get("title"), "command" in each and f"`{each['command']}`"])
        title = f"{', '.join(named)}:\n\n" if "title" in each else ""
        notes = f"\n{bullets(each['notes'])}" if each["notes"] else ""
        parts.append(f"{title}{table(each['header'], each['rows'])}\n{notes}")
    return "\n".join(parts)


def achieved(row: Result) -> str:
    said = [f"{number(row['per_s'])} {row['makes']}/s"] if "makes" in row else []
    said += [f"{number(row[unit])} {name}" for unit, name in UNITS.items() if row.get(unit) is not None]
    return ", ".join(said)


def kernel(result: Result) -> str:
    """Any bench of cases and providers: one table, and what was noted of the providers."""
    ours = {label(row["case"]): row["ms"][1] for row in result["rows"] if row["provider"] == "ours"}
    rows, above = [], ""
    for row in result["rows"]:
        case = label(row["case"])
        more = "" if case not in ours or row["provider"] == "ours" else f"{row['ms'][1] / ours[case]:.2f}×"
        floor, peak = ("" if row[key] is None else f"{row[key]:.0f}" for key in ("floor_pct", "peak_mib"))
        name = "" if case == above else case
        rows.append([name, row["provider"], spread(row["ms"]), achieved(row), floor, peak, f"{row['error']:.0e}", more])
        above = case
    said = "Medians [p20 to p80] of interleaved runs."
    said += f" Ceilings: {', '.join(ceilings(result))}." if ceilings(result) else ""
    if any((row["floor_pct"] or 0) > 100 for row in result["rows"]):
        said += " What mostly reads can pass the rate of a copy, and so 100 %."
    remarks = [f"{row['provider']}: {row['note']}" for row in result["rows"] if row["note"]] + without(result)
    header = ["case", "provider", "ms", "achieved", "% of floor", "peak MiB", "error", "ours is"]
    return f"{head(result, more=said)}\n{table(header, rows)}\n\n{bullets(remarks)}"


def step(result: Result) -> str:
    ratios = {label(entry["case"]): entry["times"] for entry in result["ratios"]}
    of_case: dict[str, list[Any]] = {}
    for row in result["rows"]:
        of_case.setdefault(label(row["case"]), []).append(row)
    rows, phases = [], []
    for case, pair in of_case.items():
        times = ratios.get(case, {})
        for row in pair:
            peak, joules = row["peak_mib"], row["joules_per_image"]
            rows.append(
                [
                    case if row is pair[0] else "",
                    row["provider"],
                    f"{row.get('steps') or result['repeats']} × {row['images']}",
                    spread(row["seconds"]),
                    number(row["images_per_s"]),
                    "" if peak is None else str(peak),
                    "" if joules is None else number(joules),
                    f"{row['plan_tokens']:.1f}",
                    f"{number(times['step'])}×" if "step" in times and row is not pair[0] else "",
                ]
            )
        cells = []
        for name in pair[0]["phases"]:
            both = " / ".join(number(1e3 * row["phases"].get(name, 0.0) / row["images"]) for row in pair)
            cells.append(both + (f" ({number(times[name])}×)" if times.get(name) else ""))
        phases.append([case, *cells])
    header = ["case", "provider", "steps × images", "seconds a step", "images/s", "peak MiB", "J/image", "plan tokens"]
    notes = [f"{row['provider']}: {row['note']}" for row in result["rows"] if row.get("note")]
    notes += [f"seconds ~ {axis}^{exponent}" for axis, exponent in result.get("exponent", {}).items()]
    notes += [f"{label(e['case'])}, {line}" for e, line in zip(_entries(result), without(result), strict=True)]
    return f"""{head(result, more="Medians [p20 to p80] of steps taken in turn.")}
{table([*header, "ours is"], rows)}

Milliseconds an image of each phase, ours / the baseline's, and how many times longer that is:

{table(["case", *(result["rows"][0]["phases"] if result["rows"] else [])], phases)}

{bullets([*notes, *result["missing"]])}"""


def _entries(result: Result) -> list[Any]:
    return [*result["skipped"], *result["failed"]]


def step_profile(result: Result) -> str:
    header = ["phase", "ms", "%", "calls", "gap ms", "busy ms", "floor ms", "× floor", "bound by"]
    rows = []
    for row in result["rows"]:
        floor = row["floor_ms"]
        why = f" (no floor: {NO_FLOOR[row['phase']]})" if not floor and row["phase"] in NO_FLOOR else ""
        busy = number(row["busy_ms"]) if result["device"] == "cuda" else ""
        beyond = ["" if floor is None else number(floor), f"{row['ms'] / floor:.1f}" if floor else ""]
        numbers = [number(row["ms"]), f"{row['pct']:.1f}", f"{row['calls']:.3g}", number(row["gap_ms"]), busy]
        rows.append([row["phase"], *numbers, *beyond, row["binds"] + why])
    said = f"A step of {result['images']} images takes {spread(result['step_ms'])} ms: "
    said += f"{number(result['images_per_second'])} images a second. "
    said += "The profile of it did not end."
    if rows:
        said = said.replace("The profile of it did not end.", "Under the profiler it takes ")
        said += f"{number(result['profiled_step_ms'][1])} ms. The phases cover {result['covered_pct']:.1f} % of it."
    said += f" Ceilings: {', '.join(ceilings(result))}."
    if any(row["floor_ms"] and row["floor_ms"] > row["ms"] for row in result["rows"]):
        said += " A phase can pass its floor: the ceilings are of one large copy and one square matrix product."
    if result["power"]:
        said += f" Power: {', '.join(f'{name} {value}' for name, value in result['power'].items())}."
    said += "".join(f" Missing: {missing}." for missing in result["missing"])
    names = [
        [part if not i else "", f"`{name}`", number(count), number(us)]
        for part, kernels in result.get("kernels", {}).items()
        for i, (name, count, us) in enumerate(kernels[:SHOWN])
    ]
    unit = "kernel" if result["device"] == "cuda" else "operator"
    streams = [
        f"{stream}: {', '.join(f'{phase} {number(ms)} ms' for phase, ms in phases.items())}"
        for stream, phases in result["streams"].items()
    ]
    by_name = f"{table(['of a step', unit, 'count', 'µs'], names)}\n\n" if names else ""
    return f"{head(result, more=said)}\n{table(header, rows)}\n\n{by_name}{bullets(streams)}"


def bars(result: Result) -> tuple[str, dict[str, dict[str, float]]]:
    """What is drawn of a step: a unit, and the phases of each bar."""
    if result["bench"] == "step":
        return "seconds an image", {
            f"{label(row['case'])}: {row['provider']}": {k: s / row["images"] for k, s in row["phases"].items()}
            for row in result["rows"]
        }
    found = {"step": {row["phase"]: row["ms"] for row in result["rows"]}}
    found["floors"] = {row["phase"]: row["floor_ms"] or 0.0 for row in result["rows"]}
    return "ms of a step", found | result["streams"]


def draw(result: Result, path: Path) -> None:
    """A PNG of stacked bars, with one colour for each phase of the first; what is no phase is grey."""
    from matplotlib.figure import Figure

    unit, named = bars(result)
    wrapped = {fill(name, 40): bar for name, bar in named.items()}
    figure = Figure(figsize=(10, 1.8 + 0.4 * len(wrapped)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(wrapped)
    for i, phase in enumerate(next(iter(wrapped.values()))):
        widths = [bar.get(phase, 0.0) for bar in wrapped.values()]
        colour = "lightgrey" if phase in ("idle", "rest") else f"C{i % 10}"
        axes.barh(
            list(wrapped), widths, left=left, color=colour, hatch="//" * (i // 10), edgecolor="white", label=phase
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    with whole(path) as part:
        figure.savefig(part, dpi=100, metadata={"Software": None})


KERNELS = ["rollout", "rewards", "decode_attention", "rms_norm", "silu_mul", "rope_kv_write"]
KERNELS += ["group_advantages", "token_logprobs", "linear_logprobs", "grpo_loss", "cfg_sample"]
# The sections of RESULTS.md, in their order, by the name of the bench.
PARTS: dict[str, Callable[[Result], str]] = {
    "tables": tables,
    "step": step,
    "step_profile": step_profile,
    **dict.fromkeys(["train", *KERNELS], kernel),
}
DRAWN = ("step", "step_profile")


def load(folder: Path) -> dict[Path, dict[str, Any]]:
    """The results in `folder`, in the order of their sections.

    Raises:
        ValueError: a file is no JSON object of a bench that has a section.
    """
    results = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for path, result in results.items():
        if (bench := result.get("bench")) not in PARTS:
            raise ValueError(f"{path}: no section for bench {bench!r}; there are {', '.join(PARTS)}")
    order = list(PARTS)
    return dict(sorted(results.items(), key=lambda item: (order.index(item[1]["bench"]), item[1].get("device", ""))))


def render(folder: Path, pictures: bool = True) -> str:
    """RESULTS.md from the JSON files in `folder`; the pictures are drawn beside them."""
    about = "Generated by `python -m bicot.bench.report` from bench/results; do not edit. Commands are those of today."
    sections = [f"# Results\n\n{about}\n"]
    for path, result in load(folder).items():
        picture = path.with_suffix(".png")
        sections.append(PARTS[result["bench"]](result))
        if pictures and result["bench"] in DRAWN and result["rows"]:
            draw(result, picture)
        if picture.exists():
            sections.append(f"![{result['bench']}]({folder.name}/{picture.name})\n")
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about = "a folder with RESULTS.md beside it, or FILE.json"
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results", help=about)
    folder = parser.parse_args().results.resolve()
    if folder.is_file():
        archive, folder = json.loads(folder.read_text()), HERE / "results"
        for name, result in archive.items():
            with whole(folder / name) as part:
                part.write_text(dumps(result))
    pictures = importlib.util.find_spec("matplotlib") is not None
    if not pictures:
        print("without pictures: matplotlib is not installed")
    try:
        page = render(folder, pictures)
    except ValueError as error:
        parser.error(str(error))
    with whole(folder.parent / "RESULTS.md") as part:
        part.write_text(page)


if __name__ == "__main__":
    main()
