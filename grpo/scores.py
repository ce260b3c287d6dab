"""Scores the pictures of an evaluation, by reward and task type, with bootstrap intervals over its prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble
from ..rewards.plan import asked, said
from .benchmarks import Picture, Prompt, load_picture
from .distributed import Ranks
from .files import whole

SAMPLES, SCORES = "samples.jsonl", "scores.json"
LEVEL, RESAMPLES = 0.95, 10_000
_AT_ONCE = 64  # pictures


def plan_agreement(example: Example) -> dict[str, float]:
    """Precision and recall of what the plan states, against the annotations (rewards/plan.py). NaN = not defined."""
    wanted, stated = asked(example), said(example)
    both = len(wanted & stated)
    return {
        "plan_precision": both / len(stated) if wanted and stated else math.nan,
        "plan_recall": both / len(wanted) if wanted else math.nan,
    }


def score(
    ensemble: RewardEnsemble,
    prompts: Sequence[Prompt],
    pictures: Sequence[Picture],
    output: Path,
    device: torch.device,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Score all pictures, each rank a part of them -> a record for each, in order, on every rank."""
    found: list[tuple[int, dict[str, Any]]] = []
    mine = range(ranks.rank, len(pictures), ranks.size)
    for start in range(0, len(mine), _AT_ONCE):
        places = mine[start : start + _AT_ONCE]
        examples, pixels = [], []
        for place in places:
            image, (plan,) = load_picture(output / pictures[place].file)
            example = prompts[pictures[place].prompt].example
            assert example
            examples.append(replace(example, plan=plan))
            pixels.append(image)
        images: Tensor = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
        scores = ensemble.submit(images, examples).result().tolist() if ensemble.names else [[]] * len(examples)
        for place, example, row in zip(places, examples, scores, strict=True):
            named = dict(zip(ensemble.names, row, strict=True)) | plan_agreement(example)
            sample = {
                "file": pictures[place].file,
                "prompt": example.prompt,
                "task_type": example.task_type,
                "plan": example.plan,
                "scores": {name: None if math.isnan(value) else value for name, value in named.items()},
            }
            found.append((place, sample))
    return [sample for _, sample in sorted(ranks.gather(found), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Evaluation:
    """Scores of P prompts: for each reward the means [P] over a prompt's samples, NaN where it does not apply."""

    prompts: list[str]
    tasks: list[str]
    means: dict[str, np.ndarray]

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, Any]], num_generations: int) -> Evaluation:
        """The means of the records of `score`, which has `num_generations` for each prompt."""
        groups = [samples[i : i + num_generations] for i in range(0, len(samples), num_generations)]
        means = {}
        for name in samples[0]["scores"]:
            values = ([s["scores"][name] for s in group if s["scores"][name] is not None] for group in groups)
            means[name] = np.array([math.fsum(v) / len(v) if v else math.nan for v in values])
        return cls([group[0]["prompt"] for group in groups], [group[0]["task_type"] for group in groups], means)

    @classmethod
    def load(cls, output: Path) -> Evaluation:
        """Read the scores in an output folder.

        Raises:
            ValueError: it has no scores.
        """
        if not (output / SCORES).is_file():
            raise ValueError(f"{output} has no {SCORES}: evaluate it with --format bicot first")
        number = json.loads((output / SCORES).read_text())["num_generations"]
        return cls.of([json.loads(line) for line in (output / SAMPLES).read_text().splitlines()], number)

    def require_prompts(self, prompts: Sequence[str], output: Path) -> None:
        """Raises ValueError if the evaluation is of other prompts than these."""
        if self.prompts != list(prompts):
            pairs = zip(self.prompts, prompts, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.prompts), len(prompts)))
            raise ValueError(f"--compare {output}: it has other prompts, from prompt {place + 1} on")

    def rows(self) -> list[Row]:
        """The mean of each reward by task type and over all prompts."""
        return [row for name, values in self.means.items() for row in _by_task(name, self.tasks, values)]

    def minus(self, other: Evaluation) -> list[Row]:
        """The mean difference of each reward, prompt by prompt, by task type and over all prompts."""
        names = [name for name in self.means if name in other.means]
        return [row for name in names for row in _by_task(name, self.tasks, self.means[name] - other.means[name])]


@dataclass(frozen=True)
class Row:
    """A mean over the prompts to which a reward applies, and its interval, which is NaN for a single prompt."""

    reward: str
    task_type: str
    prompts: int
    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def _by_task(name: str, tasks: Sequence[str], values: np.ndarray) -> list[Row]:
    rows = []
    for task in (*sorted(set(tasks)), "all"):
        chosen = values[[task in ("all", own) for own in tasks]]
        there = chosen[~np.isnan(chosen)]
        if len(there):
            rows.append(Row(name, task, len(there), float(there.mean()), *bootstrap(there)))
    return rows


def bootstrap(values: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    generator, block = np.random.default_rng(0), max(1, 10**7 // len(values))
    means = [
        values[generator.integers(len(values), size=(min(block, resamples - start), len(values)))].mean(1)
        for start in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def table(rows: Sequence[Row]) -> str:
    """Means and their intervals as text."""
    lines = [f"{'reward':<18}{'task type':<16}{'prompts':>8}{'mean':>9}   {LEVEL:.0%} interval"]
    return "\n".join(lines + [f"{_head(row)}{row.mean:>9.3f}   {_interval(row, '.3f')}" for row in rows])


def difference_table(rows: Sequence[Row]) -> str:
    """Differences and their intervals as text, and whether the intervals exclude 0."""
    lines = [f"{'reward':<18}{'task type':<16}{'prompts':>8}{'change':>9}   {LEVEL:.0%} interval"]
    for row in rows:
        verdict = "excludes 0" if row.excludes_zero else "includes 0"
        verdict = "one prompt has no interval" if math.isnan(row.low) else verdict
        lines.append(f"{_head(row)}{row.mean:>+9.3f}   {_interval(row, '+.3f'):<18}{verdict}")
    return "\n".join(lines)


def _head(row: Row) -> str:
    return f"{row.reward:<18}{row.task_type:<16}{row.prompts:>8}"


def _interval(row: Row, form: str) -> str:
    return "–" if math.isnan(row.low) else f"{row.low:{form}} to {row.high:{form}}"


def save_scores(
    output: Path, samples: Sequence[Mapping[str, Any]], num_generations: int, rows: Sequence[Row], more: dict[str, Any]
) -> None:
    """Write the scores of all samples, and then the means, as JSON."""
    with whole(output / SAMPLES) as part:
        part.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    what = {"num_generations": num_generations, "level": LEVEL, "rows": as_json(rows), **more}
    with whole(output / SCORES) as part:
        part.write_text(json.dumps(what, indent=2, allow_nan=False) + "\n")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON objects. NaN becomes null, since JSON has no NaN."""
    return [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]


def chart(path: Path, evaluations: Mapping[str, Sequence[Row]]) -> None:
    """Draw a bar chart of the means and intervals by task type, with a plot for each reward."""
    from matplotlib.figure import Figure

    every = [row for rows in evaluations.values() for row in rows]
    names = list(dict.fromkeys(row.reward for row in every))
    figure = Figure(figsize=(7, 0.6 + 2.4 * len(names)), layout="constrained")
    width = 0.8 / len(evaluations)
    for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        tasks = list(
            dict.fromkeys(row.task_type for rows in evaluations.values() for row in rows if row.reward == name)
        )
        for i, (label, rows) in enumerate(evaluations.items()):
            own = [row for row in rows if row.reward == name]
            means = np.array([row.mean for row in own])
            ends = np.abs(np.array([[row.low for row in own], [row.high for row in own]]) - means)
            places = [tasks.index(row.task_type) + (i - (len(evaluations) - 1) / 2) * width for row in own]
            axis.bar(places, means, width, yerr=ends, capsize=3, label=label)
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_ylabel(name)
    figure.legend(list(evaluations), loc="outside upper center")
    with whole(path) as part:
        figure.savefig(part, dpi=120)
