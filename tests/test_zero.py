"""DeepSpeed's ZeRO against a run of one rank without it; two real ranks (tests/zero_training.py), and one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, TORCHRUN, made_once
from zero_training import DTYPES, FACTORS, GROWN, LORA, RESUMED, SAVED, SHARDED, SHRUNK, STAGES, STEPS, words

from bicot.grpo.cli import parse_config
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.dry_run import changes
from bicot.grpo.plan import load_model, plan_of
from bicot.grpo.trainer import train
from bicot.grpo.zero import engine_config

pytest.importorskip("deepspeed")
# Of KEYS against one rank's: relative, or a tenth of it absolute. Ranks sum in another order; measured are 5e-6 of the
# loss in float32. In bfloat16 that rounds weights otherwise: 4e-3 of the loss, and 2.5e-2 (q, k, v apart) at ZeRO-3.
BOUND = {"float32": 1e-5, "bfloat16": 3e-2}
KEYS = ("loss", "grad_norm", "kl", "reward", "plan_tokens")
TWO = Ranks(0, 2, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left their runs, and one rank its own, `one <dtype>`."""

    def make(out: Path) -> None:
        for name, more in {"lora": LORA, **{dtype: {"dtype": dtype} for dtype in DTYPES}}.items():
            train(parse_config(words(job, out / f"one {name}", **more, per_device_train_batch_size=2)))
        zero3 = json.loads((ROOT / "configs" / "zero3.json").read_text())
        zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every parameter in shares
        (out / SHARDED).write_text(json.dumps(zero3))
        for launcher in (TORCHRUN, [sys.executable]):
            command = [*launcher, str(ROOT / "tests" / "zero_training.py"), str(job), str(out)]
            subprocess.run(
                command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}, timeout=900
            )

    return made_once(tmp_path_factory, "zero_runs", make)


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": row["step"], **{key: row[key] for key in KEYS}} for row in rows]


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]], bound: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=bound, abs=bound / 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_follows_one_rank(runs: Path, stage: str, dtype: str) -> None:
    """Two iterations of two micro-batches a step, clipped, with a reference model and a falling learning rate."""
    expected = metrics(runs / f"one {dtype}")
    assert len(expected) == STEPS and all(row["grad_norm"] > 0.5 for row in expected), "clipping takes part"
    assert expected[-1]["kl"] > 1e-3, "the rollouts and the loss see weights that move"
    assert_same(metrics(runs / f"{stage} {dtype}"), expected, BOUND[dtype])


def test_adapters_train_with_zero2(runs: Path) -> None:
    expected = metrics(runs / "ddp lora")
    assert expected[-1]["kl"] > 1e-3
    assert_same(metrics(runs / "zero2 lora"), expected, BOUND["float32"])


@pytest.mark.parametrize(
    "name", [f"{how} checkpointing" for how in ("zero3 true", "zero3 selective", "zero2 selective")]
)
def test_recomputed_activations_change_nothing(runs: Path, name: str) -> None:
    assert_same(metrics(runs / name), metrics(runs / f"{name.split()[0]} float32")[:1], 1e-6)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes(runs: Path, name: str) -> None:
    """At the same stage exactly; at another, or without DeepSpeed, as closely as the stages themselves agree."""
    same = name.split()[0] == RESUMED[name].split()[0]
    bound = 0 if same else BOUND["bfloat16" if "bfloat16" in name else "float32"]
    assert_same(metrics(runs / name), metrics(runs / RESUMED[name])[SAVED:], bound)
    if same:
        folders = (runs / each / f"checkpoint-{STEPS:06d}" for each in (name, RESUMED[name]))
        resumed, whole = (load_file(folder / "model.safetensors") for folder in folders)
        assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", [*GROWN, *SHRUNK])
def test_a_checkpoint_resumes_on_another_number_of_ranks(runs: Path, name: str) -> None:
    bound = BOUND["bfloat16" if "bfloat16" in name else "float32"]
    assert_same(metrics(runs / name), metrics(runs / (GROWN | SHRUNK)[name])[SAVED:], bound)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_masters_and_moments_are_those_of_adamw(runs: Path, stage: str) -> None:
    """bfloat16 weights are rounded float32 masters, at each stage within the bound of those without DeepSpeed."""
    name = f"checkpoint-{SAVED:06d}"
    states = [torch.load(runs / f"{run} bfloat16" / name / "trainer_state.pt")["optimizer"] for run in (stage, "ddp")]
    masters, expected = (state["masters"] for state in states)
    assert all(master.dtype == torch.float32 for master in masters)
    rounded = load_file(runs / f"{stage} bfloat16" / name / "model.safetensors")["lm_head.weight"]
    assert any(m.shape == rounded.shape and torch.equal(m.bfloat16(), rounded) for m in masters)
    assert any((m != m.bfloat16()).any() for m in masters)
    for i, (master, other) in enumerate(zip(masters, expected, strict=True)):
        # of steps of 1e-3, as large where a gradient is near 0 and of either sign
        assert (master - other).abs().mean() < 1e-4
        mine, theirs = (state["adamw"]["state"][i] for state in states)
        assert mine["step"] == theirs["step"] == 2 * SAVED
        for key in ("exp_avg", "exp_avg_sq"):
            assert (mine[key] - theirs[key]).norm() <= 0.05 * theirs[key].norm()


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_gradients_that_are_zero_or_not_finite(runs: Path, stage: str) -> None:
    for rank in range(2):
        nothing, one, nan = (json.loads((runs / f"rank{rank}.json").read_text())[stage][str(f)] for f in FACTORS)
        assert nothing["norm"] == 0 and nothing["moved"] == []
        # two micro-batches of two ranks, summed
        assert one["norm"] == pytest.approx(4 * one["elements"] ** 0.5) and len(one["moved"]) == 1
        assert "the weights are as before this step" in nan["error"] and nan["moved"] == []


def test_one_process_without_torchrun(job: Path, tmp_path: Path) -> None:
    """For example one GPU, whose masters are in the memory of the host."""
    options = words(job, tmp_path, deepspeed="configs/zero2_offload.json", max_steps=1, eval_file="null")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *options], check=True, cwd=job, timeout=300)
    assert len(metrics(tmp_path)) == 1


def settings_of(tmp_path: Path, text: str, **changes: Any) -> dict[str, Any]:
    (tmp_path / "zero.json").write_text(text)
    settings = engine_config(
        Config(deepspeed=str(tmp_path / "zero.json"), rewards=RewardConfig("scene"), **changes), TWO
    )
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optimizer": {"type": "AdamW", "params": {"lr": 2e-6}}', "optimizer.params.lr is 2e-06, but learning_rate"),
        ('{"optimizer": {"type": "Lamb"}', "optimizer.type is 'Lamb'"),
        ('{"optimizer": {"params": {"torch_adam": false}}', "optimizer.params.torch_adam is False"),
        ('{"optimizer": {"params": {"betas": [0.9, 0.95]}}', "[0.9, 0.95], but [adam_beta1, adam_beta2] is [0.9, 0.9"),
        ('{"gradient_clipping": 0.1', "gradient_clipping is 0.1, but max_grad_norm is 1.0"),
        ('{"gradient_accumulation_steps": 8', "is 8, but gradient_accumulation_steps is 2"),
        ('{"train_micro_batch_size_per_gpu": 8', "is 8, but per_device_train_batch_size is 1"),
        ('{"train_batch_size": 8', "is 8, but per_device_train_batch_size × gradient_accumulation_steps × ranks is 4"),
        ('{"bf16": {"enabled": false}', "bf16.enabled is False, but dtype bfloat16 is True"),
        ('{"fp16": {"enabled": true}', "fp16.enabled is True, but dtype float16 is False"),
        ('{"scheduler": {"type": "WarmupLR"}', "lr_scheduler_type"),
    ],
)
def test_values_that_differ_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        settings_of(tmp_path, text + ', "zero_optimization": {"stage": 2}}')
    assert words in str(error.value) and str(tmp_path / "zero.json") in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("lora_r", 4), ("dynamic_sampling", 2)])
def test_zero3_has_no_adapters_and_no_dynamic_sampling(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* does not go with .*zero\.json: ZeRO-3"):
        settings_of(tmp_path, '{"zero_optimization": {"stage": 3}}', **{name: value})


def test_auto_and_equal_values_are_taken_from_the_config(tmp_path: Path) -> None:
    zero = '"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}'
    text = '{"optimizer": {"params": {"lr": "auto", "eps": 1e-8}}, "train_batch_size": "auto", ' + zero + "}"
    settings = settings_of(tmp_path, text, learning_rate=3e-6)
    assert settings["zero_optimization"] == {"stage": 3}, "an auto without a setting is DeepSpeed's default"
    assert settings["optimizer"]["params"]["lr"] == 3e-6 and settings["train_batch_size"] == 4


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"zero_optimization": true}', '{"zero_optimization": {"stage": 0}}', "{"]
)
def test_files_without_zero_settings_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"zero\.json"):
        settings_of(tmp_path, text)


def test_the_memory_plan_divides_among_ranks() -> None:
    words = ["--config", str(ROOT / "configs" / "toy.yaml"), "--gradient_accumulation_steps", "2"]
    plain = parse_config(words)
    model = load_model(plain.model_name_or_path)
    peaks = [
        plan_of(config, model, 8, 80 * 2**30).peaks["update"]
        for config in [plain, *(replace(plain, deepspeed=f"{ROOT}/configs/zero{stage}.json") for stage in (1, 2))]
    ]
    assert peaks[0] > peaks[1] > peaks[2]
    assert "--optim adamw_8bit" not in dict(changes(replace(plain, deepspeed=f"{ROOT}/configs/zero2.json")))
