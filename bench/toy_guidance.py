"""Guidance in training, on the toy: none, as published, and with the log-probs that the pictures are drawn from.

python -m bicot.bench.toy_guidance [--seeds 0 1 2] [--steps 150] [--runs FOLDER] [--output FILE.json] [-- any option]
Each run is `python train.py` in a process of its own. Its held-out prompts are scored again with each guidance.
Runs are kept in FOLDER, and one that got to that step there is not run again; the last line is the JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .harness import finish, hardware, write_svg
from .toy_seeds import ROOT

GUIDANCE = 2.0  # what the toy's checkpoint is made for; 5, as published, makes its pictures worse
EVALUATED = (1.0, GUIDANCE)
VARIANTS = {
    "none, with KL (the default)": [],
    "2, conditional log-probs (as published)": ["--cfg_weight", str(GUIDANCE)],
    "2, guided log-probs": ["--cfg_weight", str(GUIDANCE), "--policy_logits", "guided"],
}
CURVES = ("reward", "reward_std", "kl", "loss", "text/entropy", "image/entropy", "grad_norm", "plan_tokens")
WINDOW, SMOOTH, EVERY = 20, 9, 3  # steps of a mean in the table and in the picture; steps from point to point there


def train(output: Path, *options: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--output_dir", str(output), *options], check=True)


def heldout(model: Path, seed: int, more: list[str]) -> dict[str, float]:
    """Mean held-out reward of a checkpoint by guidance, each before the one step of a run that begins with it."""
    rewards = {}
    for guidance in map(str, EVALUATED):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--seed", str(seed), "--eval_cfg_weight", guidance, "--max_steps", "1"]
            train(Path(folder), "--model_name_or_path", str(model), *options, *more)
            rewards[guidance] = json.loads((Path(folder) / "summary.json").read_text())["heldout_reward_before"]
    return rewards


def smooth(values: list[float]) -> list[float]:
    """Means over SMOOTH steps, at every EVERY-th."""
    around = SMOOTH // 2
    places = range(0, len(values), EVERY)
    return [float(f"{fmean(values[max(0, i - around) : i + around + 1]):.4g}") for i in places]


def measure(variant: str, seed: int, steps: int, output: Path, more: list[str]) -> dict[str, Any]:
    """One run: its curves, seconds a step, and the held-out reward before and after by guidance."""
    checkpoint = output / f"checkpoint-{steps:06d}"
    if not checkpoint.is_dir():
        train(output, "--seed", str(seed), "--stop_after", str(steps), *VARIANTS[variant], *more)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][:steps]
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "reward": [fmean(row["reward"] for row in part) for part in (rows[:WINDOW], rows[-WINDOW:])],
        "curves": {name: smooth([row[name] for row in rows]) for name in CURVES},
        "seconds_per_step": median(row["seconds/step"] for row in rows),
        "heldout": heldout(checkpoint, seed, more),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="a checkpoint is written there")
    parser.add_argument("--runs", type=Path, help="keep the runs here, in folders VARIANT/SEED numbered from 0")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("train_options", nargs="*", help="passed on to train.py, after --")
    arguments = parser.parse_args()
    more, toy = arguments.train_options, ROOT / "toy" / "assets"
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.runs or Path(folder)
        runs = [
            measure(variant, seed, arguments.steps, base / str(number) / str(seed), more)
            for seed in arguments.seeds
            for number, variant in enumerate(VARIANTS)
        ]
    before = {str(seed): heldout(toy, seed, more) for seed in arguments.seeds}
    finish({"bench": "toy_guidance", **hardware(), "options": more, "before": before, "runs": runs}, arguments.output)


def section(result: dict[str, Any]) -> str:
    from .report import machine, table  # it imports this module

    rows = []
    for run in result["runs"]:
        (first, last), before, after = run["reward"], result["before"][str(run["seed"])], run["heldout"]
        rows.append(
            [run["variant"], str(run["seed"]), str(run["steps"]), f"{first:.3f} → {last:.3f}"]
            + [f"{before[w]:.3f} → {after[w]:.3f}" for w in after]
            + [f"{run['seconds_per_step']:.2f}"]
        )
    header = ["guidance in training", "seed", "steps", f"reward, {WINDOW} steps"]
    header += [*(f"held-out, guidance {float(w):g}" for w in result["runs"][0]["heldout"]), "seconds a step"]
    options = " ".join(["", "--", *result["options"]]) if result["options"] else ""
    return f"""## Guidance in training, on the toy

`python -m bicot.bench.toy_guidance --output bench/results/toy_guidance.json{options}` on {machine(result)}.
Runs with configs/toy.yaml but for guidance. The reward is the mean of the first → the last {WINDOW} steps, drawn as
that run draws; held-out rewards are before → after these steps, by the guidance of evaluation; seconds are medians.
{result.get("note", "")}

{table(header, rows)}
"""


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel a metric, a line a run: means over SMOOTH steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    panels = figure.subplots(2, len(CURVES) // 2).flat
    colours = {variant: f"C{i}" for i, variant in enumerate(dict.fromkeys(run["variant"] for run in result["runs"]))}
    for axes, name in zip(panels, CURVES, strict=True):
        for run in result["runs"]:
            ys = run["curves"][name]
            steps = range(1, EVERY * len(ys), EVERY)
            axes.plot(steps, ys, color=colours[run["variant"]], lw=1.2, label=run["variant"])
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    write_svg(figure, path)


if __name__ == "__main__":
    main()
