"""Processes that tests/test_checkpoint.py kills: forked from one that has imported the trainer, so that each starts at
once."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bicot.grpo.checkpoint import STATE, find_checkpoint, save_checkpoint
from bicot.grpo.cli import parse_config
from bicot.grpo.trainer import train
from bicot.model.policy import load_policy
from bicot.model.settings import RolloutSettings

CONTEXT = multiprocessing.get_context("forkserver")
LATE = ["transformers.models.janus.modeling_janus", "matplotlib.figure", "deepspeed.accelerator"]  # imported on demand
CONTEXT.set_forkserver_preload(["bicot.grpo.trainer", *LATE])
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def kill_at(number: int | None, output: Path) -> None:
    """Kill this process before its change number so many of a file or folder in `output`."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if left is None or event not in CHANGES:
            return
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # rmtree's, by a name in the folder
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left -= inside or str(arguments[0]).startswith(str(output))
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def run(words: list[str], job: Path, output: Path, change: int | None = None) -> None:
    """A training run, which says what it says in `output`.log."""
    with open(output.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.path.insert(0, str(job))
    kill_at(change, output)
    train(parse_config(words))


def replace(model: Path, output: Path) -> None:
    """Write checkpoint 2 again and again, killed before its first change, its second, …, until one is not killed; what
    is found each time goes to `output`.json."""
    policy, seen = load_policy(model), []
    for number in itertools.count():
        if (child := os.fork()) == 0:
            kill_at(number or None, output)
            save_checkpoint(output, 2, policy, None, RolloutSettings(), {}, float(number), {}, keep=1)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        checkpoint, said = find_checkpoint("auto", output)
        state = torch.load(checkpoint / STATE, weights_only=True) if checkpoint else {"seconds": None}
        seen.append((killed, state["seconds"], said))
        if number and not killed:
            break
    output.with_suffix(".json").write_text(json.dumps(seen))
