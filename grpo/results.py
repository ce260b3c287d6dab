"""Writes the record of a run: run.json, alarms, and at the end summary.json, report.html and a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .alarms import Alarms
from .checkpoint import checkpoint_path
from .config import Config
from .files import METRICS, RUN, SUMMARY, whole
from .hub import push, write_card
from .output import read_metrics
from .report import no_failure, write_report
from .samples import Sample, heldout_table, mean_reward
from .tracking import Log


class Results:
    """Keeps the record of a run on the main rank.

    Args:
        config: every setting.
        names: the rewards that score training samples, those that are trained on first.
        judges: the rewards that score held-out samples; the first ones are `names`.
    """

    def __init__(self, config: Config, names: Sequence[str], judges: Sequence[str]) -> None:
        self.config, self.output = config, Path(config.output_dir)
        self.heldout_only = judges[len(names) :]
        path, count = self.output / METRICS, len(config.rewards.names)
        # metrics of the steps before, if the run was resumed
        self.rows = [row for _, row in read_metrics(path)[0]] if path.is_file() else []
        self.alarms = Alarms(names[:count], names[count:], config.num_iterations, self.rows)

    def describe(self) -> None:
        """Write run.json: the settings, the alarms so far, and the rewards that only score held-out samples."""
        about = {"settings": asdict(self.config), "alarms": self.alarms.said, "heldout": self.heldout_only}
        with whole(self.output / RUN) as part:
            part.write_text(json.dumps(about, indent=2) + "\n")

    def record(self, log: Log, step: int, metrics: dict[str, float], grid: Path | None) -> bool:
        """Write the metrics of a step and print the alarms that it raises -> whether there are any."""
        log.write(step, metrics, grid)
        said = self.alarms.look({"step": step, **metrics})
        if said:
            self.describe()
        print("".join(f"{line}\n" for line in said), end="")
        return bool(said)

    def finish(
        self,
        step: int,
        seconds: float,
        images: int,
        before: list[Sample],
        after: list[Sample],
        best: dict[str, Any],
    ) -> dict[str, Any]:
        """Write summary.json and report.html, and print the held-out rewards before and after training -> the summary.

        Args:
            step: the last step.
            seconds: training time of all steps.
            images: number of pictures drawn in them.
            before: held-out samples from before training.
            after: held-out samples from after training.
            best: the best evaluation, as `Heldout.summary` gives it.
        """
        summary = {
            "heldout_reward_before": mean_reward(before),
            "heldout_reward_after": mean_reward(after),
            "steps": step,
            "seconds": round(seconds, 3),
            "images_per_second": images / seconds if seconds else None,
            "seed": self.config.seed,
            **best,
        }
        with whole(self.output / SUMMARY) as part:
            part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        files = ["metrics"] if self.config.rollout_only else ["checkpoint", "metrics"]
        with no_failure("no report.html"):
            shown = {tag: samples for tag, samples in (("before", before), ("after", after)) if samples}
            write_report(self.output, self.config, summary, shown, self.alarms.said, self.heldout_only)
            files.append("report.html")
        print(heldout_table(before, after, self.heldout_only))
        if best and after:
            folder = best["best_model_checkpoint"]
            print(f'"after" is the best checkpoint by {self.config.metric_for_best_model}: {folder}')
        what = f"{', '.join(files[:-1])} and {files[-1]}"
        print(f"{step} steps in {seconds:.0f} s; {what} are in {self.output}")
        return summary

    def publish(self, summary: dict[str, Any], run: dict[str, Any], repo: str | None, done: bool) -> None:
        """Write the model card beside the model whose rewards the summary has: the best one, or that of the last step,
        with averaged weights if there are any. Upload that model to `repo` if the run is done.

        `run` are the settings that a checkpoint remembers.
        """
        step = summary["steps"]
        last = checkpoint_path(self.output, step)
        last = last if self.config.ema_decay is None else last / "ema"
        model = Path(summary.get("best_model_checkpoint", last))
        with no_failure("no model card"):
            write_card(model, self.config, run, summary, repo)
        if repo and done:
            push(model, repo, step)
