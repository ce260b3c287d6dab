"""distributed: the toy trained by two ranks, in each way to share a model, against one rank with the same global batch.

python -m bicot.bench.bench_distributed [--modes NAME …] [--tiny] [--output bench/results/distributed_cpu.json]
Each run is `torchrun train.py` with configs/toy.yaml, in processes of one thread on a CPU (gloo). Two ranks take four
prompts each, and are compared with one rank that adds up two micro-batches of four. That one is compared with one rank
that takes all eight at once, which shows what rounding alone does to a run. A run follows its baseline to rounding
until a token is drawn otherwise. From there on samples differ, and what can be compared are means and the held-out
reward. Tokens/s are of the update phase, medians of short runs one after the other, behind all others.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..grpo import trainer
from ..grpo.output import METRICS, read_metrics
from .harness import ROOT, command_line, finish, start

CURVES = ("reward", "loss", "kl")
PROMPTS, PICTURE = 8, 64  # prompts of a step, tokens of a picture
EARLY = 10  # steps, looked at closely
SAME, CHAOS, RISE = (
    1e-4,
    0.03,
    0.1,
)  # bounds: of loss and kl while draws are the same, of the reward's mean gap; the gain
TIMED = ("--stop_after", "15", "--eval_file", "null")
WARM = 3  # of these are not timed: the first compiles, or allocates
TINY = ("--max_steps", "2", "--num_generations", "2", "--num_eval_generations", "1", "--max_completion_length", "8")


class Mode(NamedTuple):
    """`baseline`: the mode that it should follow; `needs`: a package."""

    ranks: int
    baseline: str
    options: tuple[str, ...] = ()
    needs: str = "torch"
    micro_batches: int = 1


def zero(stage: int) -> tuple[str, ...]:
    return "--deepspeed", str(ROOT / "configs" / f"zero{stage}.json")


ONE, HALVES = "one rank", "one rank, in halves"
ONE_LORA, ONE_8BIT = "one rank, LoRA", "one rank, adamw_8bit"
LORA, EIGHT_BITS = ("--lora_r", "16", "--learning_rate", "4e-3"), ("--optim", "adamw_8bit")
MODES = {
    ONE: Mode(1, ONE),
    HALVES: Mode(1, ONE, micro_batches=2),
    "ddp": Mode(2, HALVES),
    **{f"zero{stage}": Mode(2, HALVES, zero(stage), "deepspeed") for stage in (1, 2, 3)},
    ONE_LORA: Mode(1, ONE_LORA, LORA, "peft", micro_batches=2),
    "zero2, LoRA": Mode(2, ONE_LORA, (*LORA, *zero(2)), "deepspeed"),
    ONE_8BIT: Mode(1, ONE_8BIT, EIGHT_BITS, "torchao", micro_batches=2),
    "ddp, adamw_8bit": Mode(2, ONE_8BIT, EIGHT_BITS, "torchao"),
}


class NotedTrainer(trainer.Trainer):
    """Notes a checksum of each sample's tokens, step by step, and the bytes of the tensors that training holds."""

    drawn: ClassVar[list[list[int]]] = []
    held: ClassVar[int] = 0

    def _roll_out(self, examples: Any) -> Any:
        result = super()._roll_out(examples)
        plans, pictures = result[0].plans.tolist(), result[0].image_tokens.tolist()
        self.drawn.append([zlib.crc32(repr(tokens).encode()) for tokens in zip(plans, pictures, strict=True)])
        return result

    def run(self) -> Any:
        summary = super().run()
        del self.engine  # with its KV cache, and copies of merged or gathered weights
        gc.collect()
        # by type: isinstance would load what loads lazily, and a moment of 8 bits is made of tensors that are here too
        storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        NotedTrainer.held = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr()}.values())
        return summary


def one_of_the_ranks(folder: Path, words: Sequence[str]) -> None:
    """train.py with its Trainer taking notes -> <folder>/<rank>.json."""
    setattr(trainer, "Trainer", NotedTrainer)  # noqa: B010, which mypy wants
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    notes = {"drawn": NotedTrainer.drawn, "held_mib": NotedTrainer.held / 2**20, "rss_mib": peak}
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(notes))


def train(mode: Mode, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run the mode -> what it leaves."""
    folder.mkdir()
    words = [sys.executable]
    if mode.ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(mode.ranks)]
    words += ["-m", "bicot.bench.bench_distributed", "--rank", str(folder), "--output_dir", str(folder / "run")]
    words += ["--per_device_train_batch_size", str(PROMPTS // mode.ranks // mode.micro_batches)]
    words += ["--gradient_accumulation_steps", str(mode.micro_batches), *mode.options, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(words, check=True, cwd=ROOT, env=environment)
    return noted(folder)


def noted(folder: Path) -> dict[str, Any]:
    """The steps' metrics, the summary, and the notes of all ranks, `drawn` [steps][samples]."""
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    steps = zip(*(rank["drawn"] for rank in ranks), strict=True)
    return {
        "rows": [row for _, row in read_metrics(folder / "run" / METRICS)[0]],
        "summary": json.loads((folder / "run" / "summary.json").read_text()),
        "drawn": [[sample for part in parts for sample in part] for parts in steps],
        **{key: [round(rank[key], 1) for rank in ranks] for key in ("held_mib", "rss_mib")},
    }


def gaps(rows: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The largest and the mean absolute difference of each curve; nothing of no steps."""
    found = {key: [abs(row[key] - other[key]) for row, other in zip(rows, others, strict=True)] for key in CURVES}
    return {key: [float(f"{x:.2g}") for x in (max(each), fmean(each))] for key, each in found.items() if each}


def described(run: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """How the run learns, and how it differs from its baseline, whose tokens it draws for `same_steps` steps."""
    rows, others = run["rows"], base["rows"]
    tipped = [sum(a != b for a, b in zip(*each, strict=True)) for each in zip(run["drawn"], base["drawn"], strict=True)]
    same = next((step for step, count in enumerate(tipped) if count), len(rows))
    return {
        "heldout": [round(run["summary"][f"heldout_reward_{when}"], 4) for when in ("before", "after")],
        "same_steps": same,
        "samples": len(run["drawn"][0]),
        "first_tipped": tipped[same] if same < len(rows) else 0,
        "gaps_while_same": gaps(rows[:same], others[:same]),
        f"gaps_of_{EARLY}": gaps(rows[:EARLY], others[:EARLY]),
        "gaps": gaps(rows, others),
        "seconds": round(run["summary"]["seconds"], 1),
        "first_update_s": round(rows[0]["seconds/train"], 1),
        "held_mib": run["held_mib"],
        "rss_mib": run["rss_mib"],
    }


def tokens_per_s(run: dict[str, Any]) -> int:
    """Trained tokens of all ranks over the seconds of the update phase."""
    samples, rows = len(run["drawn"][0]), run["rows"][WARM:] or run["rows"]
    return round(median(samples * (row["plan_tokens"] + PICTURE) / row["seconds/train"] for row in rows))


def faults(row: dict[str, Any]) -> list[str]:
    """What a run of full length does not hold."""
    same, (before, after) = row["gaps_while_same"], row["heldout"]
    limits = {"reward": 0.0, "loss": SAME, "kl": SAME}
    found = [f"{key} {same[key][0]} apart on the same draws" for key in same if same[key][0] > limits[key]]
    found += ["draws differ in the first step"] * (row["same_steps"] == 0)
    found += [f"rewards {row['gaps']['reward'][1]} apart in the mean"] * (row["gaps"]["reward"][1] > CHAOS)
    return found + [f"held-out reward {before} → {after}"] * (after < before + RISE)


def main() -> int:
    if sys.argv[1:2] == ["--rank"]:
        one_of_the_ranks(Path(sys.argv[2]), sys.argv[3:])
        return 0
    parser = command_line(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="and the baselines of these")
    arguments, result = start(parser, __doc__, "bench_distributed")
    result |= {"threads": 1, "device": "cpu", "rows": [], "skipped": []}
    wanted = {MODES[name].baseline for name in arguments.modes} | {*arguments.modes}
    names = wanted | {MODES[name].baseline for name in wanted}
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in MODES if name in names):
            mode = MODES[name]
            if find_spec(mode.needs) is None:
                result["skipped"].append({"mode": name, "reason": f"{mode.needs} is not installed"})
                continue
            runs[name] = train(mode, Path(folder) / name, TINY if arguments.tiny else ())
            row = {"mode": name, "baseline": mode.baseline} | described(runs[name], runs[mode.baseline])
            row["faults"] = [] if arguments.tiny else faults(row)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
        for row in result["rows"]:
            name = row["mode"]
            short = runs[name] if arguments.tiny else train(MODES[name], Path(folder) / f"{name}, timed", TIMED)
            row["tokens_per_s"] = tokens_per_s(short)
    finish(result, arguments.output)
    return 1 if any(row["faults"] for row in result["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
