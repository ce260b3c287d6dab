"""configs: recipes go on top of the published files and of the toy's; all train on the toy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from bicot.grpo.cli import parse_config
from bicot.grpo.trainer import train

RECIPES = sorted((ROOT / "configs").glob("recipe-*.yaml"))
SMALL = ["--num_generations", "4", "--per_device_train_batch_size", "2", "--max_completion_length", "12"]
SMALL += ["--max_steps", "2", "--save_steps", "2", "--sample_steps", "0", "--warmup_steps", "0", "--eval_file", "null"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(recipe.read_text())
    for base in ("toy", "janus-pro-1b", "janus-pro-7b"):
        files = ["--config", f"configs/{base}.yaml", "--config", str(recipe)]
        config = parse_config(files)
        assert {name: getattr(config, name) for name in settings} == settings
        assert config.model_name_or_path == parse_config(files[:2]).model_name_or_path
    train(
        parse_config(["--config", "configs/toy.yaml", "--config", str(recipe), *SMALL, "--output_dir", str(tmp_path)])
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["update_skipped"] for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
    assert ("kl" in rows[0]) == (settings.get("beta") != 0)


@pytest.mark.parametrize("name", ["janus-pro-1b", "janus-pro-7b"])
def test_the_published_settings_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the toy's model and prompts, by a reward that needs no files."""
    monkeypatch.chdir(ROOT)
    toy = yaml.safe_load((ROOT / "configs" / "toy.yaml").read_text())
    words = ["--config", f"configs/{name}.yaml", *SMALL, "--output_dir", str(tmp_path), "--rewards.names", "scene"]
    for key in ("model_name_or_path", "train_file", "reasoning_prompt_path"):
        words += [f"--{key}", toy[key]]
    train(parse_config(words))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["update_skipped"] for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
