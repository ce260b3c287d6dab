"""Rollouts as files: what is read is what was written; replayed steps; rollouts alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from training import SMALL, assert_same_weights, metrics, run, weights

from bicot.grpo.rollout_files import SavedRollout, load_rollout, path_of, save_rollout
from bicot.model.chunk import RolloutChunk
from bicot.model.packed import Packed
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo


def scored() -> SavedRollout:
    rollout = RolloutChunk(
        prompts=Packed.of([[1, 2], [1, 2]]),
        plans=Packed.of([[5], [6, 7, 8]]),
        plan_logprobs=Packed.of([torch.tensor([-0.5]), torch.tensor([-1.0, -2.0, -0.25])]),
        plan_texts=["a", "b ü"], truncated=torch.tensor([False, True]), image_prompts=Packed.of([[1, 2, 3], [1, 2]]),
        image_tokens=torch.tensor([[9, 8], [7, 6]]), image_logprobs=torch.tensor([[-1.5, -2.5], [-3.0, -0.125]]),
        guided_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, -0.5]]),
        images=torch.tensor([0, 51, 255]).div(255).view(1, 3, 1, 1).expand(2, 3, 4, 4),
        spans=(),
    )  # fmt: skip
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
    lists = load_rollout(path, torch.device("meta")).rollout  # what the host reads stays on the CPU
    assert {x.device.type for x in (lists.truncated, *(p.values for p in (lists.plans, lists.prompts)))} == {"cpu"}
    assert {x.device.type for x in (lists.image_tokens, lists.plan_logprobs.values)} == {"meta"}


def test_files_that_are_no_rollouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step-000001-rank-0.safetensors is not there"):
        load_rollout(path_of(tmp_path, 1, 0), torch.device("cpu"))
    path = path_of(tmp_path, 1, 0)
    save_rollout(path, scored(), False)
    for damaged in (b"", b"hello", path.read_bytes()[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="step-000001-rank-0.safetensors is not a file of"):
            load_rollout(path, torch.device("cpu"))


LORA = ("--lora_r", "2", "--lora_dropout", "0.5", "--lr_scheduler_type", "constant")
STEPS = (*SMALL, *LORA, "--per_device_train_batch_size", "1", "--max_steps", "2")


@pytest.fixture(scope="module")
def saved(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which trains adapters with dropout, and in `kept` its rollouts."""
    folder = tmp_path_factory.mktemp("saved")
    run(job, folder, *STEPS, "--save_rollouts", str(folder / "kept"))
    return folder


def test_a_replay_trains_as_the_run_did(job: Path, saved: Path, tmp_path: Path) -> None:
    """Without the rewards' module, and without prompts."""
    replay = ("--replay", str(saved / "kept"), "--train_file", "nowhere.jsonl", "--rewards.names", "nowhere:Nothing")
    run(job, tmp_path, *STEPS, *replay)
    assert_same_weights(weights(tmp_path), weights(saved))
    rows = metrics(saved)
    assert all(row.pop("image_diversity") > 0 for row in rows), "of pictures, which were not kept"
    assert metrics(tmp_path) == rows


def test_rollouts_alone_are_those_of_the_first_step(job: Path, saved: Path, tmp_path: Path) -> None:
    kept, output = tmp_path / "kept", tmp_path / "run"
    alone = ("--rollout_only", "true", "--save_rollouts", str(kept), "--save_rollout_images", "true")
    run(job, output, *STEPS, *alone)
    assert not list(output.glob("checkpoint-*")) and len(list(kept.iterdir())) == 2
    assert all("learning_rate" not in row and "grad_norm" not in row for row in metrics(output))
    cpu = torch.device("cpu")
    mine, theirs = (load_rollout(path_of(folder, 1, 0), cpu) for folder in (kept, saved / "kept"))
    assert mine.rollout.plans.tolist() == theirs.rollout.plans.tolist() and torch.equal(mine.scores, theirs.scores)
    assert [example.prompt for example in mine.examples] == [example.prompt for example in theirs.examples]
    red, _, blue = mine.rollout.images.mean((2, 3)).T
    assert (red - blue).tolist() == pytest.approx(mine.scores[:, 0].tolist(), abs=1e-2)
    assert load_rollout(path_of(kept, 2, 0), cpu).rollout.plans.tolist() != mine.rollout.plans.tolist()


def test_rollouts_of_two_runs_are_not_mixed(job: Path, saved: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (saved / "kept").iterdir()}
    with pytest.raises(FileExistsError, match=r"save_rollouts: .*kept has rollouts of another run \(step-00000"):
        run(job, tmp_path / "run", *STEPS, "--save_rollouts", str(saved / "kept"))
    assert {path: path.stat().st_mtime_ns for path in (saved / "kept").iterdir()} == before
    more = ("--save_rollouts", str(tmp_path / "kept"))
    run(job, tmp_path / "run", *STEPS, *more, "--stop_after", "1")
    run(job, tmp_path / "run", *STEPS, *more, "--resume", "auto")
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_steps", "3"), "step-000003-rank-0.safetensors is missing"),
        (("--num_generations", "2"), "is of 1 ranks with 8 samples each, this run has 1 with 4"),
    ],
)
def test_what_cannot_be_replayed_is_said_at_once(
    more: tuple[str, ...], message: str, job: Path, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(job, tmp_path / "run", *STEPS, "--replay", str(saved / "kept"), *more)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
