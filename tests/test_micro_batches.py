"""Micro-batches of at most so many tokens: the cut, that it changes no result, and the reference's passes."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Operators
from stepping import ALONE, G, config, double_policy, frozen_rollout, move
from test_groups import DULL_SECOND_AND_THIRD
from tiny import tiny_policy
from torch import Tensor

from bicot.grpo.config import STREAMS, Config
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.plan import settle
from bicot.grpo.step import _sequences, cut, micro_batches_of, reference_logprobs, reference_passes, update
from bicot.model.chunk import RolloutChunk
from bicot.model.policy import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.sequences import sequences_of, token_counts


@pytest.fixture(scope="module")
def samples() -> tuple[Policy, RolloutChunk]:
    """Four prompts with three samples each, of ragged plans; a policy that has moved from `double_policy(0)`."""
    policy = double_policy(0)
    rollout = frozen_rollout(policy, config())
    assert len(set(rollout.plans.lengths.tolist())) > 2 and 0 < rollout.truncated.sum() < len(rollout)
    return move(policy), rollout


def counts_of(policy: Policy, rollout: RolloutChunk, cfg: Config) -> tuple[list[int], list[int]]:
    return token_counts(_sequences(policy, rollout, policy.prompt_encoder(PromptFormat()), cfg, STREAMS))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=24),
    st.integers(1, 5),
    st.integers(1, 90),
)
def test_parts_keep_order_limit_and_groups(tokens: list[tuple[int, int]], group: int, most: int) -> None:
    alone, more = [own + shared for own, shared in tokens], [own for own, _ in tokens]
    starts = cut(alone, more, group, most)
    edges = [*starts, len(tokens)]
    assert starts[0] == 0 and all(a < b for a, b in pairwise(edges))

    def size(start: int, end: int) -> int:
        return alone[start] + sum(more[start + 1 : end])

    for start, end in pairwise(edges):
        assert end - start == 1 or size(start, end) <= most
        if end % group and end < len(tokens):
            first = end // group * group
            assert size(first, min(first + group, len(tokens))) > most, "a group that fits is whole"
        if end < len(tokens):
            unit = 1 if end % group or (end + 1 not in starts and size(end, end + group) > most) else group
            assert size(start, min(end + unit, len(tokens))) > most, "as few parts as there can be in this order"


@pytest.mark.parametrize("policy_logits", ["conditional", "guided"])
def test_tokens_are_counted_as_a_pass_lays_them_out(samples: tuple[Policy, RolloutChunk], policy_logits: str) -> None:
    policy, rollout = samples
    cfg = config(policy_logits=policy_logits)
    alone, more = counts_of(policy, rollout, cfg)
    for start, end in [(0, 12), (0, 1), (2, 7), (3, 6), (11, 12)]:
        rows = _sequences(policy, rollout[start:end], policy.prompt_encoder(PromptFormat()), cfg, STREAMS)
        ids, _, _ = policy.lay_out(sequences_of(rows))
        assert alone[start] + sum(more[start + 1 : end]) == len(ids)


def step(policy: Policy, rollout: RolloutChunk, A: Tensor, cfg: Config) -> tuple[list[int], Tensor, list[Tensor]]:
    """Samples of each micro-batch; what the step says, in float32, and the weights it leaves."""
    policy, encoder = copy.deepcopy(policy), policy.prompt_encoder(PromptFormat())
    parts, ref = micro_batches_of(policy, rollout, encoder, cfg), None
    if cfg.kl_streams:
        reference = double_policy(0)
        ref = reference_logprobs(reference, parts, encoder, cfg, reference_passes(reference, rollout, encoder, cfg))
    optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
    metrics = update(policy, optimizer, parts, A, ref, encoder, cfg, ALONE)
    return [len(p) for p in parts], torch.stack([metrics[k].float() for k in sorted(metrics)]), optimizer.parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_truncated_completions": True, "num_iterations": 2, "importance_sampling_level": "sequence"},
        {"policy_logits": "guided", "importance_sampling_correction": True},
        {"beta": {"text": 0.1, "image": 0.0}},
        {"beta": 0.0, "loss_type": "grpo"},
    ],
    ids=["masked", "guided", "text alone", "dull groups"],
)
def test_a_step_does_not_depend_on_the_cut(samples: tuple[Policy, RolloutChunk], changes: dict[str, Any]) -> None:
    """Nor do the weights: with parts of one sample, of a part of a group, of groups, and of all samples."""
    policy, rollout = samples
    cfg = config(adam_epsilon=1e-3, **changes)
    A = DULL_SECOND_AND_THIRD if cfg.beta == 0.0 else torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    _, *expected = step(policy, rollout, A, cfg)
    alone, more = counts_of(policy, rollout, cfg)
    group = max(alone[i] + sum(more[i + 1 : i + G]) for i in range(0, 12, G))
    cuts = set()
    for most in (1, group - 1, group, 10 * group):
        sizes, *found = step(policy, rollout, A, replace(cfg, micro_batch_tokens=most))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-10)
        cuts.add(tuple(sizes))
    assert {(1,) * 12, (12,)} < cuts and any(size % G for size in cuts - {(1,) * 12} for size in size)


def test_four_micro_batches_pass_through_the_reference_at_once(samples: tuple[Policy, RolloutChunk]) -> None:
    _, rollout = samples
    reference, cfg = tiny_policy(layers=6), config(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    encoder, found, launches = reference.prompt_encoder(PromptFormat()), [], []
    most = max(counts_of(reference, rollout, cfg)[0]) * G
    for chosen in (cfg, replace(cfg, micro_batch_tokens=most)):
        parts = micro_batches_of(reference, rollout, encoder, cfg)
        passes = reference_passes(reference, rollout, encoder, chosen)
        with Operators() as ran:
            found.append(reference_logprobs(reference, parts, encoder, chosen, passes))
        launches.append(ran.names.total())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert passes is not None and len(parts) == 4 and len(passes) == 1, "six layers train in the memory of four passes"
    assert launches[1] < launches[0] / 3.5


def test_auto_is_null_without_a_gpu() -> None:
    cfg = config(micro_batch_tokens="auto", gradient_checkpointing="auto")
    assert settle(cfg, ALONE)[0] == replace(cfg, micro_batch_tokens=None, gradient_checkpointing=False)
