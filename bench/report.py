"""Write RESULTS.md and its pictures from the JSON files in bench/results: what was measured, on what, by which command.

python -m bicot.bench.report [RESULTS]

RESULTS is another folder, or the archive of a walk of gpu.sh, whose results then join those in bench/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .harness import label, write, write_svg

UNITS = {"gbps": "GB/s", "tflops": "TFLOP/s"}
HERE = Path(__file__).resolve().parent
# Of the pictures: ours, and what is measured beside it without doing the same; the peers have the other colours.
OURS = {"ours": "#1f5fbf", "ours, in place": "#6f9fe0", "ours in PyTorch": "#b3cdf0", "torch.compile": "#909090"}
PEERS = ("#e08a1e", "#3f9f5f", "#a05fbf", "#c0504d", "#8a6a4a")
NO_RIVALS = ("the decoder alone", "the decoder beside")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}".rstrip(".")


def machine(result: dict[str, Any]) -> str:
    if "gpu" in result:
        versions = ", ".join(f"{name} {result[name]}" for name in ("driver", "torch", "triton", "commit"))
        return f"{result['gpu']}, {clocks(result)}{versions}"
    return (
        f"{result['cpu']} ({result['isa']}), {clocks(result)}{result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}"
    )


def clocks(result: dict[str, Any]) -> str:
    """What is known of them, and a comma."""
    said = {"sm_mhz": "SM {} MHz", "sm_mhz_max": "at most {}", "memory_mhz": "memory {} MHz", "power_limit_w": "{} W"}
    if "gpu" not in result:
        said = {"cpu_mhz": "{} MHz"}
    return "".join(f"{words.format(f'{result[key]:.0f}')}, " for key, words in said.items() if result.get(key))


def toy_seeds(result: dict[str, Any]) -> str:
    runs = result["runs"]
    tasks = list(runs[0]["before"]["reward_by_task"])
    rows = [
        [
            str(run["seed"]),
            f"{run['heldout_reward_before']:.3f} → {run['heldout_reward_after']:.3f}",
            *(
                f"{run['before']['reward_by_task'][task]:.2f} → {run['after']['reward_by_task'][task]:.2f}"
                for task in tasks
            ),
            f"{run['before']['relation']:.2f} → {run['after']['relation']:.2f}",
            f"{run['before']['plan_cell_entropy_bits']:.2f} → {run['after']['plan_cell_entropy_bits']:.2f}",
            f"{run['steps']}",
            f"{run['seconds']:.0f}",
            f"{run['images_per_second']:.1f}",
        ]
        for run in runs
    ]
    header = ["seed", "held-out reward", *tasks, "relation holds", "plan places, bits", "steps", "seconds", "images/s"]
    options = " ".join(["", "--", *result["options"]]) if result["options"] else ""
    return f"""## The default run, three seeds

`python -m bicot.bench.toy_seeds --output bench/results/toy_seeds.json{options}` on {machine(result)}.
Mean reward of {runs[0]["before"]["samples"]} samples of held-out prompts, before → after training; seconds are those of
the training steps. {result.get("note", "")}

{table(header, rows)}

![held-out prompts before and after training](results/toy_seeds.png)
"""


def h200(result: dict[str, Any]) -> str:
    """Tables that were taken by hand, each with the command that measures the same."""
    ceilings = result["ceilings"]
    parts = [
        f"""## On one H200

On {machine(result)}. {result["about"]} Ceilings: copy {number(ceilings["copy_gbps"])} GB/s, bfloat16
{number(ceilings["gemm_tflops"]["bfloat16"])} TFLOP/s.
"""
    ]
    for each in result["tables"]:
        notes = "\n".join(f"- {note}" for note in each["notes"])
        parts.append(f"{each['title']}, `{each['command']}`:\n\n{table(each['header'], each['rows'])}\n\n{notes}\n")
    return "\n".join(parts)


def cells(row: dict[str, Any], ours: float | None) -> list[str]:
    """Of one provider: all columns after the case. `ours` is the median that others are compared with."""
    p20, p50, p80 = row["ms"]
    achieved = [f"{number(row['per_s'])} {row['makes']}/s"] if "makes" in row else []
    achieved += [f"{number(row[unit])} {name}" for unit, name in UNITS.items() if row.get(unit) is not None]
    achieved += [f"{row['hidden_pct']:.0f} % of the rewards hidden"] if "hidden_pct" in row else []
    return [
        row["provider"],
        f"{number(p50)} [{number(p20)} to {number(p80)}]",
        ", ".join(achieved),
        "" if row["floor_pct"] is None else f"{row['floor_pct']:.0f}",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        f"{row['error']:.0e}",
        "" if ours is None or row["provider"] == "ours" else f"{p50 / ours:.2f}×",
    ]


def kernel(result: dict[str, Any]) -> str:
    """The section of any kernel bench: one table without its empty columns, then what was noted of the providers."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(label(row["case"]), []).append(row)
    header = ["case", "provider", "ms", "achieved", "% of floor", "peak MiB", "error", "ours is"]
    rows = []
    for case, providers in cases.items():
        ours = next((row["ms"][1] for row in providers if row["provider"] == "ours"), None)
        rows += [[case if row is providers[0] else "", *cells(row, ours)] for row in providers]
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]

    ceilings = [f"copy {number(rate)} GB/s" for rate in [result["ceilings"].get("copy_gbps")] if rate]
    ceilings += [f"{name} {number(rate)} TFLOP/s" for name, rate in result["ceilings"].get("gemm_tflops", {}).items()]
    remarks = [(row["provider"], row["note"]) for row in result["rows"] if row["note"]]
    for kind, words in (("skipped", "not run"), ("failed", "FAILED")):
        remarks += [(entry["provider"], f"{words}: {entry['reason']}") for entry in result[kind]]
    measured = f" Ceilings: {', '.join(ceilings)}." if ceilings else ""
    if any((row["floor_pct"] or 0) > 100 for row in result["rows"]):
        measured += " What mostly reads can pass the rate of a copy, and so 100 %."
    listed = "\n".join(f"- {provider}: {remark}" for provider, remark in dict.fromkeys(remarks))
    return f"""## {result["bench"]} on {result.get("gpu", "the CPU")}

`{result["command"]}` on {machine(result)}.
{result["about"]} Medians [p20 to p80] of interleaved runs.{measured}

{table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])}

{listed}
"""


def faster(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """case -> provider -> how many times faster than eager: its p80, p50 and p20 against eager's median."""
    found: dict[str, dict[str, list[float]]] = {}
    for eager in (row for row in result["rows"] if row["provider"] == "eager"):
        rows = [row for row in result["rows"] if row["case"] == eager["case"] and row is not eager]
        times = {row["provider"]: row["ms"] for row in rows if row["provider"] not in NO_RIVALS}
        if times:
            found[label(eager["case"])] = {name: [eager["ms"][1] / t for t in ms[::-1]] for name, ms in times.items()}
    return found


def draw_kernel(result: dict[str, Any], path: Path) -> None:
    """The SVG of `faster`, if there is any: a group of bars a case, a bar a provider, a line from p20 to p80."""
    cases = faster(result)
    if not cases:
        return
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullLocator

    providers = dict.fromkeys(name for times in cases.values() for name in times)
    others = iter(PEERS)
    colours = {name: OURS.get(name) or next(others) for name in providers}
    figure = Figure(figsize=(10, 1.3 + 0.18 * sum(len(times) + 1 for times in cases.values())), layout="constrained")
    axes = figure.subplots()
    top, names = 0, {}
    for case, times in cases.items():
        names[top + (len(times) - 1) / 2] = case
        for y, (name, (low, middle, high)) in enumerate(times.items(), top):
            axes.barh(y, middle - 1, 0.9, left=1, color=colours[name])
            axes.plot([low, high], [y, y], color="black", lw=0.8)
            axes.annotate(
                f"{number(middle)}×", (max(high, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        top += len(times) + 1
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ends = [end for times in cases.values() for low, _, high in times.values() for end in (low, high)]
    axes.set_xlim(min(0.9, *ends) / 1.1, max(2, *ends) * 1.2)  # room for the numbers
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_yticks(list(names), list(names.values()), fontsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"times faster than eager on {result.get('gpu', 'the CPU')}: medians, and lines from p20 to p80")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    write_svg(figure, path)


KERNELS = ["rollout", "rewards", "decode_attention", "rms_norm", "silu_mul", "rope_kv_write"]
KERNELS += ["group_advantages", "token_logprobs", "linear_logprobs", "grpo_loss", "cfg_sample"]


class Part(NamedTuple):
    """What a bench has in RESULTS.md; `draw` writes its picture to an SVG file."""

    section: Callable[[dict[str, Any]], str]
    draw: Callable[[dict[str, Any], Path], None] | None = None


def of_module(name: str, drawn: bool = True) -> Part:
    """The bench's own module writes and draws; it may need much, and is imported for that alone."""

    def module() -> Any:
        return importlib.import_module(f".{name}", __package__)

    return Part(lambda result: module().section(result), (lambda *given: module().draw(*given)) if drawn else None)


PARTS = {
    "toy_seeds": Part(toy_seeds),
    "toy_guidance": of_module("toy_guidance"),
    "best_of": of_module("best_of", drawn=False),
    "distributed": of_module("bench_distributed", drawn=False),
    "h200": Part(h200),
    "step": of_module("bench_step"),
    "step_profile": of_module("step_profile"),
    "decode_kernels": of_module("decode_kernels", drawn=False),
    "scaling": of_module("scaling"),
    "step_model": of_module("step_model", drawn=False),
    "train": Part(kernel, draw_kernel),
    **dict.fromkeys(KERNELS, Part(kernel, draw_kernel)),
}


def load(folder: Path) -> dict[Path, dict[str, Any]]:
    """The results in `folder`, in the order of their sections.

    Raises:
        ValueError: a file is no JSON object of a bench that has a section.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        bench = result.get("bench")
        if bench not in PARTS:
            raise ValueError(f"{path}: no section for bench {bench!r}; there are {', '.join(PARTS)}")
        results[path] = result
    order = list(PARTS)
    return dict(sorted(results.items(), key=lambda item: (order.index(item[1]["bench"]), item[1].get("device", ""))))


def render(folder: Path, pictures: bool = True) -> str:
    """RESULTS.md from the JSON files in `folder`; the pictures are drawn beside them."""
    sections = ["# Results\n\nGenerated by `python -m bicot.bench.report` from bench/results; do not edit.\n"]
    for path, result in load(folder).items():
        part, picture = PARTS[result["bench"]], path.with_suffix(".svg")
        sections.append(part.section(result))
        if part.draw and pictures:
            part.draw(result, picture)
            sections += [f"![{result['bench']}]({folder.name}/{picture.name})\n"] if picture.exists() else []
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        default=HERE / "results",
        help="a folder with RESULTS.md beside it, or FILE.json",
    )
    folder = parser.parse_args().results.resolve()
    if folder.is_file():
        archive, folder = json.loads(folder.read_text()), HERE / "results"
        for name, result in archive.items():
            write(folder / name, json.dumps(result, indent=1) + "\n")
    pictures = importlib.util.find_spec("matplotlib") is not None
    if not pictures:
        print("without pictures: matplotlib is not installed")
    try:
        write(folder.parent / "RESULTS.md", render(folder, pictures))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
