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

from bicot.docs import write
from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config
from bicot.grpo.trainer import train
from bicot.rewards.base import Example
from bicot.rewards.config import RewardConfig

PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}
README, REWARDS, CURVES = PAGES["README.md"], PAGES["rewards.md"], PAGES["curves.md"]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_kernel_example_runs() -> None:
    scope: dict[str, object] = {}
    (block,) = blocks(README)
    exec(block, scope)
    hidden, loss = scope["hidden"], scope["loss"]
    assert isinstance(hidden, torch.Tensor) and hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert isinstance(loss, torch.Tensor) and loss.isfinite()


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_reward_example_is_a_reward(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(REWARDS)
    assert len(block.splitlines()) <= 20
    (tmp_path / "my_rewards.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    (settings,) = re.findall(r"```yaml\n(.*?)```", REWARDS, re.DOTALL)
    name = "my_rewards:Brightness"
    rewards = yaml.safe_load(settings)["rewards"]
    assert name in rewards["names"] and rewards["options"][name] == {"target": 0.5}
    config = RewardConfig([name], options={name: rewards["options"][name]}, schedule=schedule)
    images = torch.full((2, 3, 4, 4), 0.25)
    scores = config.build().submit(images, [Example("a", "object"), Example("b", "color")]).result()
    assert scores[0, 0] == 0.75 and scores[1, 0].isnan()


PROGRAMS = ("generate.py", "evaluate.py", "examples/reward_server.py")


@pytest.mark.parametrize("name", PAGES)
def test_options_and_links_exist(name: str) -> None:
    """Options of train.py, or of the programs named below; those of T2I-R1 are in the first column of its tables."""
    text = PAGES[name]
    folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
    options = {field.name for field in dataclasses.fields(Config)}
    options |= {f"rewards.{field.name}" for field in dataclasses.fields(RewardConfig)}
    options |= {"config", "help", "print_config", "dry_run", "gpu_gib", "gpus", "force_memory", "debug"}  # of train.py
    options |= {"output", "gpu", "shape", "quick", "tests", "model", "vary"}  # of the benches
    options |= {"nproc-per-node", "log-dir", "tee"} | {"view"}  # of torchrun, and of train.py too
    scripts = "".join((ROOT / script).read_text() for script in PROGRAMS)
    options |= set(re.findall(r'"--(\w+)"', scripts))
    ours = re.sub(r"^\| [^|]* \|", "|", text, flags=re.MULTILINE) if name == "from-t2i-r1.md" else text
    assert (
        set(re.findall(r"--([a-z][\w.-]+)", re.sub(r"--rewards\.options\.\w+", "--rewards.options", ours))) <= options
    )
    for link in re.findall(r"\]\((?!http)([^)]+)", text):
        target, _, place = link.partition("#")
        assert (folder / target).exists(), link
        if place:
            titles = re.findall(r"^#+ (.*)", (folder / target).read_text() if target else text, re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_every_page_is_in_the_readme() -> None:
    for path in ROOT.glob("docs/*.md"):
        assert f"](docs/{path.name})" in README, path.name


def test_generated_pages_are_current() -> None:
    """Else run `python -m bicot.docs.write`."""
    assert PAGES["configuration.md"] == write.configuration()
    assert PAGES["kernels.md"] == write.kernels()
    assert PAGES["CONTRIBUTING.md"] == write.contributing()


def test_the_walk_names_files_that_exist() -> None:
    for name in re.findall(r"`(\w+/\w+\.py)`", PAGES["CONTRIBUTING.md"]):
        assert (ROOT / name).exists(), name


def test_tree_lists_every_source_file() -> None:
    tree = README.split("## The tree")[1].split("##")[0]
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in ("kernels", "model", "rewards", "grpo", "toy"):
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
