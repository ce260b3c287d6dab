"""Weights of tokens that another policy drew, masks of samples and plans, ratios of sequences: by a plain formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from stepping import FORMAT, config, double_policy, frozen_rollout, move, our_step, plain_logprobs
from torch import Tensor

from bicot.grpo.config import Config
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import token_streams
from bicot.model.chunk import RolloutChunk
from bicot.model.policy import Policy

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def drawn(cfg: Config) -> tuple[Policy, RolloutChunk, Tensor]:
    """A policy that has moved since it drew, its samples, and their advantages."""
    policy = double_policy(0)
    rollout = frozen_rollout(policy, cfg)
    return move(policy, 0.02), rollout, torch.linspace(-1, 1.3, len(rollout), dtype=torch.float64)


def plain(policy: Policy, rollout: RolloutChunk, A: Tensor, cfg: Config) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradient norm by Σ n·[β·k3 - c·A·ratio], sample by sample; and the weights c of each."""
    reference, weights, terms = double_policy(0), [], []
    for s in range(len(rollout)):
        lp = plain_logprobs(policy.model, rollout, s, None)
        with torch.no_grad():
            ref = plain_logprobs(reference.model, rollout, s, None)
        sampled = torch.cat([rollout.plan_logprobs.unpack()[s], rollout.image_logprobs[s]]).double()
        gap, plan = ref - lp, len(rollout.plans.unpack()[s])
        trains = torch.arange(len(lp)) >= (plan if cfg.mask_truncated_completions and rollout.truncated[s] else 0)
        c, moved = torch.ones_like(ref), (lp.detach() - sampled)[trains]
        if cfg.importance_sampling_correction:
            d = moved.sum() if "sequence" in cfg.importance_sampling_mode else lp.detach() - sampled
            c = c * d.exp()
            high = c > cfg.importance_sampling_clip_max
            c = c.masked_fill(high, 0 if "mask" in cfg.importance_sampling_mode else cfg.importance_sampling_clip_max)
        if cfg.off_policy_mask_threshold is not None and A[s] < 0 and -moved.mean() > cfg.off_policy_mask_threshold:
            c = 0 * c
        term = cfg.beta * (gap.exp() - gap - 1) - c * A[s] * (lp - lp.detach()).exp()
        terms.append(term[trains])
        weights.append(c)
    each = [len(term) for term in terms]
    if cfg.loss_type == "grpo":
        loss = sum((t.sum() / n / len(terms) for t, n in zip(terms, each, strict=True)), torch.zeros(()))
    else:
        loss = sum((t.sum() / sum(each) for t in terms), torch.zeros(()))
    grads = torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
    return [loss.detach(), torch.nn.utils.get_total_norm([g for g in grads if g is not None])], weights


def assert_equal(cfg: Config) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A step of ours is the plain one -> its metrics, and the plain weights."""
    policy, rollout, A = drawn(cfg)
    expected, weights = plain(policy, rollout, A, cfg)
    metrics = our_step(policy, rollout, A, cfg)
    found = [metrics[key].double() for key in ("loss", "grad_norm")]
    torch.testing.assert_close(found, [e.double() for e in expected], atol=1e-6, rtol=1e-5)
    return metrics, weights


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_its_formula(mode: str, beta: float) -> None:
    most = 1.05
    more = dict(importance_sampling_correction=True, importance_sampling_clip_max=most, importance_sampling_mode=mode)
    _, weights = assert_equal(config(beta=beta, **more))
    c = torch.stack([torch.stack([w.min(), w.max()]) for w in weights])
    assert c.max() <= most and (c.min() == 0) == ("mask" in mode)
    assert (c[:, 0] == c[:, 1]).all() == ("sequence" in mode)
    each = torch.cat(weights)
    assert ((each != 0) & (each < 1)).any(), "some are not at the bound"


@pytest.mark.parametrize("mode", [None, "token_mask", "sequence_truncate"])
def test_off_policy_samples_with_negative_advantages_are_masked(mode: str | None) -> None:
    more = dict(importance_sampling_correction=mode is not None, importance_sampling_mode=mode or "token_truncate")
    _, before = assert_equal(config(**more))
    most = 3.0 if mode else 0.9  # which bounds ratios alone
    metrics, weights = assert_equal(config(off_policy_mask_threshold=0.001, importance_sampling_clip_max=most, **more))
    masked = [bool((w == 0).all()) for w in weights]
    assert 0 < sum(masked) < 6 and not any(masked[6:]), "of the first six, whose advantages are negative"
    if mode is None:  # then the weights are these masks
        image = 1 - sum(masked) / len(masked)
        assert metrics["image/sampling_ratio"].item() == pytest.approx(image, abs=1e-6)
    assert not any((w == 0).all() for w in before)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_truncated_plans_are_left_out_of_the_loss(loss_type: str, beta: float) -> None:
    more = dict(loss_type=loss_type, beta=beta, max_completion_length=6, importance_sampling_correction=True)
    more["importance_sampling_mode"] = "sequence_truncate"
    _, rollout, _ = drawn(config(**more))
    assert 0 < rollout.truncated.sum() < len(rollout)
    whole, masked = (assert_equal(config(mask_truncated_completions=mask, **more))[0] for mask in (False, True))
    assert abs(whole["loss"] / masked["loss"] - 1) > 1e-3 and whole["image/entropy"] == masked["image/entropy"]


def test_pictures_train_alone_if_all_plans_are_truncated() -> None:
    """And the text head still has a gradient, of 0, for ranks whose plans ended."""
    cfg = config(beta=0.0, max_completion_length=1, mask_truncated_completions=True, max_grad_norm=1e9)
    policy, rollout, A = drawn(cfg)
    rollout = replace(rollout, truncated=torch.ones_like(rollout.truncated))
    text, image = token_streams(policy, rollout, policy.prompt_encoder(FORMAT), cfg)
    assert len(text.targets) == 0 and len(image.targets) == rollout.image_tokens.numel()
    before = policy.text_head.weight.detach().clone()
    optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
    found = our_step(policy, rollout, A, cfg, optimizer=optimizer)
    assert found["grad_norm"] > 0 and torch.equal(policy.text_head.weight, before)
    assert any(policy.text_head.weight is p for p in optimizer.adamw.state)


def test_ratios_of_sequences_train_as_gspo() -> None:
    more = dict(num_iterations=2, learning_rate=0.05, beta=0.0)
    kinds = {"gspo": {"loss_type": "gspo"}, "grpo": {"loss_type": "grpo"}}
    kinds["sequence"] = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    found = {}
    for name, kind in kinds.items():
        cfg = config(**kind, **more)
        found[name] = our_step(*drawn(cfg), cfg)["loss"].item()
    assert found["gspo"] == found["sequence"] != found["grpo"] and math.isfinite(found["grpo"])
