"""Grids, the page, trackers, and `generate.py`, looked at from outside."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tiny import ROOT, tiny_policy

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.evaluate import Sample, load_samples, mean_by_task, mean_reward, save_samples
from bicot.grpo.report import draw_grid, grid_figure, pick, write_report
from bicot.grpo.tracking import Log
from bicot.model.prompts import PromptFormat
from bicot.model.settings import RolloutSettings, Sampling


def sample(i: int, task: str = "color", reward: float = 0.5) -> Sample:
    pixels = np.full((8, 8, 3), 10 * i, np.uint8)
    return Sample(f"prompt {i}", task, "red <b>circle</b> . " * 9, reward, {"scene": reward}, pixels)


def test_samples_survive_the_disk(tmp_path: Path) -> None:
    samples = [sample(0), sample(1, reward=math.nan)]
    save_samples(samples, tmp_path / "s" / "heldout-before")
    loaded = load_samples(tmp_path / "s" / "heldout-before")
    assert [s.prompt for s in loaded] == ["prompt 0", "prompt 1"] and math.isnan(loaded[1].reward)
    assert (loaded[1].image == samples[1].image).all()
    assert load_samples(tmp_path / "none") == []


def test_means_leave_out_missing_rewards() -> None:
    samples = [sample(0), sample(1, reward=1.0), sample(2, reward=math.nan), sample(3, "spatial", 0.0)]
    assert mean_by_task(samples) == {"color": 0.75, "spatial": 0.0}
    assert mean_reward(samples) == 0.5
    assert mean_by_task(samples[2:3]) == {"color": None} and mean_reward(samples[2:3]) is mean_reward([]) is None


@pytest.mark.parametrize("text", ["a$b_$c", "$_$", "a \\foo $\\foo$ circle", "a $5 and 6$ circle", "{}%#&~^_"])
def test_dollars_and_backslashes_are_text(text: str, tmp_path: Path) -> None:
    """In a prompt, a plan or a task type: matplotlib would read them as a formula."""
    one = replace(sample(1, text), prompt=text, plan=text)
    draw_grid({text: [one]}, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "reward": 0.5, f"reward_by_task/{text}": 0.5, "loss": 0.1}) + "\n"
    )
    write_report(tmp_path, Config(rewards=RewardConfig(["scene"])), {"steps": 1}, {"before": [one]})
    texts = grid_figure({"": [one]}).axes[1].texts
    assert [t.get_text().strip() for t in texts] == [f"{text}\nreward 0.50", text] and not texts[0].get_parse_math()


def test_pick_takes_every_task_type() -> None:
    samples = [sample(i, task) for task in ("color", "object", "spatial") for i in range(10)]
    picked = pick(samples, 7)
    assert len(picked) == 7 and {s.task_type for s in picked} == {"color", "object", "spatial"}
    assert len({(s.task_type, s.prompt) for s in picked}) == 7 and picked == pick(samples, 7)
    assert len(pick(samples[:2], 7)) == 2


def test_grid_shows_every_picture(tmp_path: Path) -> None:
    draw_grid({"before": [sample(i) for i in range(1, 4)], "after": [sample(9, reward=math.nan)]}, tmp_path / "g.png")
    pixels = (matplotlib.image.imread(tmp_path / "g.png")[..., :3] * 255).round().astype(int)
    for grey in (10, 20, 30, 90):
        assert (pixels == grey).all(-1).sum() > 10_000, f"the picture of grey {grey} is missing"


def test_page_is_self_contained_and_escapes_text(tmp_path: Path) -> None:
    rows = [{"step": i, "reward": 0.1 * i, "seconds/draw": 1.0, "reward_by_task/a<b": 0.2} for i in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(rewards=RewardConfig("scene"), train_file="<script>")
    write_report(tmp_path, config, {"heldout_reward_before": None, "steps": 4}, {"before": [sample(0)]})
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.split("<style>")[1].replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
    assert page.count("<h2>") == 3 and page.count("data:image/") == 3
    assert (tmp_path / "before_after.png").is_file()


def test_tensorboard_gets_numbers_and_grids(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw_grid({"a": [sample(1)]}, tmp_path / "g.png")
    log = Log(Config(rewards=RewardConfig("scene"), output_dir=str(tmp_path), report_to=["tensorboard"]), 0)
    log.write(1, {"reward": 0.25, "entropy": 1.0, "rewards/x": math.nan}, tmp_path / "g.png")
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("reward")[0].value == 0.25 and events.Tags()["images"] == ["samples"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.25, "entropy": 1.0}


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(rewards=RewardConfig("scene"), output_dir=str(tmp_path), report_to=["wandb"])
    with pytest.raises(ImportError, match="wandb is not installed; pip install wandb"):
        Log(config, 0)


def test_generate_from_any_checkpoint(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path / "model")
    RolloutSettings(PromptFormat("janus", "", "plan {}"), Sampling(6, cfg_weight=2.0)).save(tmp_path / "model")
    command = [sys.executable, str(ROOT / "generate.py"), "a red circle", "two blue square", "--num_generations", "2"]
    where = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out" / "grid.png")]
    done = subprocess.run([*command, *where], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("a red circle -> ") == 2 and done.stdout.count("two blue square -> ") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"grid-{i:03d}.png" for i in range(4)),
        "grid.png",
    ]
