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
from typing import Any

from ..grpo.samples import Sample, load_samples, mean_by_task
from ..toy.world import plan_cell_entropy
from .harness import finish, hardware

ROOT = Path(__file__).resolve().parent.parent


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean reward by task type, share of spatial prompts whose relation holds, entropy of the places in the plans."""
    relation = [held for s in samples if not math.isnan(held := s.scores["scene_relation"])]
    return {
        "reward_by_task": mean_by_task(samples),
        "relation": sum(relation) / len(relation),
        "plan_cell_entropy_bits": plan_cell_entropy(s.plan for s in samples),
        "samples": len(samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file, the first seed's picture beside it"
    )
    parser.add_argument("--runs", type=Path, help="keep the runs here, each in the folder of its seed")
    parser.add_argument("train_options", nargs="*", help="passed on to train.py, after --")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            output = (arguments.runs or Path(folder)) / str(seed)
            command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--output_dir", str(output)]
            if not (output / "summary.json").is_file():
                subprocess.run([*command, *arguments.train_options], check=True)
            heldout = {tag: load_samples(output / "samples" / f"heldout-{tag}") for tag in ("before", "after")}
            summary = json.loads((output / "summary.json").read_text())
            runs.append({**summary, **{tag: describe(samples) for tag, samples in heldout.items()}})
            if arguments.output and seed == arguments.seeds[0]:
                shutil.copy(output / "before_after.png", arguments.output.with_suffix(".png"))
    finish({"bench": "toy_seeds", **hardware(), "options": arguments.train_options, "runs": runs}, arguments.output)


if __name__ == "__main__":
    main()
