"""A full update against an independent one, written plainly from the formulas, sample by sample."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_policy
from torch import Tensor

from bicot.grpo import optim
from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import reference_logprobs, split, token_streams, update
from bicot.kernels.group_advantages import group_advantages
from bicot.model.adapters import add_lora
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.policy import PUBLISHED_FREEZE, Policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import Sampling

ALONE = Ranks(0, 1, torch.device("cpu"))
PROMPTS = ["a red circle", "two blue square and a circle of w1 w2", "w3", "a w7 w8"]
G = 3


def config(**changes: object) -> Config:
    base = dict(
        dtype="float32", num_generations=G, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_completion_length=9, top_k=0, cfg_weight=2.0, beta=0.1, learning_rate=1e-3, lr_scheduler_type="constant",
        max_grad_norm=0.5, rewards=RewardConfig("scene"), max_steps=4,
    )  # fmt: skip
    return Config(**{**base, **changes})  # type: ignore[arg-type]


def double_policy(seed: int) -> Policy:
    policy = tiny_policy(seed=seed)
    policy.model.double()
    return policy


def frozen_rollout(policy: Policy, cfg: Config) -> RolloutChunk:
    engine = RolloutEngine(policy, policy.prompt_encoder(PromptFormat("t2i_r1", "", "plan {}")))
    sampling = Sampling(max_completion_length=cfg.max_completion_length, top_k=0, cfg_weight=cfg.cfg_weight)
    return RolloutChunk.cat(list(engine.generate(PROMPTS, G, sampling, seed=5)))


def plain_logprobs(
    model: torch.nn.Module, rollout: RolloutChunk, s: int, w: float | None, detach_uncond: bool = False
) -> Tensor:
    """Log-probs of all tokens of sample s: [plan; image]. w: guided image logits."""
    prompt, plan = rollout.prompts.tolist()[s], rollout.plans.tolist()[s]
    logits = model(input_ids=torch.tensor([prompt + plan])).logits[0, len(prompt) - 1 : len(prompt) + len(plan) - 1]
    text = logits.log_softmax(-1)[torch.arange(len(plan)), plan]
    ids, tokens = rollout.image_prompts.tolist()[s], rollout.image_tokens[s]

    def image_logits(row: list[int]) -> Tensor:
        words = model.get_input_embeddings()(torch.tensor([row]))
        embeds = torch.cat([words, model.prepare_embeddings_for_image_generation(tokens[None])], dim=1)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[0, len(row) - 1 : -1]
        return model.model.generation_head(hidden)

    logits = image_logits(ids)
    if w is not None:
        uncond = image_logits([ids[0]] + [2] * (len(ids) - 2) + [ids[-1]])
        uncond = uncond.detach() if detach_uncond else uncond
        logits = uncond + w * (logits - uncond)
    image = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    return torch.cat([text, image])


def plain_step(
    policy: Policy, reference: Policy, rollout: RolloutChunk, rewards: Tensor, cfg: Config
) -> dict[str, Tensor]:
    """GRPO from its formula: A = (r - mean) / (std + 1e-4); loss = -(1/N) Σ [ratio·A - β·k3]; clip; AdamW."""
    total = rewards.sum(1)
    advantages = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in total.split(G)])
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    w = cfg.cfg_weight if cfg.policy_logits == "guided" else None
    loss, kl_sum, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for s in range(len(rollout)):
        logp = plain_logprobs(policy.model, rollout, s, w, cfg.detach_uncond)
        with torch.no_grad():
            ref = plain_logprobs(reference.model, rollout, s, w)
        k3 = (ref - logp).exp() - (ref - logp) - 1
        ratio = (logp - logp.detach()).exp()
        loss = loss - (ratio * advantages[s] - cfg.beta * k3).sum()
        kl_sum, count = kl_sum + k3.detach().sum(), count + len(logp)
    loss = loss / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    adamw.step()
    return {"advantages": advantages, "loss": loss.detach(), "kl": kl_sum / count, "grad_norm": norm}


@pytest.mark.parametrize(
    ("policy_logits", "detach_uncond"), [("conditional", False), ("guided", False), ("guided", True)]
)
def test_update_equals_the_plain_step(policy_logits: str, detach_uncond: bool) -> None:
    cfg = config(policy_logits=policy_logits, detach_uncond=detach_uncond)
    policy, reference = double_policy(0), double_policy(0)
    with torch.no_grad():  # a policy that has moved from its reference, so that the KL counts
        for p in policy.trainable_parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    rollout = frozen_rollout(policy, cfg)
    rewards = torch.randn(len(rollout), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = copy.deepcopy(policy)
    expected = plain_step(plain, reference, rollout, rewards, cfg)

    encoder = policy.prompt_encoder(PromptFormat("t2i_r1", "", "plan {}"))
    advantages = group_advantages(rewards, G)
    parts = split(rollout, cfg)
    assert len(parts) == 2
    ref = reference_logprobs(reference, parts, encoder, cfg)
    optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
    metrics = update(policy, optimizer, parts, advantages, ref, encoder, cfg, ALONE)

    torch.testing.assert_close(advantages, expected["advantages"], atol=1e-9, rtol=0)
    for key in ("loss", "kl", "grad_norm"):
        torch.testing.assert_close(metrics[key].double(), expected[key].double(), atol=1e-6, rtol=1e-6)
    assert expected["kl"] > 1e-3 and expected["grad_norm"] > cfg.max_grad_norm, "KL and clipping must take part"
    moved = 0.0
    for (name, a), b in zip(policy.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(policy.trainable_parameters(), reference.trainable_parameters(), strict=True):
        moved = max(moved, (a - b).abs().max().item())
    assert moved > 0.5 * cfg.learning_rate


def test_a_lora_step_equals_one_of_peft_and_torch() -> None:
    """And its reference is the model that the adapters started from."""
    pytest.importorskip("peft")
    cfg = config()
    policy, reference = double_policy(0), double_policy(0)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    policy.adapters = add_lora(policy.model, 4, 8, 0.0, targets, PUBLISHED_FREEZE).eval()
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    rollout = frozen_rollout(policy, cfg)
    rewards = torch.randn(len(rollout), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = copy.deepcopy(policy)
    expected = plain_step(plain, reference, rollout, rewards, cfg)

    encoder, parts = policy.prompt_encoder(PromptFormat("t2i_r1", "", "plan {}")), split(rollout, cfg)
    ref = reference_logprobs(policy, parts, encoder, cfg)
    for own, base in zip(ref, reference_logprobs(reference, parts, encoder, cfg), strict=True):
        torch.testing.assert_close(own, base, atol=1e-12, rtol=0)
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
    metrics = update(policy, optimizer, parts, group_advantages(rewards, G), ref, encoder, cfg, ALONE)
    for key in ("loss", "kl", "grad_norm"):
        torch.testing.assert_close(metrics[key].double(), expected[key].double(), atol=1e-6, rtol=1e-6)
    moved = []
    for (name, a), b, was in zip(policy.model.named_parameters(), plain.model.parameters(), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        moved += [] if torch.equal(a, was) else [name]
    assert len(moved) == len(optimizer.parameters) == 2 * (2 * 5 + 1) and all("lora_" in name for name in moved)


def test_micro_batches_do_not_change_the_step() -> None:
    """dapo, grpo, gspo, cispo and dr_grpo divide by counts of the step; bnpo by those of each micro-batch."""
    for loss_type in ("dapo", "grpo", "gspo", "cispo", "dr_grpo", "bnpo"):
        results = []
        for size in (1, 2, 4):
            cfg = config(loss_type=loss_type, per_device_train_batch_size=size, epsilon_high=5.0, beta=0.0)
            policy = double_policy(0)
            rollout = frozen_rollout(policy, cfg)
            advantages = torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
            encoder = policy.prompt_encoder(PromptFormat())
            optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
            metrics = update(policy, optimizer, split(rollout, cfg), advantages, None, encoder, cfg, ALONE)
            results.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
        # transformers' norm rounds to float32, once for the samples of a micro-batch that share a prompt
        same = all(torch.allclose(r, results[0], rtol=1e-8, atol=1e-12) for r in results)
        assert same == (loss_type != "bnpo"), loss_type


def test_two_iterations_take_the_ratio_against_the_first() -> None:
    cfg = config(num_iterations=2, importance_sampling_correction=True, learning_rate=0.05)
    policy, reference = double_policy(0), double_policy(0)
    rollout = frozen_rollout(policy, cfg)
    parts = split(rollout, cfg)
    encoder = policy.prompt_encoder(PromptFormat())
    ref = reference_logprobs(reference, parts, encoder, cfg)
    optimizer = MasterAdamW(policy.trainable_parameters(), cfg)
    advantages = torch.linspace(-1, 1, len(rollout))
    metrics = update(policy, optimizer, parts, advantages, ref, encoder, cfg, ALONE)
    assert metrics["text/ratio_max"] > 1.01, "the second iteration is off the first"
    # recorded log-probs are those of the first iteration's policy, so the correction stays at 1
    torch.testing.assert_close(metrics["image/sampling_ratio"].float(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_guided_streams_carry_the_guided_logprobs() -> None:
    cfg = config(policy_logits="guided", importance_sampling_correction=True)
    policy = double_policy(0)
    rollout = frozen_rollout(policy, cfg)
    _, image = token_streams(policy, rollout, policy.prompt_encoder(PromptFormat()), cfg)
    recorded = image.sampling_logprob
    assert recorded is not None
    torch.testing.assert_close(image.stats().logprob, recorded.to(torch.float64), atol=1e-5, rtol=0)


def test_a_bfloat16_weight_of_magnitude_one_moves_at_lr_1e_6() -> None:
    cfg = config(dtype="bfloat16", learning_rate=1e-6, max_grad_norm=1e9)
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], cfg)
    for _ in range(4000):
        weight.grad = torch.ones_like(weight)
        optimizer.collect()
        optimizer.step(lambda parameters: None)
    assert optimizer.masters[0].dtype == torch.float32
    # an update of 1e-6 is 16.8 spacings of float32 below 1 and rounds to 17: 1.3 % too far
    torch.testing.assert_close(optimizer.masters[0].data, torch.full((4,), 1 - 4e-3 * 17 / 16.78), atol=1e-6, rtol=0)
    assert (weight < 1).all(), "the model's weight follows its master once the sum is large enough"


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], config(dtype="bfloat16"))
    for value in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        weight.grad = torch.full((1,), value, dtype=torch.bfloat16)
        optimizer.collect()
    assert optimizer.masters[0].grad is not None and optimizer.masters[0].grad.item() == 258


def test_gradients_are_collected_by_few_kernels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of one gradient after another; a parameter may have none in some backward passes."""
    monkeypatch.setattr(optim, "PART", 4000)
    parameters = [torch.nn.Parameter(torch.zeros(n, 10, dtype=torch.bfloat16)) for n in [*[5] * 100, 900, 1, 1]]
    parameters += [torch.nn.Parameter(torch.zeros(3))]  # its own master
    optimizer, draw = MasterAdamW(parameters, config(dtype="bfloat16")), torch.Generator().manual_seed(0)
    expected: list[Tensor | None] = [None] * len(parameters)
    for backward in range(3):
        for i, p in enumerate(parameters[:-1]):
            if (i + backward) % 7:
                p.grad = torch.randn(p.shape, generator=draw).bfloat16()
                before = expected[i]
                expected[i] = p.grad.float() if before is None else before + p.grad.float()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.collect()
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::_foreach_copy_"] == 4 and calls.get("aten::_foreach_add_", 0) <= 4, (
            "5000, 9000 and 20 weights"
        )
        assert all(p.grad is None for p in parameters)
    for master, grad in zip(optimizer.masters, expected, strict=True):
        assert (master.grad is None and grad is None) or torch.equal(master.grad, grad)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW([weight], config())
    weight.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match="the loss diverged"):
        optimizer.step(lambda parameters: None)
    assert torch.equal(weight.data, torch.ones(2))


def test_adamw_8bit_moves_bfloat16_weights_as_float32_does_and_goes_on() -> None:
    """Without masters: by lr 1e-5, a 390th of the spacing of bfloat16 below 1."""
    pytest.importorskip("torchao")
    settings: dict[str, Any] = dict(learning_rate=1e-5, max_grad_norm=1e9, lr_scheduler_type="linear", max_steps=60)

    def train(optim: str, stop: int = 60) -> tuple[torch.nn.Parameter, MasterAdamW]:
        weight = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
        optimizer = MasterAdamW([weight], config(dtype="bfloat16", optim=optim, **settings))
        go_on(weight, optimizer, range(stop))
        return weight, optimizer

    def go_on(weight: torch.nn.Parameter, optimizer: MasterAdamW, steps: range) -> None:
        for step in steps:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            weight.grad = (1 + noise).bfloat16()
            optimizer.collect()
            optimizer.step(lambda parameters: None)
            optimizer.schedule.step()

    weight, optimizer = train("adamw_8bit")
    assert optimizer.masters == [weight]
    moved, exact = weight.detach().double() - 1, train("adamw_torch_fused")[1].masters[0].detach().double() - 1
    # rounding has no bias: six standard errors of the mean over the weights, and 3 % for moments of 8 bits
    bound = 6 * moved.std() / moved.numel() ** 0.5 + 0.03 * exact.mean().abs()
    assert exact.mean() < -1e-4 and (moved.mean() - exact.mean()).abs() < bound

    half, before = train("adamw_8bit", 30)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    again = torch.nn.Parameter(half.detach().clone())
    resumed = MasterAdamW([again], config(dtype="bfloat16", optim="adamw_8bit", **settings))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(1)  # whatever else has drawn numbers
    go_on(again, resumed, range(30, 60))
    assert torch.equal(again, weight)


def test_adamw_8bit_without_torchao_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"optim=adamw_8bit needs torchao: pip install 'bicot\[torchao\]'"):
        MasterAdamW([torch.nn.Parameter(torch.ones(2))], config(optim="adamw_8bit"))
