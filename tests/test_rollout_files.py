"""Rollouts as files: what is read is what was written; replayed steps; rollouts alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bicot.grpo.rollout_files import Scored, load_rollout, path_of, save_rollout
from bicot.model.engine import RolloutChunk
from bicot.model.packed import Packed
from bicot.rewards.base import Example, NumeracyInfo, SpatialInfo


def scored() -> Scored:
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
    return Scored(rollout, examples, torch.tensor([[0.5, torch.nan], [1.0, 2.0]]), ["one"], ["two"])


@pytest.mark.parametrize("images", [True, False])
def test_what_is_read_is_what_was_written(tmp_path: Path, images: bool) -> None:
    written, path = scored(), path_of(tmp_path / "deep", 3, 1)
    save_rollout(path, written, images)
    assert [p.name for p in path.parent.iterdir()] == ["step-000003-rank-1.safetensors"]
    read = load_rollout(path, torch.device("cpu"))
    assert (read.examples, read.trained, read.monitored) == (written.examples, ["one"], ["two"])
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
        with pytest.raises(ValueError, match="step-000001-rank-0.safetensors is no rollout"):
            load_rollout(path, torch.device("cpu"))
