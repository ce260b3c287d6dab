"""What the documents say can be typed in: their Python blocks run, their files exist, their settings are real."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import ROOT, TOY

from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config
from bicot.grpo.trainer import train
from bicot.rewards.base import Example
from bicot.rewards.config import RewardConfig

README, CONTRIBUTING, CURVES, RESEARCH = (
    (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/curves.md", "docs/research.md")
)


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_kernel_example_runs() -> None:
    scope: dict[str, object] = {}
    block, _ = blocks(README)  # the other is run by test_trl.py
    exec(block, scope)
    hidden, loss = scope["hidden"], scope["loss"]
    assert isinstance(hidden, torch.Tensor) and hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert isinstance(loss, torch.Tensor) and loss.isfinite()


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_reward_example_is_a_reward(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(CONTRIBUTING)
    assert len(block.splitlines()) <= 20
    (tmp_path / "my_rewards.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    (settings,) = re.findall(r"```yaml\n(.*?)```", CONTRIBUTING, re.DOTALL)
    name = "my_rewards:Brightness"
    rewards = yaml.safe_load(settings)["rewards"]
    assert name in rewards["names"] and rewards["options"][name] == {"target": 0.5}
    config = RewardConfig([name], options={name: rewards["options"][name]}, schedule=schedule)
    images = torch.full((2, 3, 4, 4), 0.25)
    scores = config.build().submit(images, [Example("a", "object"), Example("b", "color")]).result()
    assert scores[0, 0] == 0.75 and scores[1, 0].isnan()


@pytest.mark.parametrize(
    ("text", "folder"),
    [(README, ROOT), (CONTRIBUTING, ROOT), (CURVES, ROOT / "docs"), (RESEARCH, ROOT / "docs")],
    ids=["readme", "contributing", "curves", "research"],
)
def test_options_and_links_exist(text: str, folder: Path) -> None:
    fields = (
        {field.name for field in dataclasses.fields(Config)}
        | {f"rewards.{field.name}" for field in dataclasses.fields(RewardConfig)}
        | {"config"}
    )
    fields |= {
        "help",
        "print_config",
        "dry_run",
        "gpu_gib",
        "force_memory",
        "model",
        "nproc-per-node",
        "log-dir",
        "tee",
    }  # of generate.py and torchrun
    fields |= {"output", "gpu", "gpus", "shape", "quick", "tests"}  # of the benches
    assert set(re.findall(r"--([a-z][\w.-]+)", text)) <= fields
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (folder / link).exists(), link


def test_tree_lists_every_source_file() -> None:
    tree = README.split("## The tree")[1].split("##")[0]
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in ("kernels", "model", "rewards", "grpo"):
            name = path.name
            assert name in tree or f"`{path.stem}`" in README, f"{path.relative_to(ROOT)} is not in the README's tree"


def test_the_curves_are_of_real_metrics(tmp_path: Path) -> None:
    """Names in the first column of a table; all that a run can write is there after two runs on one rank."""
    names = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \|", CURVES, re.MULTILINE)))
    assert len(names) > 40
    words = ["--num_generations", "2", "--per_device_train_batch_size", "2", "--max_steps", "1"]
    written = {"seconds/wait", "slowest_rank"}  # of several ranks
    (tmp_path / "two.jsonl").write_text("".join((TOY / "heldout.jsonl").open().readlines()[:2]))
    heldout = ["--eval_file", str(tmp_path / "two.jsonl"), "--eval_steps", "1", "--entropy_target", "0.1"]
    dull = ["--eval_file", "null", "--beta", "0", "--dynamic_sampling", "1", "--importance_sampling_correction", "true"]
    for i, more in enumerate([heldout, dull]):
        train(parse_config([*words, *more, "--output_dir", str(tmp_path / str(i))]))
        written |= json.loads((tmp_path / str(i) / "metrics.jsonl").read_text()).keys()
    for name in names:
        pattern = name.replace("STREAM", "(text|image)").replace("NAME", r"\w+").replace("TASK", r"\w+")
        assert any(re.fullmatch(pattern, key) for key in written), name
