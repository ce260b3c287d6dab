"""A run that is killed anywhere, a checkpoint that is replaced, a state that changes after it was read."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import killed
from test_trainer import assert_same_weights, job, metrics, weights, words  # noqa: F401

from bicot.grpo.checkpoint import list_checkpoints
from bicot.grpo.evaluate import load_samples

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


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(job: Path, tmp_path: Path) -> None:  # noqa: F811
    """At ten random moments, in between before four of the changes of its files."""
    draws = random.Random(0)
    more = ("--max_steps", str(STEPS), "--save_steps", "1", "--resume", "auto", "--move_output_dir", "false")
    killed.start(print).join()  # from now on, starting one takes no time
    start = time.monotonic()
    whole = killed.start(killed.run, words(job, tmp_path / "whole", *more), job, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
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
    last = killed.start(killed.run, *arguments)
    last.join()
    assert last.exitcode == 0, (tmp_path / "killed.log").read_text()
    assert_same_weights(weights(tmp_path / "whole", STEPS), weights(output, STEPS))
    assert outcome(output) == outcome(tmp_path / "whole"), seen


def test_a_checkpoint_that_is_replaced_is_never_missing(job: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out"
    process = killed.start(killed.replace, job / "model", output)
    process.join()
    assert process.exitcode == 0
    (first, *seen, last) = json.loads(output.with_suffix(".json").read_text())
    assert first == [False, 0, []] and last == [False, len(seen) + 1, []] and len(seen) > 15
    for number, (was_killed, found, damaged) in enumerate(seen, 1):
        assert was_killed and found in (seen[number - 2][1] if number > 1 else 0, number) and not damaged
    assert seen[-1][1] == len(seen), "before the last change, the new one has the name already"
    assert [path.name for path in output.iterdir()] == ["checkpoint-000002"]
