"""Rollouts as files: what is read is what was written; replayed steps; rollouts alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_policy

from bicot.grpo.cli import parse_config
from bicot.grpo.rollout_files import SavedRollout, load_rollout, path_of, save_rollout
from bicot.grpo.trainer import train
from bicot.model.chunk import RolloutChunk
from bicot.model.packed import Packed
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo

REWARDS = ["--rewards.names", "brightness:Brightness", "--rewards.monitor", "[]"]
REWARD = """
class Brightness:
    name = "brightness"
    def score(self, images, examples):
        return images.mean((1, 2, 3))
"""


def scored() -> SavedRollout:
    rollout = RolloutChunk(
        prompts=Packed.of([[1, 2], [1, 2]]),
        plans=Packed.of([[5], [6, 7, 8]]),
        plan_logprobs=Packed.of([torch.tensor([-0.5]), torch.tensor([-1.0, -2.0, -0.25])]),
        plan_texts=["a", "b ü"],
        truncated=torch.tensor([False, True]),
        image_prompts=Packed.of([[1, 2, 3], [1, 2]]),
        image_tokens=torch.tensor([[9, 8], [7, 6]]),
        image_logprobs=torch.tensor([[-1.5, -2.5], [-3.0, -0.125]]),
        guided_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, -0.5]]),
        images=torch.tensor([0, 51, 255]).div(255).view(1, 3, 1, 1).expand(2, 3, 4, 4),
        spans=(),
    )
    counted = (NumeracyInfo(2, "dog"),)
    examples = [
        Example("p", "x", ("dog",), ("red dog",), SpatialInfo("a", "b", "left of"), counted, {"k": [1, None]}, "a"),
        Example("p", "x", plan="b ü"),
    ]
    return SavedRollout(rollout, examples, torch.tensor([[0.5, torch.nan], [1.0, 2.0]]), ["one"], ["two"], 1)


@pytest.mark.parametrize("images", [True, False])
def test_what_is_read_is_what_was_written(tmp_path: Path, images: bool) -> None:
    written, path = scored(), path_of(tmp_path / "deep", 3, 1)
    save_rollout(path, written, images)
    assert [p.name for p in path.parent.iterdir()] == ["step-000003-rank-1.safetensors"]
    read = load_rollout(path, torch.device("cpu"))
    assert (read.examples, read.trained, read.monitored, read.ranks) == (written.examples, ["one"], ["two"], 1)
    assert torch.equal(read.scores, written.scores) or torch.allclose(read.scores, written.scores, equal_nan=True)
    for field in fields(RolloutChunk):
        mine, theirs = getattr(read.rollout, field.name), getattr(written.rollout, field.name)
        if field.name == "images" and not images:
            assert mine.shape == (2, 0, 0, 0)
        elif isinstance(mine, Packed):
            assert mine.tolist() == theirs.tolist() and mine.values.dtype == theirs.values.dtype
        elif isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        else:
            assert mine == theirs


def test_files_that_are_no_rollouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step-000001-rank-0.safetensors is not there"):
        load_rollout(path_of(tmp_path, 1, 0), torch.device("cpu"))
    path = path_of(tmp_path, 1, 0)
    save_rollout(path, scored(), False)
    for damaged in (b"", b"hello", path.read_bytes()[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="step-000001-rank-0.safetensors is not a file of"):
            load_rollout(path, torch.device("cpu"))


def words(job: Path, output: Path, **changes: Any) -> list[str]:
    settings = dict(
        model_name_or_path=job / "model", train_file=job / "train.jsonl", reasoning_prompt_path=job / "plan.txt",
        output_dir=output, num_generations=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_completion_length=12, max_steps=2, sample_steps=0, learning_rate=1e-2,
        warmup_steps=0, cfg_weight=2.0, lora_r=2, lora_dropout=0.5,
        lr_scheduler_type="constant", eval_file="null",
    ) | changes  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, and the rollouts of a run of two steps, which trains adapters with dropout."""
    folder = tmp_path_factory.mktemp("job")
    tiny_policy(seed=5).save_pretrained(folder / "model")
    rows = [{"prompt": f"a red circle and w{i}", "task_type": "object", "mine": i} for i in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plan.txt").write_text("plan {}")
    (folder / "brightness.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        train(parse_config([*words(folder, folder / "saved", save_rollouts=folder / "kept"), *REWARDS]))
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("checkpoint-*")) / "adapter_model.safetensors")


def metrics(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k} for row in rows]


def test_a_replay_trains_as_the_run_did(job: Path, tmp_path: Path) -> None:
    """Without the rewards' module, and without prompts."""
    replay = words(job, tmp_path, replay=job / "kept", train_file="nowhere.jsonl")
    train(parse_config([*replay, "--rewards.names", "nowhere:Nothing"]))
    mine, theirs = weights(tmp_path), weights(job / "saved")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    rows = metrics(job / "saved")
    assert all(row.pop("image_diversity") > 0 for row in rows), "of pictures, which were not kept"
    assert metrics(tmp_path) == rows


def test_rollouts_alone_are_those_of_the_first_step(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(job)
    kept = tmp_path / "kept"
    alone = words(job, tmp_path / "run", rollout_only="true", save_rollouts=kept, save_rollout_images="true")
    train(parse_config([*alone, *REWARDS]))
    assert not list((tmp_path / "run").glob("checkpoint-*")) and len(list(kept.iterdir())) == 2
    assert all("learning_rate" not in row and "grad_norm" not in row for row in metrics(tmp_path / "run"))
    cpu = torch.device("cpu")
    mine, theirs = (load_rollout(path_of(folder, 1, 0), cpu) for folder in (kept, job / "kept"))
    assert mine.rollout.plans.tolist() == theirs.rollout.plans.tolist() and torch.equal(mine.scores, theirs.scores)
    assert [example.metadata["mine"] for example in mine.examples[::4]] == [
        example.metadata["mine"] for example in theirs.examples[::4]
    ]
    assert mine.rollout.images.mean((1, 2, 3)).tolist() == pytest.approx(mine.scores[:, 0].tolist(), abs=1e-2)
    assert load_rollout(path_of(kept, 2, 0), cpu).rollout.plans.tolist() != mine.rollout.plans.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 3}, "step-000003-rank-0.safetensors is missing"),
        ({"num_generations": 2}, "is of 1 ranks with 8 samples each, this run has 1 with 4"),
        ({"reward_weights": "1,2"}, "reward_weights has 2 entries"),
        ({"save_rollouts": "elsewhere"}, "replay reads rollouts"),
        ({"replay": "null", "rollout_only": "true"}, "rollout_only needs save_rollouts"),
    ],
)
def test_what_cannot_be_replayed_is_said_at_once(
    job: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(job, tmp_path / "run", **{"replay": job / "kept", **changes})
    rewards = ["--rewards.names", "a:A,b:B"] if "reward_weights" in changes else ["--rewards.names", "a:A"]
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train(parse_config([*given, *rewards]))
    assert message in f"{error.value} {capsys.readouterr().err}" and not (tmp_path / "run" / "metrics.jsonl").exists()
