"""Where numbers go while a run lasts: metrics.jsonl always, a progress bar, and the trackers that are asked for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .config import Config


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, float], grid: Path | None) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """torch's own writer; needs the package `tensorboard`."""

    def __init__(self, config: Config) -> None:
        self.writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(config.output_dir)

    def log(self, step: int, metrics: dict[str, float], grid: Path | None) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        if grid is not None:
            pixels = _need("matplotlib.image", "matplotlib").imread(grid)
            self.writer.add_image("samples", pixels[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandbLike:
    """wandb, or trackio, which has its interface."""

    def __init__(self, config: Config, module: str) -> None:
        self.module = _need(module, module)
        self.module.init(project="bicot", name=Path(config.output_dir).name, config=dataclasses.asdict(config))

    def log(self, step: int, metrics: dict[str, float], grid: Path | None) -> None:
        extra = {} if grid is None else {"samples": self.module.Image(str(grid))}
        self.module.log({**metrics, **extra}, step=step)

    def close(self) -> None:
        self.module.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Raise ImportError for a tracker that is not installed."""
    for name in names:
        _need("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"report_to: {package} is not installed; pip install {package}, or drop it there") from error


class Log:
    """The main rank's record of a run.

    Args:
        config: of the run.
        first_step: steps done already (a resumed run).
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.file = open(Path(config.output_dir) / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.trackers: list[Tracker] = [
            TensorBoard(config) if name == "tensorboard" else WandbLike(config, name) for name in config.report_to
        ]
        self.bar = tqdm(total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def write(self, step: int, metrics: dict[str, float], grid: Path | None = None) -> None:
        """Record one step: a JSON line {"step": …, metric: value, …}, trackers, and the bar. What is not finite is left
        out: JSON has no word for it."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, metrics, grid)
        self.bar.set_postfix_str(_summary(metrics), refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def _summary(metrics: dict[str, float]) -> str:
    """reward, reward per task type, KL, entropy and seconds per phase, in one line."""
    tasks = [f"{k.split('/')[1]} {v:.2f}" for k, v in metrics.items() if k.startswith("reward_by_task/")]
    seconds = [f"{k.split('/')[1]} {v:.2f}" for k, v in metrics.items() if k.startswith("seconds/")]
    kl = f" kl {metrics['kl']:.4f}" if "kl" in metrics else ""
    reward = f"reward {metrics['reward']:.3f} ({', '.join(tasks)})" if "reward" in metrics else "no reward applies"
    entropy = f" entropy {metrics['entropy']:.2f}" if "entropy" in metrics else ""
    return f"{reward}{kl}{entropy} | s: {' '.join(seconds)}"
