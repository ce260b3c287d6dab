"""Small rollouts and updates in float64, and the same update written plainly from the formulas, sample by sample."""

from __future__ import annotations

import torch
from tiny import tiny_policy
from torch import Tensor

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.distributed import Ranks
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.step import reference_logprobs, split, update
from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.policy import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import Sampling

ALONE = Ranks(0, 1, torch.device("cpu"))
FORMAT = PromptFormat("t2i_r1", "", "plan {}")
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


def move(policy: Policy, by: float = 0.01) -> Policy:
    """Move the weights that train, so that a KL to what they were counts -> the same policy."""
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype).to(p.device))
    return policy


def frozen_rollout(policy: Policy, cfg: Config) -> RolloutChunk:
    engine = RolloutEngine(policy, policy.prompt_encoder(FORMAT))
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


def our_step(
    policy: Policy,
    rollout: RolloutChunk,
    A: Tensor,
    cfg: Config,
    reference: Policy | None = None,
    optimizer: MasterAdamW | None = None,
) -> dict[str, Tensor]:
    """The update that is tested -> its metrics. The KL is to `reference`, or to `double_policy(0)`."""
    encoder, parts = policy.prompt_encoder(FORMAT), split(rollout, cfg)
    ref = reference_logprobs(reference or double_policy(0), parts, encoder, cfg) if cfg.kl_streams else None
    optimizer = optimizer or MasterAdamW(policy.trainable_parameters(), cfg)
    return update(policy, optimizer, parts, A, ref, encoder, cfg, ALONE)


def apply_gradient(optimizer: MasterAdamW, gradient: Tensor) -> None:
    """Update the first parameter by this gradient."""
    optimizer.parameters[0].grad = gradient
    optimizer.step(ALONE)
