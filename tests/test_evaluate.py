"""Evaluations while a run lasts, and its best checkpoint."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import killed
import pytest
from test_checkpoint import outcome
from training import assert_same_weights, metrics, run, weights, words, write_rows

from bicot.grpo.evaluate import Best
from bicot.grpo.samples import heldout_metrics, load_samples

FEW = ("--sample_steps", "0", "--lr_scheduler_type", "constant", "--max_steps", "4")
BEST = ("--eval_steps", "1", "--load_best_model_at_end", "true", "--save_total_limit", "1", "--save_steps", "2")


def summary_of(output: Path) -> dict[str, object]:
    return json.loads((output / "summary.json").read_text())


def test_an_evaluation_during_a_run_equals_one_at_its_end(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path / "plain", *FEW)
    run(job, tmp_path / "short", *FEW, "--max_steps", "3")
    run(job, tmp_path / "run", *FEW, "--eval_steps", "3")
    rows = metrics(tmp_path / "run")
    evaluated = [{k: v for k, v in row.items() if k.startswith("heldout/")} for row in rows]
    assert [bool(part) for part in evaluated] == [False, False, True, True], "the last step too"
    assert evaluated[2] == heldout_metrics(load_samples(tmp_path / "short" / "samples" / "heldout-after"))
    assert evaluated[3] == heldout_metrics(load_samples(tmp_path / "plain" / "samples" / "heldout-after"))
    assert {"heldout/reward", "heldout/reward_by_task/color", "heldout/rewards/redness/mean"} <= evaluated[3].keys()
    assert evaluated[2]["heldout/reward"] == summary_of(tmp_path / "short")["heldout_reward_after"]
    assert_same_weights(weights(tmp_path / "run", 4), weights(tmp_path / "plain", 4))
    rest = [{k: v for k, v in row.items() if not k.startswith("heldout/")} for row in rows]
    assert rest == metrics(tmp_path / "plain")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out reward</h2>" in page and "Held-out reward</h2>" not in (tmp_path / "plain/report.html").read_text()


def test_the_best_checkpoint_is_kept_and_shown(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = set()
    for more in ((), ("--greater_is_better", "false", "--metric_for_best_model", "heldout/rewards/redness/mean")):
        whole, parts = tmp_path / f"whole{len(more)}", tmp_path / f"parts{len(more)}"
        run(job, whole, *FEW, *BEST, *more)
        said = capsys.readouterr().out
        values = [row["heldout/reward"] for row in metrics(whole)]
        best = values.index(min(values) if more else max(values)) + 1
        chosen.add(best)
        folder = whole / f"checkpoint-{best:06d}"
        assert {path.name for path in whole.glob("checkpoint-*")} == {folder.name, "checkpoint-000004"}
        after = load_samples(folder / "heldout")
        assert heldout_metrics(after)["heldout/reward"] == values[best - 1]
        summary = summary_of(whole)
        assert summary["heldout_reward_after"] == summary["best_metric"] == values[best - 1]
        assert summary["best_model_checkpoint"] == str(folder)
        assert f'"after" is the best checkpoint by {more[-1] if more else "heldout/reward"}: {folder}' in said
        run(job, parts, *FEW, *BEST, *more, "--stop_after", "3")
        there = sorted(parts.rglob("*"))
        run(job, parts, *FEW, *BEST, *more, "--resume", "auto", "--stop_after", "3")  # has nothing to do
        assert sorted(parts.rglob("*")) == there
        run(job, parts, *FEW, *BEST, *more, "--resume", "auto")
        assert outcome(parts)[0] == outcome(whole)[0] and outcome(parts)[2:] == outcome(whole)[2:]
    assert chosen != {4}, "one of them is not the last"


def test_a_run_that_is_killed_keeps_its_best_checkpoint(job: Path, tmp_path: Path) -> None:
    draws, output = random.Random(3), tmp_path / "killed"
    more = (*FEW, *BEST, "--max_steps", "3", "--resume", "auto", "--move_output_dir", "false")
    more += ("--greater_is_better", "false")
    run(job, tmp_path / "whole", *more)
    for _ in range(4):
        process = killed.start(killed.run, words(job, output, *more), job, output, draws.randint(5, 45))
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, output.with_suffix(".log").read_text()
    run(job, output, *more)
    assert outcome(output)[0] == outcome(tmp_path / "whole")[0]
    assert outcome(output)[2:] == outcome(tmp_path / "whole")[2:]
    assert summary_of(output)["best_metric"] == summary_of(tmp_path / "whole")["best_metric"]


def test_the_first_of_equals_is_the_best() -> None:
    best = Best("heldout/reward", greater_is_better=True)
    values = (float("nan"), 0.5, 0.5, 0.4, float("nan"), 0.6)
    found = [best.look(step, {"heldout/reward": value}) for step, value in enumerate(values)]
    assert found == [False, True, False, False, False, True] and (best.step, best.value) == (5, 0.6)


def test_an_unknown_metric_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric_for_best_model='reward' is none of heldout/reward, .*by_task/color, "):
        run(job, tmp_path / "out", *BEST, "--metric_for_best_model", "reward")
    assert not (tmp_path / "out").exists()


LATE = """
import json, time

class Late:
    name = "late"
    def check(self, example):
        if example.prompt == "w20":
            raise ValueError("knows no w20")
    def score(self, images, examples):
        time.sleep(1)
        assert all(example.metadata.get("heldout") for example in examples)
        return images.mean((1, 2, 3))
"""


def test_heldout_rewards_score_only_evaluations(
    job: Path, tmp_path: Path, write_module: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """They do not train, their time does not count, and their `check` sees held-out prompts only."""
    write_module("tardy", LATE)
    rows = [{"prompt": f"a red circle and w{i}", "task_type": "object", "heldout": True} for i in range(2)]
    trained = write_rows(tmp_path / "train.jsonl", [{"prompt": "w20", "task_type": "object"}])
    files = ("--train_file", trained, "--eval_file", write_rows(tmp_path / "eval.jsonl", rows))
    more = (*FEW, *files, "--max_steps", "1", "--rewards.heldout", "tardy:Late")
    run(job, tmp_path / "plain", *more, "--rewards.heldout", "[]")
    capsys.readouterr()
    run(job, tmp_path / "run", *more, "--eval_steps", "1")
    table = capsys.readouterr().out
    assert_same_weights(weights(tmp_path / "run", 1), weights(tmp_path / "plain", 1))
    (row,) = metrics(tmp_path / "run")
    assert [key for key in row if "late" in key] == ["heldout/rewards/late/mean"]
    assert row["heldout/reward"] == pytest.approx(row["heldout/rewards/redness/mean"]), "it has no weight"
    assert f"late {row['heldout/rewards/late/mean']:>20.3f}"[-8:] in next(x for x in table.splitlines() if "late" in x)
    assert "<td>late</td>" in (tmp_path / "run" / "report.html").read_text()
    assert float(str(summary_of(tmp_path / "run")["seconds"])) < 1, "evaluations slept for seconds"
    with pytest.raises(ValueError, match="two rewards have the name 'redness'"):
        run(job, tmp_path / "none", *more, "--rewards.heldout", "redness:Redness")
    with pytest.raises(ValueError, match="train.jsonl:1: reward 'late': knows no w20"):
        run(job, tmp_path / "none", *more, "--eval_file", trained)
    assert not (tmp_path / "none").exists()
