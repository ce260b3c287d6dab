"""The default run with several seeds: does the held-out reward rise, and do the plans stay varied?

python -m bicot.bench.toy_seeds [--seeds 0 1 2] [--runs FOLDER] [--output bench/results/toy_seeds.json] [-- any option]
Each seed is `python train.py --seed N` in a process of its own; the last line is the JSON. Runs are kept in FOLDER, and
one that ended there is not run again.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..grpo.samples import Sample, load_samples, mean_by_task
from ..toy.world import plan_cell_entropy
from .harness import finish, hardware

ROOT = Path(__file__).resolve().parent.parent


def means(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Mean reward by task type, share of spatial prompts whose relation holds, entropy of the places in the plans."""
    held = [score for s in samples if not math.isnan(score := s.scores["scene_relation"])]
    places = plan_cell_entropy(s.plan for s in samples)
    return {**mean_by_task(samples), "relation holds": sum(held) / len(held), "plan places, bits": places}


def row(output: Path, seed: int) -> dict[str, str]:
    """Of the table: what the run of this seed left in `output`."""
    summary = json.loads((output / "summary.json").read_text())
    before, after = (means(load_samples(output / "samples" / f"heldout-{tag}")) for tag in ("before", "after"))
    total = [summary[f"heldout_reward_{tag}"] for tag in ("before", "after")]
    cells = {"seed": str(seed), "held-out reward": f"{total[0]:.3f} → {total[1]:.3f}"}
    cells |= {name: f"{before[name]:.2f} → {after[name]:.2f}" for name in before}
    cells |= {"steps": str(summary["steps"]), "seconds": f"{summary['seconds']:.0f}"}
    return cells | {"images/s": f"{summary['images_per_second']:.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file, the first seed's picture beside it"
    )
    parser.add_argument("--runs", type=Path, help="keep the runs here, each in the folder of its seed")
    parser.add_argument("train_options", nargs="*", help="passed on to train.py, after --")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            output = (arguments.runs or Path(folder)) / str(seed)
            command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--output_dir", str(output)]
            if not (output / "summary.json").is_file():
                subprocess.run([*command, *arguments.train_options], check=True)
            rows.append(row(output, seed))
            if arguments.output and seed == arguments.seeds[0]:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(output / "before_after.png", arguments.output.with_suffix(".png"))
    about = "Mean rewards of held-out prompts, before → after training; seconds are those of the training steps."
    typed = " ".join(
        ["python -m bicot.bench.toy_seeds", *["--"] * bool(arguments.train_options), *arguments.train_options]
    )
    table = {"header": [*rows[0]], "rows": [[*cells.values()] for cells in rows], "notes": []}
    result = {"bench": "tables", "title": "The default run by seed", "about": about, "command": typed}
    finish(result | hardware() | {"tables": [table]}, arguments.output)


if __name__ == "__main__":
    main()
