"""Saves, loads and averages samples (a picture with its prompt, plan and scores) as records, without torch."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .files import whole


@dataclass(frozen=True)
class Sample:
    """A picture [H, W, 3] uint8 with its prompt, plan and scores. The reward is NaN if none applies."""

    prompt: str
    task_type: str
    plan: str
    reward: float
    scores: dict[str, float]
    image: np.ndarray


def save_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write the pictures to `path`.npz, and then the rest to `path`.jsonl. Without the second there are no samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: v for k, v in asdict(sample).items() if k != "image"} for sample in samples]
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    with whole(path.with_suffix(".npz")) as part:
        np.savez_compressed(part, images=np.stack([sample.image for sample in samples]))
    with whole(path.with_suffix(".jsonl")) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def remove_samples(path: Path) -> None:
    """Delete what `save_samples` wrote, if it wrote anything."""
    for suffix in (".jsonl", ".npz"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def load_samples(path: Path) -> list[Sample]:
    """Read what `save_samples` wrote; an empty list if it wrote nothing."""
    if not path.with_suffix(".jsonl").is_file():
        return []
    images = np.load(path.with_suffix(".npz"))["images"]
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    return [Sample(**row, image=image) for row, image in zip(rows, images, strict=True)]


def mean_by_name(rewards: Iterable[tuple[str, float]]) -> dict[str, float | None]:
    """Mean of the rewards by name, without NaN; None if a name has no other values."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, reward in rewards:
        groups[name] += [] if math.isnan(reward) else [reward]
    return {name: math.fsum(values) / len(values) if values else None for name, values in sorted(groups.items())}


def mean_by_task(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Mean reward by task type, without the samples that have no reward."""
    return mean_by_name((sample.task_type, sample.reward) for sample in samples)


def mean_reward(samples: Sequence[Sample]) -> float | None:
    """Mean reward of all samples that have one; None if none has."""
    return mean_by_name(("", sample.reward) for sample in samples).get("")


def heldout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of an evaluation: mean reward, the same by task type, and the mean of each reward where it applies."""
    scores = mean_by_name(pair for sample in samples for pair in sample.scores.items())
    means = {
        "heldout/reward": mean_reward(samples),
        **{f"heldout/reward_by_task/{task}": mean for task, mean in mean_by_task(samples).items()},
        **{f"heldout/rewards/{name}/mean": mean for name, mean in scores.items()},
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def reward_rows(
    before: Sequence[Sample], after: Sequence[Sample], names: Sequence[str] = ()
) -> list[tuple[str, float | None, float | None]]:
    """(name, mean before, mean after) of task types, all, and the rewards `names`; none without samples before."""
    if not before:
        return []
    first, last = mean_by_task(before), mean_by_task(after)
    rows = [*((task, first[task], last.get(task)) for task in first), ("all", mean_reward(before), mean_reward(after))]
    means = [heldout_metrics(samples) for samples in (before, after)]
    keys = {name: f"heldout/rewards/{name}/mean" for name in names}
    return rows + [(name, means[0].get(key), means[1].get(key)) for name, key in keys.items()]


def heldout_table(before: Sequence[Sample], after: Sequence[Sample], names: Sequence[str] = ()) -> str:
    """The rows of `reward_rows` as text."""
    rows = reward_rows(before, after, names)
    if not rows:
        return "no held-out samples of before training: no reward before and after"
    lines = [f"{'held-out reward':<18}{'before':>8}{'after':>8}"]
    return "\n".join(
        lines
        + [f"{task:<18}" + "".join(f"{'–' if x is None else f'{x:.3f}':>8}" for x in pair) for task, *pair in rows]
    )
