"""Ranks under a real torchrun: what each does when torchrun, another rank, or a person ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import killed
import pytest
from tiny import ROOT, TORCHRUN, wait_until
from training import SMALL as NO_PICTURES

from bicot.grpo.distributed import Ranks

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's ranks in /proc")
SMALL = (*NO_PICTURES, "--num_generations", "2", "--max_completion_length", "8")


def alive(pid: int) -> bool:
    """Neither gone nor a zombie: an orphan's new parent may leave it unread."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def training(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """Two ranks that train, in step 3 or later -> torchrun and the pids of rank 0 and 1."""
    command = [*TORCHRUN, *options, str(ROOT / "train.py"), *SMALL, "--max_steps", "100000", "--output_dir"]
    command += [str(folder / "out")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    metrics, ranks = folder / "out" / "metrics.jsonl", []
    try:
        wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2))
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(ranks) == 2
        yield process, ranks
    finally:
        for pid in (process.pid, *ranks):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def two_ranks(target: Callable[..., None], folder: Path, *words: list[str]) -> tuple[list[int | None], list[str]]:
    """Exit statuses, and what each rank said. A rank that is left is killed after the other."""
    ranks = killed.together(target, *words, folder)
    while all(process.is_alive() for process in ranks):
        time.sleep(0.1)
    for process in ranks:
        process.join(5)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks], [(folder / f"{rank}.log").read_text() for rank in range(2)]


def test_gradients_summed_in_buckets_equal_one_sum(tmp_path: Path) -> None:
    codes, said = two_ranks(killed.sum_in_buckets, tmp_path)
    assert codes == [0, 0] and said == ["equal\n"] * 2, said


def test_an_error_of_rank_0_ends_all_ranks(tmp_path: Path) -> None:
    codes, said = two_ranks(killed.fail_alone, tmp_path)
    assert codes == [1, 1] and said[0] == "error: this is refused (--debug shows where)\n"
    assert re.match(
        r"error: rank 0 \(process \d+\) (failed|ended), so this rank ends too; its log ", said[1].splitlines()[-1]
    )


def test_a_collective_that_takes_too_long_is_one_line(tmp_path: Path) -> None:
    codes, said = two_ranks(killed.hang_in_a_collective, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert said[0].startswith(
        "error: another rank did not come to a collective within 2 s (ddp_timeout); all were last"
    )
    assert "step 7" in said[0] and said[0].count("\n") == 1


REWARD = """
import os, time
asked = []
def lagging(images, examples):
    if os.environ["RANK"] == "1":
        asked.append(len(images))
        time.sleep(1e6 if "HANGS" in os.environ and sum(asked) > 2 else 1)
    return images.mean((1, 2, 3))
"""


def lagging(folder: Path) -> list[str]:
    """Settings of a run of two steps whose reward lags on rank 1."""
    (folder / "lag.py").write_text(REWARD)
    words = [*SMALL, "--max_steps", "2", "--rewards.names", "lag:lagging", "--rewards.monitor", "[]"]
    words += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    return [*words, "--output_dir", str(folder / "out")]


def test_ranks_wait_for_rank_0_while_it_writes_and_say_who_was_slow(tmp_path: Path) -> None:
    codes, said = two_ranks(killed.write_slowly, tmp_path, lagging(tmp_path))
    assert codes == [0, 0] and all("done" in text for text in said), said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0.5 <= row["seconds/wait"] <= row["seconds/step"] and row["slowest_rank"] == 1


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    codes, said = two_ranks(killed.hang, tmp_path, lagging(tmp_path))
    assert codes == [1, -signal.SIGKILL] and "Traceback" not in said[0]
    last = said[0].splitlines()[-1]
    late = r"error: step 2: rank 1 \(process \d+\) still has no scores, 4 s \(ddp_timeout\) after rank 0 \(process"
    assert re.match(late, last), last


def test_ranks_end_with_torchrun(tmp_path: Path) -> None:
    with training(tmp_path) as (process, ranks):
        process.kill()
        wait_until(lambda: not any(map(alive, ranks)), seconds=20)
    assert f"torchrun (process {process.pid}) ended" in (tmp_path / "log").read_text().splitlines()[-1]


def test_no_thread_is_left_when_the_ranks_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it still ran when Python ends, Python would break it off, and the process may abort."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    before = threading.active_count()
    ranks = Ranks.start()
    assert threading.active_count() == before + 1
    ranks.close()
    assert threading.active_count() == before


def test_the_last_line_names_the_rank_that_ended(tmp_path: Path) -> None:
    with training(tmp_path, "--log-dir", str(tmp_path / "logs"), "--redirects", "3") as (process, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 1
    said, other = (next((tmp_path / "logs").glob(f"*/attempt_0/{rank}/stderr.log")) for rank in (0, 1))
    last = said.read_text().splitlines()[-1]
    assert last == (
        f"error: rank 1 (process {ranks[1]}) ended, so this rank ends too; log of rank 1: {other} (--debug shows where)"
    )
    assert "Traceback" not in said.read_text()


def test_one_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    """A terminal sends it to torchrun and to the ranks, and torchrun sends it to them again."""
    with training(tmp_path) as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    log = (tmp_path / "log").read_text()
    done = (tmp_path / "out" / "metrics.jsonl").read_text().count("\n")
    assert (tmp_path / "out" / f"checkpoint-{done:06d}" / "manifest.json").is_file()
    advice = f"torchrun --nproc-per-node 2 {ROOT / 'train.py'} {' '.join(SMALL)}"
    assert f"stopped by SIGINT after step {done} of 100000; continue with: {advice}" in log
