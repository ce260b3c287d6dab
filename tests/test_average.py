"""Averaged weights, and a reference that follows the policy, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import killed
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT
from training import SMALL, assert_resumes, assert_same_weights, metrics, run, weights, words

from bicot.grpo.average import WeightAverage
from bicot.grpo.config import Config
from bicot.grpo.plan import load_model, plan_of
from bicot.rewards.config import RewardConfig

LAST = ("--save_steps", "1", "--save_total_limit", "null", "--max_steps", "3", "--lr_scheduler_type", "constant")
EMA = (*LAST, "--sample_steps", "0", "--ema_decay", "0.75", "--eval_steps", "3")
SYNC = (*SMALL, *LAST, "--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--ref_model_mixup_alpha", "0.25")


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_average_is_evaluated_and_saved(job: Path, tmp_path: Path) -> None:
    run(job, tmp_path / "plain", *SMALL, *LAST)
    whole = assert_resumes(job, tmp_path, *EMA)
    assert_same_weights(weights(tmp_path / "plain"), weights(whole))
    average = model_of(job / "model")
    for step in (1, 2, 3):
        average = {name: value.lerp(weights(whole, step)[name], 0.25) for name, value in average.items()}
        assert_same_weights(model_of(whole / f"checkpoint-{step:06d}" / "ema"), average)
    assert any(not torch.equal(value, weights(whole)[name]) for name, value in average.items())
    ema = ("--model_name_or_path", str(whole / "checkpoint-000003" / "ema"))
    cards = [(whole / "checkpoint-000003" / folder / "README.md").exists() for folder in ("", "ema")]
    assert cards == [False, True], "beside the model whose rewards it has"
    fresh = run(job, tmp_path / "fresh", *EMA, *ema, "--max_steps", "1", "--eval_steps", "1")
    assert fresh["heldout_reward_before"] == metrics(whole)[2]["heldout/reward"]
    assert_same_weights(model_of(tmp_path / "parts" / "checkpoint-000003" / "ema"), average)


def test_a_bfloat16_model_has_a_float32_average(job: Path, tmp_path: Path) -> None:
    """It averages the masters. In bfloat16 it would not move at all."""
    more = (*SMALL, *LAST, "--dtype", "bfloat16", "--learning_rate", "1e-5", "--ema_decay", "0.999")
    run(job, tmp_path / "run", *more, "--stop_after", "2")
    first, second = (
        torch.load(tmp_path / "run" / f"checkpoint-{step:06d}" / "trainer_state.pt")["optimizer"] for step in (1, 2)
    )
    for old, new, master in zip(first["average"], second["average"], second["masters"], strict=True):
        assert new.dtype == torch.float32 and torch.equal(new, old.lerp(master, 1 - 0.999))
    assert any(not torch.equal(old, new) for old, new in zip(first["average"], second["average"], strict=True))
    narrow = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))  # as its own master
    average = WeightAverage([narrow], [narrow], 0.999)
    narrow.data.fill_(1)
    for _ in range(1000):
        average.update()
    assert average.averages[0].tolist() == pytest.approx([1 - 0.999**1000] * 3, rel=1e-4)
    with average.applied():
        assert narrow[0].item() == pytest.approx(0.632, abs=2e-3)
    assert narrow.tolist() == [1, 1, 1]


def test_adapters_have_an_average(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run(job, tmp_path, *SMALL, *LAST, "--lora_r", "2", "--ema_decay", "0.5")
    read = [weights(tmp_path, n) for n in (1, 2)]
    average = [load_file(tmp_path / f"checkpoint-{n:06d}" / "ema" / "adapter_model.safetensors") for n in (1, 2)]
    assert_same_weights(average[1], {name: value.lerp(read[1][name], 0.5) for name, value in average[0].items()})


@pytest.mark.parametrize("more", [(), ("--reference_device", "cpu")])
def test_the_reference_follows_the_policy(more: tuple[str, ...], job: Path, tmp_path: Path) -> None:
    whole = assert_resumes(job, tmp_path, *SYNC, *more)
    initial = model_of(job / "model")
    mixed = {name: value.lerp(weights(whole, 2)[name], 0.25) for name, value in initial.items()}
    for step, expected in ((1, initial), (2, mixed), (3, mixed)):
        assert_same_weights(model_of(whole / f"checkpoint-{step:06d}" / "reference"), expected)
    run(job, tmp_path / "still", *SYNC, "--sync_ref_model", "false")
    assert not (tmp_path / "still" / "checkpoint-000003" / "reference").exists()
    kl = [[row["kl"] for row in metrics(output)] for output in (whole, tmp_path / "still")]
    assert kl[0][:2] == kl[1][:2] and kl[0][2] < kl[1][2]


def test_the_reference_follows_sharded_weights(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero3 = json.loads((ROOT / "configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or none of these small ones would be
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    more = (*SYNC, "--max_steps", "2", "--deepspeed", str(tmp_path / "zero3.json"))
    process = killed.start(killed.run, words(job, tmp_path / "run", *more), job, tmp_path / "run")
    killed.finish(tmp_path / "run.log", process)
    trained, initial = weights(tmp_path / "run", 2), model_of(job / "model")
    mixed = {name: value.lerp(trained[name], 0.25) for name, value in initial.items()}
    assert any(not torch.equal(value, mixed[name]) for name, value in initial.items())
    assert_same_weights(model_of(tmp_path / "run" / "checkpoint-000002" / "reference"), mixed)


def test_the_plan_has_a_row_for_the_average(job: Path) -> None:
    model = load_model(str(job / "model"))
    plans = [plan_of(Config(rewards=RewardConfig("scene"), ema_decay=decay), model, 1, 2**33) for decay in (None, 0.9)]
    assert plans[1].rows["average (ema_decay)"][0] == plans[1].rows["float32 masters"][0] > 0
    assert "average (ema_decay)" not in plans[0].rows
