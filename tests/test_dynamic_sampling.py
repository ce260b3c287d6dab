"""Dynamic sampling replaces groups of equal rewards by other prompts: which ones, on how many ranks, after a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import engine_of
from stepping import config
from torch import Tensor
from training import SMALL, assert_resumes, metrics, run, write_rows

from bicot.grpo.data import step_indices
from bicot.grpo.distributed import Ranks
from bicot.grpo.dynamic_sampling import redraw
from bicot.grpo.rollout import roll_out
from bicot.model.policy import Policy
from bicot.model.settings import Sampling
from bicot.rewards.base import Example
from bicot.rewards.ensemble import RewardEnsemble

G, SEED, STEP = 3, 16, 2
SAMPLING = Sampling(max_completion_length=6, cfg_weight=2.0)
EXAMPLES = [Example(f"a circle and w{i}", "object" if i % 3 == 0 else "non") for i in range(12)]
CFG = config(num_generations=G, dynamic_sampling=2, seed=SEED)
SOME = """
class Some:
    name = "some"
    def score(self, images, examples):
        says = [example.task_type == "object" for example in examples]
        return images[:, 0].mean((1, 2)) * images.new_tensor(says) + 0.5
"""


class Some:
    """The redness of pictures of `object` prompts; 0.5 for all others."""

    name = "some"

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        says = images.new_tensor([example.task_type == "object" for example in examples])
        return images[:, 0].mean((1, 2)) * says + 0.5


def drawn_by(policy: Policy, rank: int, size: int) -> tuple[list[Any], list[int]]:
    """(prompt, plan, image tokens, score) of the samples of a rank, of a step of 4 prompts; and what was counted."""
    ranks, share = Ranks(rank, size, torch.device("cpu")), 4 // size
    ensemble = RewardEnsemble([Some()])
    draw = partial(roll_out, engine_of(policy), ensemble, group_size=G, sampling=SAMPLING, seed=7)
    own = [EXAMPLES[i] for i in step_indices(len(EXAMPLES), 4, STEP, SEED)][rank * share :][:share]
    first = draw(own, first_sample=rank * share * G)
    (rollout, each, handle), counts = redraw(first, draw, EXAMPLES, ensemble.weights, CFG, STEP, ranks)
    assert handle.metrics["rewards/some/skipped"] == 0 and handle.metrics["rewards/some/milliseconds"] > 0
    assert len(rollout) == len(each) == len(handle.result()) == share * G
    assert [example.plan for example in each] == rollout.plan_texts
    rows = zip(each, rollout.image_tokens.tolist(), handle.result()[:, 0].tolist(), strict=True)
    return [(example.prompt, example.plan, tokens, score) for example, tokens, score in rows], counts


def test_a_group_without_spread_is_replaced_by_the_first_with_spread(policy: Policy) -> None:
    """Against the rule written plainly, which draws each group alone."""
    engine, expected, took = engine_of(policy), [], []
    for place in range(4):
        tries = []
        for round_ in range(3):
            order = step_indices(len(EXAMPLES), 4, STEP, SEED + round_)
            example, number = EXAMPLES[order[place]], (round_ * 4 + place) * G
            (chunk,) = engine.generate([example.prompt], G, SAMPLING, 7, number)
            scores = Some().score(chunk.images, [example] * G)
            rows = zip(chunk.plan_texts, chunk.image_tokens.tolist(), scores.tolist(), strict=True)
            tries.append([(example.prompt, *row) for row in rows])
        spread = [round_ for round_, rows in enumerate(tries) if len({row[-1] for row in rows}) > 1]
        took.append(spread[0] if spread else None)
        expected += tries[took[-1] or 0]
    assert took == [None, 0, 1, 2], "a place is left dull, kept, replaced soon and late"
    found, counts = drawn_by(policy, 0, 1)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], abs=1e-6)
    replaced = sum(bool(place) for place in took)
    assert counts == [2, replaced]

    halves = [drawn_by(policy, rank, 2) for rank in range(2)]
    joined = halves[0][0] + halves[1][0]
    assert [row[:3] for row in joined] == [row[:3] for row in found], "two ranks draw what one draws"
    assert halves[0][1][1] + halves[1][1][1] == replaced


def test_a_run_resumes(job: Path, tmp_path: Path, write_module: Callable[[str, str], None]) -> None:
    write_module("sparse", SOME)
    kinds = ["object", "non", "non", "object", "non", "non", "non", "object"]
    rows = [{"prompt": f"a circle and w{i}", "task_type": kind} for i, kind in enumerate(kinds)]
    more = [*SMALL, "--train_file", write_rows(tmp_path / "prompts.jsonl", rows), "--rewards.names", "sparse:Some"]
    more += ["--beta", "0", "--max_steps", "4"]
    run(job, tmp_path / "off", *more)
    assert_resumes(job, tmp_path, *more, "--dynamic_sampling", "3")
    off, on = (metrics(tmp_path / name) for name in ("off", "whole"))
    assert not any(key.startswith("dynamic") for key in off[0])
    first = on[0]  # of four prompts of one model
    assert 0 < first["dynamic_sampling/rounds"] <= 3
    fewer = 4 * (off[0]["frac_reward_zero_std"] - first["frac_reward_zero_std"])
    assert first["dynamic_sampling/replaced"] == fewer > 0
