"""configs/recipe-*.yaml: each goes on top of the published files, and trains on top of the toy's."""

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
