"""Processes for tests to kill, and pairs of ranks: forked from one that has imported the trainer, each starts at
once."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bicot.grpo import gradients
from bicot.grpo.checkpoint import STATE, find_checkpoint, save_checkpoint
from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.errors import one_line_errors
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.tracking import Log
from bicot.grpo.trainer import Trainer, train
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


def together(target: Callable[..., None], *arguments: Any) -> list[multiprocessing.process.BaseProcess]:
    """Two ranks, each with an argument more: its environment."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [start(target, *arguments, world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def finish(log: Path, *processes: multiprocessing.process.BaseProcess) -> None:
    """Wait for processes that must end well, and else show what they wrote into `log`."""
    for process in processes:
        process.join(500)
        process.kill()
        assert process.exitcode == 0, log.read_text()


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


def speak_to(log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run(
    words: list[str], job: Path, output: Path, change: int | None = None, rank: dict[str, str] | None = None
) -> None:
    """A training run, which says what it says in `output`.log."""
    speak_to(output.with_suffix(".log"))
    os.environ.update(rank or {})
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


@contextmanager
def joined(output: Path, world: dict[str, str], timeout: float) -> Iterator[Ranks]:
    """This rank, as train.py's: an error is one line in `output`/<rank>.log."""
    os.environ.update(world)
    speak_to(output / f"{world['RANK']}.log")
    with one_line_errors([]):
        ranks = Ranks.start(timeout)
        with ranks.naming_the_lost():
            yield ranks
        ranks.close()


def sum_in_buckets(output: Path, world: dict[str, str]) -> None:
    with joined(output, world, 60) as ranks:
        torch.manual_seed(ranks.rank)
        gradients.BUCKET_BYTES = 4 * 16
        for dtype in (torch.float32, torch.bfloat16):
            sum_two_micro_batches(ranks, dtype)
        print("equal", flush=True)


def sum_two_micro_batches(ranks: Ranks, dtype: torch.dtype) -> None:
    """Buckets are sent during the last backward pass, and their sums are those of one collective for all."""
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (3, 5, 64, 40, 1, 7, 2)]
    optimizer = MasterAdamW(parameters, Config(rewards=RewardConfig("scene"), dtype=str(dtype)[6:]))
    none, *masters = optimizer.masters

    def compute(grads: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        return torch.stack([(p * g).sum() for p, g in zip(parameters[1:], grads, strict=True)]).sum(), None

    for update in range(2):
        expected, sent_early = torch.zeros(119), []
        for last in (False, True):
            grads = [torch.randn(p.shape).to(dtype) for p in parameters[1:]]
            expected += torch.cat(grads)
            time.sleep(0.2 * last * (ranks.rank == update))  # the other rank has to wait
            optimizer.backward(partial(compute, grads), ranks, last)
            sent_early.append(len(optimizer.sums.sent))
        # of [2, 7, 1], [40], [64] and [5, 3], the last one waits for a gradient that does not come
        assert sent_early == [0, 3]
        optimizer.sums.finish(ranks)
        found = torch.cat([m.grad for m in masters])
        torch.distributed.all_reduce(expected)
        assert none.grad is None and torch.equal(found, expected)
        optimizer.sums.clear()
        assert all(p.grad is None for p in (*parameters, *masters))


def write_slowly(words: list[str], output: Path, world: dict[str, str]) -> None:
    """Rank 0 writes the first line and the last checkpoint for longer than a collective may last."""
    sys.path.insert(0, str(output))
    with joined(output, world, 4) as ranks:
        write, replace = Log.write, os.rename

        def late(self: Log, step: int, *row: Any) -> None:
            time.sleep(5 * (step == 1))
            write(self, step, *row)

        def later(*names: Any) -> None:
            time.sleep(5)
            replace(*names)

        Log.write, os.rename = late, later
        Trainer(parse_config(words), ranks).run()
        print("done", flush=True)


def hang(words: list[str], output: Path, world: dict[str, str]) -> None:
    """The reward of rank 1 sleeps, in step 2 forever."""
    os.environ["HANGS"] = "1"
    sys.path.insert(0, str(output))
    with joined(output, world, 4) as ranks:
        Trainer(parse_config(words), ranks).run()


def hang_in_a_collective(output: Path, world: dict[str, str]) -> None:
    with joined(output, world, 2) as ranks:
        ranks.meet(7)
        if ranks.main:
            ranks.sum(torch.zeros(1))
        time.sleep(60)


def fail_alone(output: Path, world: dict[str, str]) -> None:
    with joined(output, world, 60) as ranks:
        assert ranks.on_main(lambda: [ranks.rank]) == [0]

        def refuse() -> None:
            raise ValueError("this is refused")

        ranks.on_main(refuse)
