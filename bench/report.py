"""Write RESULTS.md from the JSON files in bench/results: what was measured, on what, with the command.

python -m bicot.bench.report
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import label

UNITS = {"gbps": "GB/s", "tflops": "TFLOP/s"}
HERE = Path(__file__).resolve().parent


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}".rstrip(".")


def machine(result: dict[str, Any]) -> str:
    if "gpu" in result:
        versions = ", ".join(f"{name} {result[name]}" for name in ("driver", "torch", "triton", "commit"))
        return f"{result['gpu']}, {versions}"
    return (
        f"{result['cpu']} ({result['isa']}), {result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}"
    )


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


def cells(row: dict[str, Any], ours: float | None) -> list[str]:
    """Of one provider: all columns after the case. `ours` is the median that others are compared with."""
    p20, p50, p80 = row["ms"]
    achieved = [f"{number(row['per_s'])} {row['makes']}/s"] if "makes" in row else []
    achieved += [f"{number(row[unit])} {name}" for unit, name in UNITS.items() if row.get(unit) is not None]
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


KERNELS = ["rollout", "rewards", "decode_attention", "rms_norm", "silu_mul", "rope_kv_write"]
KERNELS += ["group_advantages", "token_logprobs", "linear_logprobs", "grpo_loss", "cfg_sample"]


def step_profile(result: dict[str, Any]) -> str:
    """The section of a profiled step; its module, which needs transformers, is imported for it alone."""
    from .step_profile import section

    return section(result)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "toy_seeds": toy_seeds,
    "step_profile": step_profile,
    **dict.fromkeys(KERNELS, kernel),
}


def render(folder: Path) -> str:
    """RESULTS.md from the JSON files in `folder`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results.sort(key=lambda result: (list(SECTIONS).index(result["bench"]), result.get("device", "")))
    body = "\n".join(SECTIONS[result["bench"]](result) for result in results)
    return f"# Results\n\nGenerated by `python -m bicot.bench.report` from bench/results; do not edit.\n\n{body}"


def main() -> None:
    (HERE / "RESULTS.md").write_text(render(HERE / "results"))


if __name__ == "__main__":
    main()
