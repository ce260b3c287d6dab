"""Records the metrics during a run: in metrics.jsonl, on a progress bar, and with trackers such as TensorBoard."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from tqdm import tqdm

from .config import Config
from .files import METRICS

BAR_COLUMNS = 100


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, float], grid: Path | None) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """PyTorch's own writer, which needs the package `tensorboard`."""

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
    """wandb, or trackio, which has the same interface."""

    def __init__(self, config: Config, module: str) -> None:
        self.module = _need(module, module)
        self.module.init(project="bicot", name=Path(config.output_dir).name, config=dataclasses.asdict(config))

    def log(self, step: int, metrics: dict[str, float], grid: Path | None) -> None:
        extra = {} if grid is None else {"samples": self.module.Image(str(grid))}
        self.module.log({**metrics, **extra}, step=step)

    def close(self) -> None:
        self.module.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Raises ImportError if a tracker is not installed."""
    for name in names:
        _need("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f"pip install {package}, or remove it from report_to"
        raise ImportError(f"report_to: {package} is not installed; {fix}") from error


class Log:
    """Writes the metrics of a run, on the main rank.

    Args:
        config: every setting.
        first_step: number of steps that a resumed run has done already.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.file = open(Path(config.output_dir) / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self.trackers: list[Tracker] = [
            TensorBoard(config) if name == "tensorboard" else WandbLike(config, name) for name in config.report_to
        ]
        columns = min(BAR_COLUMNS, shutil.get_terminal_size().columns)
        self.bar = tqdm(total=config.max_steps, initial=first_step, unit="step", ncols=columns)
        self.around = ExitStack()
        self.around.enter_context(_above(self.bar))

    def write(self, step: int, metrics: dict[str, float], grid: Path | None = None) -> None:
        """Record one step: as a JSON line {"step": …, metric: value, …}, with the trackers, and on the bar.

        Values that are not finite are left out, since JSON cannot express them. The line is on the disk before the
        step's checkpoint is written. A crash inside this call can leave a part of the line, which a resumed run drops.
        Trackers keep their own files and may lose or repeat steps.
        """
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        for tracker in self.trackers:
            tracker.log(step, metrics, grid)
        self.bar.set_postfix_str(_summary(metrics), refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.around.close()
        self.bar.close()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


class _AboveTheBar:
    """A stream that prints its lines above the progress bar, which may be on another stream."""

    def __init__(self, stream: TextIO, bar: tqdm) -> None:
        self.stream, self.bar, self.begun = stream, bar, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        # of another progress bar show only the last state; the states before it end by moving the cursor up
        shown = [line.rpartition("\r")[2] for line in lines if line and not line.endswith("\x1b[A")]
        if shown:
            with tqdm.external_write_mode(file=self.bar.fp):
                self.stream.write("".join(f"{line}\n" for line in shown))
                self.stream.flush()
        return len(text)

    def end(self) -> None:
        if self.begun:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _above(bar: tqdm) -> Iterator[None]:
    """Inside this context, whatever is printed, logged or warned appears in lines above the progress bar."""
    output, errors = (_AboveTheBar(stream, bar) for stream in (sys.stdout, sys.stderr))
    with ExitStack() as stack:
        stack.callback(output.end)
        stack.callback(errors.end)
        for name in (None, *logging.root.manager.loggerDict):
            for handler in logging.getLogger(name).handlers:  # a handler keeps the stream that it was created with
                for stream, above in ((sys.stdout, output), (sys.stderr, errors)):
                    if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is stream:
                        stack.callback(handler.setStream, stream)
                        handler.setStream(above)
        stack.enter_context(redirect_stdout(cast(TextIO, output)))
        stack.enter_context(redirect_stderr(cast(TextIO, errors)))
        yield


def _summary(metrics: dict[str, float]) -> str:
    """Reward, KL and entropy as text beside the progress bar."""
    reward = f"reward {metrics['reward']:.3f}" if "reward" in metrics else "no reward applies"
    kl = f" kl {metrics['kl']:.4f}" if "kl" in metrics else ""
    entropy = f" entropy {metrics['entropy']:.2f}" if "entropy" in metrics else ""
    return f"{reward}{kl}{entropy}"
