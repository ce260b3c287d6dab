"""Two ranks train as one rank with twice the accumulation. test_groups.py and test_zero.py have more of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import killed
import pytest
import torch
from safetensors.torch import load_file
from training import (
    ACCUMULATION,
    LORA,
    SMALL,
    assert_close_weights,
    assert_same_run,
    assert_same_weights,
    assert_two_ranks_equal_one,
    metrics,
    on_two_ranks,
    run,
    weights,
    words,
    write_rows,
)

from bicot.grpo.data import step_indices

PARTIAL = """
class Partial:
    name = "partial"
    def applies(self, example):
        return example.task_type == "object"
    def score(self, images, examples):
        return images[:, 0].mean((1, 2))
"""


LEAVES = """
import os
calls = []
def leaves(images, examples):
    calls.append(len(images))
    if len(calls) > 2 and os.environ["RANK"] == "1":
        os._exit(9)
    return images.mean((1, 2, 3))
"""


def test_a_rank_that_is_lost_loses_no_step(job: Path, tmp_path: Path) -> None:
    """The other one saves the steps before."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    output = tmp_path / "out"
    more = (*SMALL, ACCUMULATION, "1", "--rewards.names", "leaves:leaves", "--save_steps", "100")
    for process in killed.together(killed.run, words(job, output, *more), tmp_path, output, None):
        process.join(120)
        process.kill()
    assert [row["step"] for row in metrics(output)] == [1, 2]
    assert weights(output, 2).keys() == load_file(job / "model" / "model.safetensors").keys()


def test_two_ranks_equal_one(job: Path, tmp_path: Path) -> None:
    assert_two_ranks_equal_one(job, tmp_path, "--max_steps", "2")


def test_two_ranks_with_lora_equal_one(job: Path, tmp_path: Path) -> None:
    """In micro-batches of one or two samples, which cut groups; the ranks have not as many."""
    pytest.importorskip("peft")
    assert_two_ranks_equal_one(job, tmp_path, *LORA, "--max_steps", "2", two=("--micro_batch_tokens", "100"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_with_adamw_8bit_equal_one(dtype: str, job: Path, tmp_path: Path) -> None:
    """Bit for bit: the sum over two ranks is the sum of two micro-batches, so no moment is quantised otherwise."""
    pytest.importorskip("torchao")
    assert_two_ranks_equal_one(job, tmp_path, *SMALL, "--max_steps", "3", "--optim", "adamw_8bit", "--dtype", dtype)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))
    moved, start = weights(tmp_path / "two")["lm_head.weight"], load_file(job / "model" / "model.safetensors")
    assert not torch.equal(moved, start["lm_head.weight"].to(moved.dtype))


def test_two_ranks_skip_the_steps_in_which_no_reward_applies(job: Path, tmp_path: Path) -> None:
    """A step with a reward on one rank is trained by both; a run that stops after a skipped step can be resumed."""
    (tmp_path / "partial_reward.py").write_text(PARTIAL)
    applies = [(True, False), (False, False), (False, True), (False, False)]  # step by step, on the two ranks
    rows: list[dict[str, str]] = [{}] * 8
    for step, on_ranks in enumerate(applies):
        for index, applicable in zip(step_indices(8, 2, step, seed=0), on_ranks, strict=True):
            rows[index] = {"prompt": f"a circle and w{index}", "task_type": "object" if applicable else "non"}
    more = [*SMALL, "--train_file", write_rows(tmp_path / "prompts.jsonl", rows), "--save_steps", "1"]
    more += ["--rewards.names", "partial_reward:Partial", "--max_steps", "4", "--save_total_limit", "null"]
    more += ["--per_device_train_batch_size", "1", "--adam_epsilon", "1e-3", "--lr_scheduler_type", "linear"]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = on_two_ranks(job, whole, *more, modules=tmp_path)
    skipped = [line for line in said.splitlines() if "skipped" in line]
    assert skipped == [f"step {step}: no reward applies to any sample; the update is skipped" for step in (2, 4)]
    steps = metrics(whole)
    assert [step["update_skipped"] for step in steps] == [0, 1, 0, 1]
    assert ["grad_norm" in step for step in steps] == ["reward" in step for step in steps] == [True, False, True, False]
    assert [step["learning_rate"] for step in steps] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    head = [weights(whole, step)["lm_head.weight"] for step in (1, 2, 3, 4)]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(head)] == [True, False, True]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run(job, tmp_path / "one", *more, ACCUMULATION, "2")
    assert_close_weights(weights(whole), weights(tmp_path / "one"))

    on_two_ranks(job, parts, *more, "--stop_after", "2", modules=tmp_path)
    on_two_ranks(job, parts, *more, "--resume", "auto", modules=tmp_path)
    assert_same_run(whole, parts)
