"""Runs that are killed resume; a checkpoint is whole at any moment; its state is read without a copy."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from stepping import apply_gradient
from training import ACCUMULATION, SMALL, assert_same_weights, metrics, on_two_ranks, weights, words

from bicot.grpo.checkpoint import STATE, find_checkpoint, list_checkpoints, load_state
from bicot.grpo.config import Config
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.samples import load_samples
from bicot.rewards.config import RewardConfig

STEPS = 6


def outcome(output: Path) -> tuple[object, ...]:
    """What a run leaves, times aside."""
    summary = json.loads((output / "summary.json").read_text())
    heldout = [
        [(sample.prompt, sample.plan, sample.reward, sample.image.tobytes()) for sample in load_samples(path)]
        for path in (output / "samples" / f"heldout-{tag}" for tag in ("before", "after"))
    ]
    names = sorted(path.name for path in output.rglob("*"))
    return metrics(output), [summary[key] for key in summary if "second" not in key], heldout, names


def test_a_killed_run_resumes_bit_for_bit(job: Path, tmp_path: Path) -> None:
    """Killed at ten random moments, and before four of the changes that it makes to its files."""
    draws = random.Random(0)
    more = ("--max_steps", str(STEPS), "--save_steps", "1", "--resume", "auto", "--move_output_dir", "false")
    killed.start(print).join()  # from now on, starting one takes no time
    start = time.monotonic()
    whole = killed.start(killed.run, words(job, tmp_path / "whole", *more), job, tmp_path / "whole")
    killed.finish(tmp_path / "whole.log", whole)
    lasted = time.monotonic() - start
    output = tmp_path / "killed"
    arguments = (words(job, output, *more), job, output)
    seen: list[object] = []
    while len(seen) < 14:
        change = draws.randint(1, 40) if len(seen) % 3 == 2 else None
        process = killed.start(killed.run, *arguments, change)
        process.join(draws.uniform(0, lasted / 3) if change is None else 60)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:  # it had not ended before
            seen.append((change, [path.name for path in list_checkpoints(output)]))
    killed.finish(tmp_path / "killed.log", killed.start(killed.run, *arguments))
    assert_same_weights(weights(tmp_path / "whole"), weights(output))
    assert outcome(output) == outcome(tmp_path / "whole"), seen


def test_two_ranks_resume_after_one_is_killed(job: Path, tmp_path: Path) -> None:
    draws = random.Random(1)
    more = (*SMALL, "--max_steps", "3", "--save_steps", "1", "--resume", "auto", "--move_output_dir", "false")
    more += ("--ddp_timeout", "10")  # a rank that is killed before the other one meets it is waited for as long
    killed.start(print).join()
    start = time.monotonic()
    on_two_ranks(job, tmp_path / "whole", *more)
    lasted = time.monotonic() - start
    output = tmp_path / "killed"
    arguments = (words(job, output, *more, ACCUMULATION, "1"), job, output, None)
    for number in range(3):
        ranks = killed.together(killed.run, *arguments)
        ranks[number % 2].join(draws.uniform(0.2, 0.8) * lasted)
        ranks[number % 2].kill()
        for process in ranks:
            process.join()
    on_two_ranks(job, output, *more)
    assert_same_weights(weights(tmp_path / "whole"), weights(output))
    assert outcome(output) == outcome(tmp_path / "whole")


def test_a_checkpoint_that_is_replaced_is_never_missing(job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed.finish(output, killed.start(killed.replace, job / "model", output))
    (first, *seen, last) = json.loads(output.with_suffix(".json").read_text())
    assert first == [False, 0, []] and last == [False, len(seen) + 1, []] and len(seen) > 15
    for number, (was_killed, found, damaged) in enumerate(seen, 1):
        assert was_killed and found in (seen[number - 2][1] if number > 1 else 0, number) and not damaged
    assert seen[-1][1] == len(seen), "before the last change, the new one has the name already"
    assert [path.name for path in output.iterdir()] == ["checkpoint-000002"]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


class Watched(MasterAdamW):
    """Notes how much memory is taken when the state comes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = anonymous_bytes()
        super().load_state_dict(state)


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [
        ("adamw_torch_fused", torch.float32),
        ("adamw_torch_fused", torch.bfloat16),
        *[("adamw_8bit", torch.bfloat16)] * (find_spec("torchao") is not None),
    ],
)
def test_a_state_is_read_from_the_file_and_kept_in_memory(optim: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = Config(rewards=RewardConfig("scene"), learning_rate=0.1, optim=optim)
    optimizers = []
    for kind in (MasterAdamW, Watched):
        torch.manual_seed(0)
        optimizers.append(kind([torch.nn.Parameter(torch.randn(4096, 1024, dtype=dtype))], settings))
    saved, loaded = optimizers
    weight = saved.parameters[0]
    apply_gradient(saved, torch.randn_like(weight))
    path = tmp_path / STATE
    torch.save({"step": 1, "seconds": 1.0, "run": {}, "optimizer": saved.state_dict()}, path)
    with torch.no_grad():
        loaded.parameters[0].copy_(weight)  # as load_policy does
    before = anonymous_bytes()
    assert load_state(tmp_path, loaded, {}, {})[:2] == (1, 1.0)
    assert loaded.before - before < path.stat().st_size / 4
    with open(path, "r+b") as file:  # what the state was mapped from
        file.write(os.urandom(path.stat().st_size))
    path.unlink()
    for _ in range(2):
        for optimizer in optimizers:
            apply_gradient(optimizer, torch.ones_like(weight))
        for one, other in ((loaded.masters[0], saved.masters[0]), (loaded.parameters[0], weight)):
            assert torch.equal(one, other), "the moments too are those that were saved"


def test_a_half_deleted_checkpoint_is_removed(tmp_path: Path) -> None:
    """Also where no checkpoint is written any more."""
    (tmp_path / ".checkpoint-000004.partial" / "ema").mkdir(parents=True)
    assert find_checkpoint("auto", tmp_path) == (None, []) and not list(tmp_path.iterdir())
