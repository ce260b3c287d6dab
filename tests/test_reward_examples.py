"""The rewards of examples/ in a run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import ROOT, tiny_policy

from bicot.grpo.cli import parse_config
from bicot.grpo.evaluate import load_samples
from bicot.grpo.trainer import train

ROWS = [
    {"prompt": "a red circle", "task_type": "color", "attr_nouns": ["red circle"], "must_mention": ["w1", "w2", "of"]},
    {"prompt": "a blue square", "task_type": "object", "nouns": ["square"], "id": 1},
]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of two steps of a tiny model, with the rewards of the repository's folder at hand."""
    monkeypatch.chdir(ROOT)
    tiny_policy(seed=5).save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "plan.txt").write_text("plan {}")
    values = dict(
        model_name_or_path=tmp_path / "model", train_file=tmp_path / "train.jsonl", eval_file="null",
        reasoning_prompt_path=tmp_path / "plan.txt", output_dir=tmp_path / "out", num_generations=8,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, max_completion_length=12, max_steps=2,
        save_steps=9, sample_steps=1, cfg_weight=2.0,
    )  # fmt: skip
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_a_reward_of_plans_and_metadata(settings: list[str], tmp_path: Path) -> None:
    names = ["--rewards.names", "examples.reward_plan:Mentions", "--rewards.monitor", "plan"]
    train(parse_config([*settings, *names]))
    samples = [sample for step in (1, 2) for sample in load_samples(tmp_path / "out" / "samples" / f"step-00000{step}")]
    assert {sample.prompt for sample in samples} == {row["prompt"] for row in ROWS}
    for sample in samples:
        if sample.prompt == ROWS[0]["prompt"]:
            share = sum(word in sample.plan for word in ("w1", "w2", "of")) / 3
            assert sample.scores["mentions"] == sample.reward == pytest.approx(share)
        else:
            assert sample.scores["mentions"] != sample.scores["mentions"]  # NaN
            assert sample.scores["plan"] == float("square" in sample.plan)
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["rewards/mentions/missing"] == 0.5 and row["rewards/plan/missing"] == 0
        assert 0 < row["rewards/mentions/mean"] < 1
