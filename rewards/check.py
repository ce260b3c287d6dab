"""Loads every reward of a configuration, scores sample pictures, and prints which work, how fast, and what is missing.

    python -m bicot.rewards.check configs/janus-pro-7b.yaml
    python -m bicot.rewards.check my.yaml --device cpu --pictures 8

It downloads nothing. The pictures are noise and the plans are the prompts, so the scores show that a reward runs, not
that it is right. The exit status is 1 if a reward does not work.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from .base import Example, NumeracyInfo, Reward, SpatialInfo
from .config import RewardConfig
from .ensemble import RewardEnsemble
from .worker import Placement, model_of

EXAMPLES = (
    Example("a red apple and a blue bench", "color", ("apple", "bench"), ("red apple", "blue bench")),
    Example("a dog left of a chair", "spatial", ("dog", "chair"), spatial_info=SpatialInfo("dog", "chair", "left of")),
    Example("three bottles", "numeracy", ("bottle",), numeracy_info=(NumeracyInfo(3, "bottle"),)),
    Example("A butterfly is fluttering in the garden.", "non", ("butterfly", "garden")),
)
COLUMNS = ("reward", "weights", "dtype", "device", "load s", "ms/picture", *(e.task_type for e in EXAMPLES))


def read_config(path: str | Path) -> RewardConfig:
    """Read the `rewards` of a run's YAML file. Raises ValueError if there are none, or unknown keys, or no YAML."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    section = settings.get("rewards") if isinstance(settings, dict) else None
    if not isinstance(section, dict) or not any(section.get(key) for key in ("names", "monitor", "heldout")):
        raise ValueError(f"{path} names no rewards, as in rewards: {{names: [hps, git]}}")
    unknown = set(section) - {item.name for item in fields(RewardConfig)}
    if unknown:
        raise ValueError(f"{path}: rewards has no setting {unknown.pop()!r}")
    return RewardConfig(**section)


def pictures(count: int, device: str) -> Tensor:
    """[count, 3, 384, 384] in [0, 1]: smooth noise, the same every time."""
    noise = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(device)
    return F.interpolate(noise, (384, 384), mode="bilinear")


def try_reward(reward: Reward, place: Placement, count: int, device: str) -> list[str]:
    """Score `count` pictures twice, and time the second time -> the reward's row, without its name and load time."""
    ensemble = RewardEnsemble([reward], placements={reward.name: place}, device=device)
    images, planned = pictures(count, device), [replace(example, plan=example.prompt) for example in EXAMPLES]
    examples = [planned[i % len(EXAMPLES)] for i in range(count)]
    ensemble.submit(images, examples).result()
    handle = ensemble.submit(images, examples)
    scores = handle.result()[:, 0].tolist()
    milliseconds = handle.metrics[f"rewards/{reward.name}/milliseconds"] / count
    model = model_of(reward)
    weights = list(model.parameters()) if model else []
    return [
        f"{sum(w.numel() for w in weights) / 1e6:.0f} M" if weights else "–",
        str(weights[0].dtype).removeprefix("torch.") if weights else "–",
        str(ensemble.workers[0].device) + (" (offloaded)" if place.offload else ""),
        f"{milliseconds:.2f}",
        *("–" if score != score else f"{score:.4f}" for score in scores[: len(EXAMPLES)]),
    ]


def check(config: RewardConfig, count: int, device: str) -> tuple[list[list[str]], dict[str, Exception]]:
    """Try every reward -> a row of the table for each that works, and the error of each that does not."""
    rows, failed = [], {}
    for name in config.all:
        start = time.perf_counter()
        try:
            reward, place = config.load(name)
            loaded = time.perf_counter() - start
            weights, dtype, where, *rest = try_reward(reward, place, count, device)
            rows.append([name, weights, dtype, where, f"{loaded:.3f}", *rest])
        except Exception as error:  # report any error, and go on with the next reward
            failed[name] = error
    return rows, failed


def table(rows: Sequence[Sequence[Any]]) -> str:
    """The rows under a header, in aligned columns."""
    every = [COLUMNS, *rows]
    widths = [max(len(row[c]) for row in every) for c in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in every)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Check the rewards of a configuration.")
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=len(EXAMPLES), help="number of pictures to score")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which a reward does
    try:
        config = read_config(args.config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows, failed = check(config, max(args.pictures, len(EXAMPLES)), args.device)
    print(table(rows))
    if any("–" in row[len(COLUMNS) - len(EXAMPLES) :] for row in rows):
        print("–: the reward does not apply to this sample prompt", file=sys.stderr)
    for name, problem in failed.items():
        print(f"\n{name} does not work: {type(problem).__name__}: {problem}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
