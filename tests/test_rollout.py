"""Samples and scores chunk by chunk: each chunk is scored while the next is drawn, and chunks change nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from forced import engine_of
from torch import Tensor

from bicot.grpo.distributed import Ranks
from bicot.grpo.evaluate import evaluate
from bicot.grpo.rollout import roll_out
from bicot.model.engine import RolloutEngine
from bicot.model.policy import Policy
from bicot.model.settings import Sampling
from bicot.rewards.base import Example
from bicot.rewards.ensemble import RewardEnsemble

SAMPLING = Sampling(max_completion_length=6, cfg_weight=2.0)
EXAMPLES = [Example(f"a red circle and w{i}", "object", nouns=(f"w{i}",)) for i in range(3)]


class Told:
    """Redness of a picture plus the number in its example: wrong for a sample that is scored for another's prompt."""

    name = "told"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.calls.append(len(images))
        return images[:, 0].mean((1, 2)) + torch.tensor([float(example.nouns[0][1:]) for example in examples])


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_a_chunk_may_end_within_a_group(policy: Policy, schedule: Any) -> None:
    def samples(max_rows: int) -> tuple[Any, list[int]]:
        reward = Told()
        ensemble = RewardEnsemble([reward], schedule=schedule)
        engine = engine_of(policy, max_rows=max_rows)
        ranks = Ranks(0, 1, torch.device("cpu"))
        return evaluate(engine, ensemble, EXAMPLES, 4, SAMPLING, 7, ranks), reward.calls

    whole, one_call = samples(64)
    parts, calls = samples(6)  # three guided pictures at a time
    assert one_call == [12] and calls == [3, 3, 3, 3]
    assert [s.prompt for s in parts] == [e.prompt for e in EXAMPLES for _ in range(4)]
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.plan == theirs.plan and (ours.image == theirs.image).all()
        assert ours.reward == pytest.approx(theirs.reward, abs=1e-5)
    assert len({round(s.reward, 4) for s in whole}) > 6


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_each_sample_is_scored_with_its_own_plan(policy: Policy, schedule: Any) -> None:
    seen: list[Example] = []

    class Reading(Told):
        def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            seen.extend(examples)
            return super().score(images, examples)

    given = [replace(example, metadata={"id": i}) for i, example in enumerate(EXAMPLES)]
    engine, ensemble = engine_of(policy, max_rows=6), RewardEnsemble([Reading()], schedule=schedule)
    rollout, each, handle = roll_out(engine, ensemble, given, 4, SAMPLING, 7)
    handle.result()
    assert [example.plan for example in seen] == rollout.plan_texts and len(set(rollout.plan_texts)) > 6
    assert seen == each and [replace(example, plan="") for example in each] == [e for e in given for _ in range(4)]


def test_one_batch_of_plans_is_drawn_in_two_chunks_of_pictures(policy: Policy) -> None:
    chunks = list(engine_of(policy, max_rows=12).generate([e.prompt for e in EXAMPLES], 4, SAMPLING, 7))
    assert [len(chunk) for chunk in chunks] == [6, 6]
    assert [span.name for chunk in chunks for span in chunk.spans] == ["plan", *["draw", "decode"] * 2]


def test_a_chunk_is_scored_while_the_next_is_drawn(policy: Policy) -> None:
    drawn_again = threading.Event()

    class Waiting(Told):
        def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            assert drawn_again.wait(60)  # would fail if the second chunk waited for the scores of the first
            return super().score(images, examples)

    class Watched(RolloutEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            chunks = super().generate(*args, **kwargs)
            yield next(chunks)
            yield next(chunks)
            drawn_again.set()
            yield from chunks

    engine = engine_of(policy, max_rows=6)
    engine.__class__ = Watched
    ensemble = RewardEnsemble([Waiting()], schedule="threads")
    rollout, each, handle = roll_out(engine, ensemble, EXAMPLES, 4, SAMPLING, 7)
    assert len(rollout) == len(each) == len(handle.result()) == 12
