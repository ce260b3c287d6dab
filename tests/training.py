"""Whole runs of the tiny model of the fixture `job`: how they are started, what they leave, and that two are equal."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT
from transformers.utils import logging

from bicot.grpo.cli import parse_config
from bicot.grpo.trainer import train

SMALL = ("--eval_file", "null", "--sample_steps", "0")  # no pictures but those that train
LORA = (*SMALL, "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj,up_proj,down_proj,lm_head")
LORA += ("--lr_scheduler_type", "linear")
ACCUMULATION = "--gradient_accumulation_steps"


def words(job: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    """The command line of a run: `changes` of these settings, then `more`."""
    settings = dict(
        model_name_or_path=job / "model", train_file=job / "train.jsonl", eval_file=job / "train.jsonl",
        reasoning_prompt_path=job / "plan.txt", output_dir=output, num_generations=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_completion_length=12, max_steps=6, save_steps=2, sample_steps=2,
        learning_rate=1e-2, warmup_steps=0, cfg_weight=2.0,
    )  # fmt: skip
    options = [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))]
    return [*options, "--rewards.names", "redness:Redness", "--rewards.monitor", "[]", *more]


def run(job: Path, output: Path, *more: str, **changes: Any) -> dict[str, Any]:
    return train(parse_config(words(job, output, *more, **changes)))


def run_program(script: str, given: Iterable[str]) -> None:
    """Run `python script given` in this process, because a new one would import for 4 seconds."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *given])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)
        logging.enable_progress_bar()  # which the program has switched off


def environment(*folders: Path) -> dict[str, str]:
    """The environment of a process that finds the modules in `folders`."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *map(str, folders)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def on_two_ranks(job: Path, output: Path, *more: str, modules: Path | None = None, **changes: Any) -> str:
    """A run of two ranks, which finds the rewards in `modules` (or `job`) -> what it said."""
    given, log = words(job, output, ACCUMULATION, "1", *more, **changes), output.with_suffix(".log")
    killed.finish(log, *killed.together(killed.run, given, modules or job, output, None))
    return log.read_text()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write `rows` as JSON lines -> the path, as a word of a command line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics(output: Path) -> list[dict[str, float]]:
    """The rows without their times, and without the rank that took the longest."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not re.search("seconds|per_second|slowest_rank", k)} for row in rows]


def steps_of(output: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(output)]


def weights(output: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights, or adapters, of the checkpoint after `step`, or after the last step."""
    folder = output / f"checkpoint-{step or steps_of(output)[-1]:06d}"
    adapters = folder / "adapter_model.safetensors"
    return load_file(adapters if adapters.exists() else folder / "model.safetensors")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def assert_same_run(a: Path, b: Path) -> None:
    """Equal weights at the end and equal metrics of all steps."""
    assert_same_weights(weights(a), weights(b))
    assert metrics(a) == metrics(b)


def assert_resumes(job: Path, folder: Path, *more: str, stop: int = 2) -> Path:
    """A run that stops and is resumed equals one that does not stop -> the output folder of the latter, `whole`."""
    run(job, folder / "whole", *more)
    run(job, folder / "parts", *more, "--stop_after", str(stop))
    run(job, folder / "parts", *more, "--resume", "auto")
    assert_same_run(folder / "whole", folder / "parts")
    return folder / "whole"


def assert_two_ranks_equal_one(job: Path, folder: Path, *more: str, two: Iterable[str] = ()) -> None:
    """One rank with twice the accumulation, and two ranks with the options `two`: `folder`/one and `folder`/two.

    Adam divides by |gradient| + epsilon: at 1e-8 it would blow a gradient that is rounding noise up to a full step (and
    hide a wrong scale of all of them).
    """
    more = (*more, "--adam_epsilon", "1e-3")
    run(job, folder / "one", *more, ACCUMULATION, "2")
    on_two_ranks(job, folder / "two", *more, *two)
    assert_close_weights(weights(folder / "two"), weights(folder / "one"))
    for a, b in zip(metrics(folder / "one"), metrics(folder / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
