"""A full update against an independent one, written plainly from the formulas, sample by sample."""

from __future__ import annotations

import copy

import pytest
import torch
from stepping import FORMAT, G, config, double_policy, frozen_rollout, move, our_step, plain_step
from torch import Tensor

from bicot.grpo.config import Config
from bicot.grpo.step import reference_logprobs, split, token_streams
from bicot.kernels.group_advantages import group_advantages
from bicot.model.adapters import add_lora
from bicot.model.policy import PUBLISHED_FREEZE, Policy


def assert_plain_step(policy: Policy, reference: Policy, cfg: Config, ours: Policy) -> Tensor:
    """A step of `policy` equals the plain one -> its gradient norm. The KL is to `reference`; our step uses `ours`."""
    rollout = frozen_rollout(policy, cfg)
    rewards = torch.randn(len(rollout), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain, advantages = copy.deepcopy(policy), group_advantages(rewards, G)
    expected = plain_step(plain, reference, rollout, rewards, cfg)
    assert len(split(rollout, cfg)) == 2
    metrics = our_step(policy, rollout, advantages, cfg, ours)
    torch.testing.assert_close(advantages, expected["advantages"], atol=1e-9, rtol=0)
    for key in ("loss", "kl", "grad_norm"):
        torch.testing.assert_close(metrics[key].double(), expected[key].double(), atol=1e-6, rtol=1e-6)
    assert expected["kl"] > 1e-3, "the KL takes part"
    for (name, a), b in zip(policy.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    return expected["grad_norm"]


@pytest.mark.parametrize(
    ("policy_logits", "detach_uncond"), [("conditional", False), ("guided", False), ("guided", True)]
)
def test_update_equals_the_plain_step(policy_logits: str, detach_uncond: bool) -> None:
    cfg = config(policy_logits=policy_logits, detach_uncond=detach_uncond)
    policy, reference = move(double_policy(0)), double_policy(0)
    assert assert_plain_step(policy, reference, cfg, reference) > cfg.max_grad_norm, "clipping takes part"
    pairs = zip(policy.trainable_parameters(), reference.trainable_parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) > 0.5 * cfg.learning_rate


def test_a_lora_step_equals_one_of_peft_and_torch() -> None:
    """The reference is the model that the adapters started from."""
    pytest.importorskip("peft")
    cfg = config()
    policy, reference = double_policy(0), double_policy(0)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    policy.adapters = add_lora(policy.model, 4, 8, 0.0, targets, PUBLISHED_FREEZE).eval()
    move(policy)
    parts, encoder = split(frozen_rollout(policy, cfg), cfg), policy.prompt_encoder(FORMAT)
    own, base = (reference_logprobs(each, parts, encoder, cfg) for each in (policy, reference))
    torch.testing.assert_close(own, base, atol=1e-12, rtol=0)
    before = [p.detach().clone() for p in policy.model.parameters()]
    assert_plain_step(policy, reference, cfg, policy)
    pairs = zip(policy.model.named_parameters(), before, strict=True)
    moved = [name for (name, now), was in pairs if not torch.equal(now, was)]
    assert len(moved) == len(policy.trainable_parameters()) == 2 * (2 * 5 + 1) and all("lora_" in n for n in moved)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "cispo", "dr_grpo", "bnpo"])
def test_micro_batches_do_not_change_the_step(loss_type: str) -> None:
    """Losses divide by counts of the step; bnpo by those of each micro-batch."""
    results = []
    for size in (1, 2, 4):
        cfg = config(loss_type=loss_type, per_device_train_batch_size=size, epsilon_high=5.0, beta=0.0)
        policy = double_policy(0)
        rollout = frozen_rollout(policy, cfg)
        metrics = our_step(policy, rollout, torch.linspace(-1, 1, len(rollout), dtype=torch.float64), cfg)
        results.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
    # transformers' norm rounds to float32, once for the samples of a micro-batch that share a prompt
    same = all(torch.allclose(r, results[0], rtol=1e-8, atol=1e-12) for r in results)
    assert same == (loss_type != "bnpo")


def test_two_iterations_take_the_ratio_against_the_first() -> None:
    cfg = config(num_iterations=2, importance_sampling_correction=True, learning_rate=0.05)
    policy = double_policy(0)
    rollout = frozen_rollout(policy, cfg)
    metrics = our_step(policy, rollout, torch.linspace(-1, 1, len(rollout)), cfg)
    assert metrics["text/ratio_max"] > 1.01, "the second iteration is off the first"
    # recorded log-probs are those of the first iteration's policy, so the correction stays at 1
    torch.testing.assert_close(metrics["image/sampling_ratio"].float(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_guided_streams_carry_the_guided_logprobs() -> None:
    cfg = config(policy_logits="guided", importance_sampling_correction=True)
    policy = double_policy(0)
    _, image = token_streams(policy, frozen_rollout(policy, cfg), policy.prompt_encoder(FORMAT), cfg)
    recorded = image.sampling_logprob
    assert recorded is not None
    torch.testing.assert_close(image.stats().logprob, recorded.to(torch.float64), atol=1e-5, rtol=0)
