"""The rewards of examples/ in a run of a tiny model, and its loop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving import SERVED, example_server
from tiny import ROOT, TOY
from training import metrics, words, write_rows

from bicot.examples import custom_loop
from bicot.grpo.cli import parse_config
from bicot.grpo.data import PromptFile
from bicot.grpo.samples import load_samples
from bicot.grpo.trainer import train
from bicot.model.policy import load_policy
from bicot.rewards.base import Unavailable
from bicot.rewards.config import load_reward

ROWS = [
    {"prompt": "a red circle", "task_type": "color", "attr_nouns": ["red circle"], "must_mention": ["w1", "w2", "of"]},
    {"prompt": "a blue square", "task_type": "object", "nouns": ["square"], "id": 1},
]


@pytest.fixture
def settings(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of two steps of a tiny model, with the rewards of the repository's folder at hand."""
    monkeypatch.chdir(ROOT)
    rows = write_rows(tmp_path / "train.jsonl", ROWS)
    changes = dict(num_generations=8, per_device_train_batch_size=1, max_steps=2, save_steps=9, sample_steps=1)
    return words(job, tmp_path / "out", "--eval_file", "null", "--train_file", rows, **changes)


def test_a_reward_of_plans_and_metadata(settings: list[str], tmp_path: Path) -> None:
    names = ["--rewards.names", "examples.reward_plan:Mentions", "--rewards.monitor", "plan"]
    train(parse_config([*settings, *names]))
    samples = [sample for step in (1, 2) for sample in load_samples(tmp_path / "out" / "samples" / f"step-00000{step}")]
    assert {sample.prompt for sample in samples} == {row["prompt"] for row in ROWS}
    for sample in samples:
        if sample.prompt == ROWS[0]["prompt"]:
            share = sum(word in sample.plan.split() for word in ("w1", "w2", "of")) / 3
            assert sample.scores["mentions"] == sample.reward == pytest.approx(share)
        else:
            assert sample.scores["mentions"] != sample.scores["mentions"]  # NaN
            assert sample.scores["plan"] == float("square" in sample.plan)
    for row in metrics(tmp_path / "out"):
        assert row["rewards/mentions/missing"] == 0.5 and row["rewards/plan/missing"] == 0
        assert 0 < row["rewards/mentions/mean"] < 1


def test_a_reward_of_the_example_server(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with example_server(tmp_path) as (url, process):
        names = ["--rewards.names", "judge", "--rewards.options.judge", f"{{url: {url}, retries: 0}}"]
        config = parse_config([*settings, *names])
        train(config)
        process.kill()
        process.wait()
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.syspath_prepend(tmp_path)
    examples = PromptFile(tmp_path / "train.jsonl").examples
    local, by_prompt = load_reward("served:Everything"), {e.prompt: e for e in examples}
    samples = load_samples(tmp_path / "out" / "samples" / "step-000001")
    for sample in samples:
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None] / 255
        expected = local.score(image, [replace(by_prompt[sample.prompt], plan=sample.plan)])
        assert sample.scores["judge"] == pytest.approx(expected.item(), rel=1e-6)
    assert len({sample.reward for sample in samples}) > 1

    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(Unavailable, match=f"^reward 'judge': {url} cannot be reached: .*refused"):
        train(parse_config([*settings, *names, "--overwrite_output_dir", "true"]))
    assert before == sorted(path.name for path in (tmp_path / "out").rglob("*"))


def test_the_loop_of_ones_own_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_loop, "GROUP", 4)
    policy = load_policy(TOY, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    steps = list(custom_loop.train(policy, 2))
    assert len(steps) == 2 and all(math.isfinite(loss) and 0 < abs(reward) < 1 for reward, loss in steps)
    moved = {name for name, parameter in policy.model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
