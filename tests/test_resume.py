"""Runs that stop and go on, and what an output folder already holds."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from training import SMALL, assert_resumes, assert_same_weights, metrics, run, steps_of, weights

from bicot.grpo.output import locked

HAS_PEFT, HAS_TORCHAO = (find_spec(name) is not None for name in ("peft", "torchao"))


def test_resumed_equals_uninterrupted_bit_for_bit(job: Path, tmp_path: Path) -> None:
    whole = assert_resumes(job, tmp_path, "--lr_scheduler_type", "linear", stop=3)
    rates = [row["learning_rate"] for row in metrics(whole)]
    assert rates == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)]), "ends at max_steps, not at stop_after"
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    for key in ("heldout_reward_before", "heldout_reward_after", "steps"):
        assert summaries[0][key] == summaries[1][key]


def test_settings_that_change_on_resume(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They take effect and are printed, or are refused by name with both values."""
    small = (*SMALL, "--lr_scheduler_type", "linear")
    run(job, tmp_path, *small, "--stop_after", "2")
    for setting, value, words in (
        ("seed", "1", "seed 0, which cannot become 1"),
        ("num_generations", "2", "num_generations 4, which cannot become 2"),
        ("dtype", "bfloat16", "dtype 'float32', which cannot become 'bfloat16'"),
        *[("lora_r", "4", "lora_r 0, which cannot become 4")] * HAS_PEFT,
        *[("optim", "adamw_8bit", "optim 'adamw_torch_fused', which cannot become 'adamw_8bit'")] * HAS_TORCHAO,
        ("gradient_accumulation_steps", "1", "prompts_per_step 4, which cannot become 2"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-000002 was trained with {words} within a run"):
            run(job, tmp_path, *small, "--resume", "auto", f"--{setting}", value)
    capsys.readouterr()
    halves = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")  # the same four prompts
    changes = ("--learning_rate", "1e-4", "--adam_beta1", "0.5", "--beta", "0.5")
    run(job, tmp_path, *small, *halves, *changes, "--resume", "auto")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("continuing with"))
    assert "learning_rate 0.0001 instead of 0.01" in said and "beta 0.5 instead of 0.03" in said
    assert "batch" not in said and "adam_beta1 0.5 instead of 0.9" in said
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 1e-2 * 5 / 6, *(1e-4 * (6 - i) / 6 for i in range(2, 6))])
    state = torch.load(tmp_path / "checkpoint-000006" / "trainer_state.pt", weights_only=True)
    assert state["optimizer"]["adamw"]["param_groups"][0]["betas"] == (0.5, 0.999)

    before = (tmp_path / "run.json").read_text()
    run(job, tmp_path, *small, *halves, "--beta", "0.1", "--resume", "auto")
    assert "no step is left: the checkpoint has 6, and this run ends after 6" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_text() == before, "it tells of the settings that trained"


def test_a_run_that_is_extended(job: Path, tmp_path: Path) -> None:
    """It follows the schedule of its new length, and has no rewards "after" before it has come to its end."""
    more = ("--sample_steps", "0", "--lr_scheduler_type", "linear")
    assert run(job, tmp_path, *more, "--max_steps", "2")["heldout_reward_after"] is not None
    longer = (*more, "--max_steps", "4", "--resume", "auto")
    assert run(job, tmp_path, *longer, "--stop_after", "3")["heldout_reward_after"] is None
    assert run(job, tmp_path, *longer)["heldout_reward_after"] is not None
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 0.5e-2, 0.5e-2, 0.25e-2])


def test_a_checkpoint_of_another_run_does_not_touch_the_run_in_the_folder(job: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        run(job, folder, *SMALL, "--max_steps", "3")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*") if path.is_file() and path.name != ".lock"}
    more = (*SMALL, "--resume", str(one / "checkpoint-000002"), "--max_steps", "3", "--move_output_dir", "false")
    with pytest.raises(FileExistsError, match="other holds an earlier run"):
        run(job, other, *more)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    run(job, tmp_path / "new", *more)
    assert steps_of(tmp_path / "new") == [3] and metrics(tmp_path / "new") == metrics(one)[2:]


def test_resume_in_bfloat16_keeps_the_masters(job: Path, tmp_path: Path) -> None:
    more = (*SMALL, "--dtype", "bfloat16", "--learning_rate", "1e-4", "--max_steps", "4")
    run(job, tmp_path / "whole", *more)
    run(job, tmp_path / "parts", *more, "--stop_after", "2")
    run(job, tmp_path / "parts", *more, "--resume", str(tmp_path / "parts" / "checkpoint-000002"))
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_what_a_kill_leaves_behind_the_last_checkpoint_is_ignored(job: Path, tmp_path: Path) -> None:
    """Its rows are written again, and checkpoints that are not whole are not resumed."""
    run(job, tmp_path, *SMALL, "--stop_after", "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "reward": 9.0}) + "\n")
    (tmp_path / ".checkpoint-000004.partial").mkdir()
    (tmp_path / "checkpoint-000005").mkdir()
    run(job, tmp_path, *SMALL, "--resume", "auto", "--stop_after", "4")
    assert steps_of(tmp_path) == [1, 2, 3, 4] and metrics(tmp_path)[2]["reward"] < 1


def test_a_run_is_replaced_only_when_nothing_is_refused(job: Path, tmp_path: Path) -> None:
    small = ("--max_steps", "2", "--sample_steps", "0")
    run(job, tmp_path, *small)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FileExistsError, match=r"--resume auto.*--overwrite_output_dir"):
        run(job, tmp_path, *small, "--move_output_dir", "false")
    more = (*small, "--overwrite_output_dir", "true")
    with pytest.raises(ImportError, match="trackio is not installed"):
        run(job, tmp_path, *more, "--report_to", "[trackio]")
    with pytest.raises(ValueError, match="Greenness"):
        run(job, tmp_path, *more, "--rewards.names", "redness:Greenness")
    with locked(tmp_path), pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"):
        run(job, tmp_path, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_going_back_to_an_earlier_checkpoint(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The later checkpoints are not resumed, and do not count in save_total_limit."""
    small = (*SMALL, "--save_total_limit", "3")
    run(job, tmp_path, *small)
    second = str(tmp_path / "checkpoint-000002")
    run(job, tmp_path, *small, "--resume", second, "--stop_after", "3", "--save_total_limit", "1")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    aside = tmp_path / "after-000002-1"
    assert f"going back to step 2: checkpoint-000004, checkpoint-000006 moved to {aside}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "checkpoint-000003", tmp_path / "checkpoint-best")
    run(job, tmp_path, *small, "--resume", "auto", "--stop_after", "5", "--save_total_limit", "1")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-000005", "checkpoint-best"}
    (tmp_path / "checkpoint-000005" / "trainer_state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-000005 is damaged: trainer_state.pt has 0 bytes"):
        run(job, tmp_path, *small, "--resume", "auto")
