"""What the documents say can be typed in: their Python blocks run, their files exist, their settings are real."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import ROOT

from bicot.grpo.config import Config
from bicot.rewards.base import Example
from bicot.rewards.config import RewardConfig

README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))


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


@pytest.mark.parametrize("text", [README, CONTRIBUTING])
def test_options_and_links_exist(text: str) -> None:
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
        assert (ROOT / link).exists(), link


def test_tree_lists_every_source_file() -> None:
    tree = README.split("## The tree")[1].split("##")[0]
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in ("kernels", "model", "rewards", "grpo"):
            name = path.name
            assert name in tree or f"`{path.stem}`" in README, f"{path.relative_to(ROOT)} is not in the README's tree"
