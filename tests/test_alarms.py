"""Each alarm is raised by metrics that show its fault, and by no others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from training import SMALL, run

from bicot.grpo.alarms import WINDOW, Alarms
from bicot.grpo.view import Run


def healthy(step: int, draw: random.Random) -> dict[str, float]:
    noise = draw.gauss(0, 0.02)
    return {
        "step": step, "reward": 0.5 + 0.002 * step + noise, "reward_std": 0.1, "grad_norm": 0.3,
        "rewards/scene/mean": 0.5 + 0.002 * step + noise, "rewards/scene/std": 0.1,
        "rewards/other/mean": 0.4 + 0.001 * step + draw.gauss(0, 0.02), "rewards/other/std": 0.1,
        "text/entropy": 2.0 - 0.005 * step, "image/entropy": 3.0, "text/ratio_max": 1.0, "plan_truncated": 0.1,
        "image_diversity": 0.2, "plan_diversity": 0.5,
    }  # fmt: skip


def raised(steps: int = 80, begin: int = 40, num_iterations: int = 1, **changed: Any) -> list[str]:
    """Alarms of a run that is healthy until `begin`, and has the changed metrics from then on: numbers, or functions of
    the steps since."""
    draw, alarms, found = random.Random(0), Alarms(["scene"], ["other"], num_iterations), []
    for step in range(1, steps + 1):
        row = healthy(step, draw)
        if step > begin:
            row |= {key.replace("__", "/"): v(step - begin) if callable(v) else v for key, v in changed.items()}
        found += alarms.look(row)
    return found


def test_a_healthy_run_raises_none() -> None:
    assert raised(steps=300) == []


@pytest.mark.parametrize(
    ("changed", "after", "words"),
    [
        ({"grad_norm": 0.0}, 41, "the gradient is 0"),
        ({"text__ratio_max": 1.2}, 41, "text/ratio_max is 1.2"),
        ({"image__sampling_ratio": 0.8}, 41, "image/sampling_ratio is 0.8: sampling and training have"),
        ({"rewards__scene__mean": 0.7, "rewards__scene__std": 0.0}, 40 + WINDOW, "reward scene has been 0.7"),
        ({"plan_truncated": 0.9}, 52, "cut off"),
        ({"text__entropy": 0.01}, 58, "entropy of text tokens fell from 1.95 to"),
        ({"image_diversity": 0.001}, 58, "the difference of images in a group fell from 0.2 to"),
        ({"plan_diversity": 0.0}, 58, "the difference of plans in a group fell from 0.5 to"),
        ({"rewards__other__mean": lambda n: 0.44 - 0.02 * n}, 50, "while other, which is not trained on, falls"),
    ],
)
def test_each_alarm_is_raised_once(changed: dict[str, Any], after: int, words: str) -> None:
    (alarm,) = raised(**changed)
    assert words in alarm and "alarm after step" in alarm
    assert abs(int(alarm.split()[3].rstrip(":")) - after) <= 6


def test_healthy_changes_raise_none() -> None:
    assert raised(grad_norm=0.0, reward_std=0.0) == [], "groups without spread have no gradient"
    assert raised(text__ratio_max=1.2, num_iterations=2) == []
    assert raised(image__sampling_ratio=0.8, num_iterations=2) == [] == raised(image__sampling_ratio=1.05)
    assert raised(rewards__other__mean=0.7, rewards__other__std=0.0) == [], "a monitor may be constant"
    assert raised(reward=0.1, rewards__other__mean=0.1) == [], "both fall"


def test_a_reward_that_applies_to_no_sample() -> None:
    alarms = Alarms(["scene"], [], 1)
    said = [alarms.look({"step": step, "update_skipped": 1.0}) for step in range(1, 2 * WINDOW)]
    (text,) = said[WINDOW - 1]
    assert "no reward has applied to any sample of 20" in text and alarms.said == [text]


def test_a_resumed_run_repeats_no_alarm() -> None:
    draw = random.Random(0)
    rows = [healthy(step, draw) | {"grad_norm": 0.0} for step in range(1, 10)]
    alarms = Alarms(["scene"], ["other"], 1, rows[:5])
    assert [alarms.look(row) for row in rows[5:]] == [[]] * 4


def test_a_run_prints_alarms_and_may_stop(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over half of the plans of a random model are cut off: an alarm after WINDOW steps."""
    changes = dict(
        train_file=job / "heldout.jsonl", num_generations=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=1, max_completion_length=1, max_steps=WINDOW + 5, cfg_weight=1.0,
    )  # fmt: skip
    run(job, tmp_path / "run", *SMALL, "--stop_on_alarm", "true", **changes)
    said = capsys.readouterr().out
    alarm = f"alarm after step {WINDOW}: over half of the plans are cut off"
    assert said.count(alarm) == 1 and f"stopped by an alarm after step {WINDOW} of {WINDOW + 5}; continue with" in said
    assert alarm in (tmp_path / "run" / "report.html").read_text() and alarm in Run(tmp_path / "run").page("")
    assert (tmp_path / "run" / f"checkpoint-{WINDOW:06d}").is_dir()
