"""Several machines, tested on one: the scripts in examples, and what rank 0 reports of all ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, wait_until
from training import SMALL, environment, metrics, on_two_ranks, run, steps_of, words

from bicot.grpo.data import step_indices
from bicot.grpo.samples import load_samples

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of torchrun
SCRIPT = ["bash", str(ROOT / "examples" / "torchrun_multinode.sh")]
# In rank 1 alone it takes its time.
REWARD = """
import os, time
class Redness:
    name = "redness"
    def score(self, images, examples):
        time.sleep(0.3 * (os.environ.get("RANK") == "1"))
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""
STEPS = ("--max_steps", "2", "--eval_file", "null", "--sample_steps", "1", "--rewards.names", "slow_on_one:Redness")


def free_port() -> int:
    """One of those that slurm.sbatch takes."""
    for port in range(20000 + os.getpid() % 19000, 40000):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    (folder / "slow_on_one.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def two(job: Path, module: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks of one machine."""
    output = tmp_path_factory.mktemp("two") / "run"
    on_two_ranks(job, output, *STEPS, modules=module)
    return output


def test_two_machines_train_as_two_ranks_of_one(two: Path, job: Path, module: Path, tmp_path: Path) -> None:
    given = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "NPROC_PER_NODE": "1"}
    variables = environment(job, module) | given | {"PATH": PATH, "LOG_DIR": str(tmp_path / "logs")}
    command = [*SCRIPT, *words(job, tmp_path / "run", "--gradient_accumulation_steps", "1", *STEPS)]
    machines = [subprocess.Popen(command, env=variables) for _ in range(2)]
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    assert metrics(tmp_path / "run") == metrics(two)
    logs = [file.read_text() for file in (tmp_path / "logs" / socket.gethostname()).glob("*/attempt_0/0/stdout.log")]
    assert sorted("2 steps in" in log for log in logs) == [False, True], "each rank's own, and rank 0 says the end"


def test_pictures_and_times_come_from_all_ranks(
    two: Path, job: Path, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load_samples(two / "samples" / "step-000001")
    rows = [json.loads(line)["prompt"] for line in (job / "train.jsonl").read_text().splitlines()]
    batch = [rows[i] for i in step_indices(8, 4, 0, seed=0)]  # two of each rank
    assert sorted(sample.prompt for sample in samples) == sorted(batch)
    monkeypatch.syspath_prepend(module)
    run(job, tmp_path / "one", *STEPS, "--stop_after", "1")
    alone = load_samples(tmp_path / "one" / "samples" / "step-000001")
    assert [(s.prompt, s.plan) for s in samples] == [(s.prompt, s.plan) for s in alone], "in the order of one rank"
    for sample, other in zip(samples, alone, strict=True):
        assert sample.reward == pytest.approx(other.reward, abs=1e-5)
        assert abs(sample.image.astype(int) - other.image).max() <= 1

    written = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rewards/redness/milliseconds"] >= 300 for row in written), "of the slowest rank"
    assert all(row["rewards/redness/milliseconds_hidden"] < 100 for row in written)


def test_a_slurm_job_saves_before_its_time_is_up_and_resumes(job: Path, tmp_path: Path) -> None:
    """Slurm's commands are replaced by stand-ins, and the test sends Slurm's signal."""
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{PATH}", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    given |= {"SLURM_JOB_ID": str(free_port() - 20000), "NPROC_PER_NODE": "1", "LOG_DIR": str(tmp_path / "logs")}
    output = tmp_path / "run"

    def start(steps: int) -> subprocess.Popen[Any]:
        options = words(job, output, *SMALL, "--max_steps", str(steps))
        command = ["bash", "examples/slurm.sbatch", *options]
        return subprocess.Popen(command, cwd=ROOT, env=environment(job) | given, start_new_session=True)

    batch = start(100000)
    try:
        wait_until(lambda: (output / "metrics.jsonl").exists() and len(metrics(output)) >= 3, batch)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(timeout=60) == 0
    finally:
        if batch.poll() is None:
            os.killpg(batch.pid, signal.SIGKILL)
    assert (tmp_path / "asked").read_text() == f"requeue {given['SLURM_JOB_ID']}\n"
    last = steps_of(output)[-1]
    assert (output / f"checkpoint-{last:06d}" / "manifest.json").is_file()
    assert start(last + 1).wait(timeout=120) == 0
    assert steps_of(output) == list(range(1, last + 2))
