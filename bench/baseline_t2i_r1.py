"""The published T2I-R1 algorithm, written plainly on transformers: what bicot's step is measured against.

It takes one micro-batch (per_device_train_batch_size prompts, one as published) after the other. `generate` writes the
plans of G samples a prompt. A Python loop draws the pictures with a DynamicCache, two sequences per picture, also
without guidance. The VQ model decodes them, and every reward scores them one at a time, in series. Policy and reference
model each take two padded passes, text and image. As published, both passes run the text head over every position and
drop those logits; the text pass computes them again. Log-softmax is computed for one sequence at a time.

In three points it is faster than the published code: pictures reach the rewards as tensors, not through PIL;
activations are recomputed only if `gradient_checkpointing` is true (there, always); all micro-batches are drawn before
the first is trained on, so no graph of a forward pass is kept while pictures are drawn. The published loss divides by
the tokens of each micro-batch and averages (loss_type bnpo); dapo, which divides by those of the whole step, is here
too.

Shapes: S samples of a micro-batch, P longest prompt, C longest plan, T image tokens, V a vocabulary.
Source: github.com/CaraJ7/T2I-R1, src/t2i-r1/src/open_r1/trainer/grpo_trainer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.metrics import Phases
from ..grpo.optim import MasterAdamW
from ..model.body import Norm
from ..model.chunk import RolloutChunk
from ..model.policy import Policy
from ..model.prompts import PromptEncoder
from ..rewards.base import Example, Reward

# The published code has these defaults of Config, and cannot be told otherwise.
FIXED = ["temperature", "top_p", "image_temperature", "image_top_k", "image_top_p", "reward_weights", "scale_rewards"]
FIXED += ["multi_objective_aggregation", "kl_estimator", "use_bias_correction_kl", "policy_logits", "entropy_coef"]
FIXED += ["token_weights", "num_iterations", "importance_sampling_correction"]


@contextmanager
def transformers_norms(*policies: Policy | None) -> Iterator[None]:
    """Inside, the norms of these policies are transformers' own, without bicot's kernel."""
    norms: list[nn.Module] = [
        module for policy in policies if policy for module in policy.decoder.modules() if isinstance(module, Norm)
    ]
    for norm in norms:
        norm.__class__ = LlamaRMSNorm
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = Norm


class Rollout(NamedTuple):
    """S samples: ids of both prompts, of the plan up to its first EOS, image tokens [S, T], pictures [S, 3, H, W]."""

    prompts: list[list[int]]
    plans: list[list[int]]
    image_prompts: list[list[int]]
    image_tokens: Tensor
    images: Tensor

    @classmethod
    def of(cls, chunk: RolloutChunk) -> Rollout:
        """Take the samples from a rollout of our engine."""
        prompts, plans, image_prompts = (x.tolist() for x in (chunk.prompts, chunk.plans, chunk.image_prompts))
        return cls(prompts, plans, image_prompts, chunk.image_tokens, chunk.images)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that train."""
        return sum(map(len, self.plans)) + self.image_tokens.numel()


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both int64 [S, longest]."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    pad_to_longest = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
    mask = pad_to_longest([torch.ones_like(row) for row in ids])
    return pad_to_longest(ids, padding_value=pad).to(device), mask.to(device)


@torch.no_grad()
def write_plans(policy: Policy, prompts: Sequence[Sequence[int]], config: Config) -> list[list[int]]:
    """Stage 1: write plans, which end with their first EOS."""
    eos = policy.tokenizer.eos_token_id
    ids, mask = padded(prompts, policy.tokenizer.pad_token_id, policy.device, left=True)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": config.top_k}
    drawn = policy.model.generate(
        ids,
        attention_mask=mask,
        max_length=ids.shape[1] + config.max_completion_length,
        bos_token_id=policy.tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos,
        **sampling,
    )
    plans = drawn[:, ids.shape[1] :].tolist()
    return [plan[: plan.index(eos) + 1] if eos in plan else plan for plan in plans]


@torch.no_grad()
def draw(
    policy: Policy, prompts: Sequence[Sequence[int]], encoder: PromptEncoder, config: Config, length: int | None = None
) -> Tensor:
    """Stage 2: draw image tokens [S, T], or only the first `length`."""
    rows = [row for prompt in prompts for row in (prompt, encoder.unconditional_ids(len(prompt)))]
    ids, mask = padded(rows, policy.tokenizer.pad_token_id, policy.device, left=True)
    embeds, cache, drawn = policy.embed_text(ids), DynamicCache(), []
    for _ in range(length or policy.num_image_tokens):
        output = policy.decoder(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = policy.model.model.generation_head(output.last_hidden_state[:, -1])
        cond, uncond = logits[0::2], logits[1::2]
        logits = uncond + config.cfg_weight * (cond - uncond)
        token = torch.multinomial(logits.softmax(-1, dtype=torch.float32), 1)
        drawn.append(token)
        embeds = policy.embed_image(token.repeat_interleave(2, 0))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(drawn, 1)


@torch.no_grad()
def decode(policy: Policy, tokens: Tensor) -> Tensor:
    """Decode image tokens [S, T] to pictures [S, 3, H, W], float32 in [0, 1]."""
    return policy.model.model.vqmodel.decode(tokens).float().add(1).div(2).clamp(0, 1)


@torch.no_grad()
def score(rewards: Sequence[Reward], images: Tensor, examples: Sequence[Example]) -> Tensor:
    """Score one picture and one reward after the other -> [S, R]."""
    columns = [
        torch.cat([reward.score(images[i : i + 1], [example]) for i, example in enumerate(examples)])
        for reward in rewards
    ]
    return torch.stack(columns, 1)


def hidden_states(policy: Policy, embeds: Tensor, mask: Tensor) -> Tensor:
    """Run the causal language model, [S, L, D] -> [S, L, D]. As published, it computes logits that are not used."""
    hidden = policy.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    policy.model.lm_head(hidden)
    return hidden


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [S, L] of targets [S, L] by logits [S, L, V]."""
    rows = [
        row.log_softmax(-1, dtype=torch.promote_types(row.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows)


def logprobs(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs [S, C + T] of plan and picture, and the mask of the tokens that were drawn."""
    pad, device = policy.tokenizer.pad_token_id, policy.device
    prompt_ids, prompt_mask = padded(rollout.prompts, pad, device, left=True)
    plan_ids, plan_mask = padded(rollout.plans, pad, device, left=False)
    ids, mask = torch.cat([prompt_ids, plan_ids], 1), torch.cat([prompt_mask, plan_mask], 1)
    text_logits = policy.model.lm_head(hidden_states(policy, policy.embed_text(ids), mask))
    text = token_logprobs(text_logits[:, :-1], ids[:, 1:])[:, prompt_ids.shape[1] - 1 :]

    tokens = rollout.image_tokens
    ids, mask = padded(rollout.image_prompts, pad, device, left=True)
    embeds = torch.cat([policy.embed_text(ids), policy.embed_image(tokens)], 1)
    hidden = hidden_states(policy, embeds, torch.cat([mask, torch.ones_like(tokens)], 1))
    image_logits = policy.model.model.generation_head(hidden[:, -tokens.shape[1] - 1 :])
    image = token_logprobs(image_logits[:, :-1], tokens)
    return torch.cat([text, image], 1), torch.cat([plan_mask, torch.ones_like(tokens)], 1)


def baseline_loss(
    policy: Policy,
    reference: Policy | None,
    rollout: Rollout,
    rewards: Tensor,
    config: Config,
    *,
    num_tokens: int | None = None,
    phases: Phases | None = None,
) -> Tensor:
    """Return the loss of a micro-batch of whole groups, ready for `backward`.

    Args:
        reference: not used if beta is 0.
        rewards: [S, R], without missing ones.
        num_tokens: the loss is divided by it; None = the tokens of this micro-batch.

    Raises:
        ValueError: a setting that the published code does not have, or a missing reward.
    """
    different = [f"{name}={value}" for name in FIXED if (value := getattr(config, name)) != getattr(Config, name)]
    beta = config.beta
    if isinstance(beta, dict):
        raise ValueError(f"not the published algorithm: beta={beta}")
    if different or config.loss_type not in ("dapo", "bnpo"):
        raise ValueError(f"not the published algorithm: {different or config.loss_type}")
    if rewards.isnan().any():
        raise ValueError("a reward does not apply to a sample; the published code has no missing rewards")
    phases = phases or Phases([], policy.device)
    groups = rewards.sum(1).view(-1, config.num_generations)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    policy.recompute(config.gradient_checkpointing)
    policy.model.train(config.gradient_checkpointing is True)
    with phases("train"):
        logp, mask = logprobs(policy, rollout)
    loss = -(logp - logp.detach()).exp() * advantages.to(logp)
    if beta:
        assert reference is not None
        with phases("reference"), torch.no_grad():
            ref, _ = logprobs(reference, rollout)
        loss = loss + beta * ((ref - logp).exp() - (ref - logp) - 1)
    return (loss * mask).sum() / (num_tokens or rollout.num_tokens)


def baseline_step(
    policy: Policy,
    reference: Policy | None,
    optimizer: MasterAdamW,
    encoder: PromptEncoder,
    rewards: Sequence[Reward],
    examples: Sequence[Example],
    config: Config,
    seed: int,
    phases: Phases,
) -> list[Rollout]:
    """Take one step on these prompts -> its micro-batches."""
    torch.manual_seed(seed)
    policy.model.eval()
    parts, scores = [], []
    for start in range(0, len(examples), config.per_device_train_batch_size):
        few = examples[start : start + config.per_device_train_batch_size]
        each = [example for example in few for _ in range(config.num_generations)]
        prompts = [encoder.plan_ids(example.prompt, config.max_completion_length) for example in each]
        with phases("plan"):
            plans = write_plans(policy, prompts, config)
            texts = map(encoder.decode_plan, plans)
            room = policy.num_image_tokens
            image_prompts = [encoder.image_ids(e.prompt, text, room) for e, text in zip(each, texts, strict=True)]
        with phases("draw"):
            tokens = draw(policy, image_prompts, encoder, config)
        with phases("decode"):
            images = decode(policy, tokens)
        with phases("reward"):
            scores.append(score(rewards, images, each))
        parts.append(Rollout(prompts, plans, image_prompts, tokens, images))
    total = sum(part.num_tokens for part in parts)
    for part, scored in zip(parts, scores, strict=True):
        count = len(parts) * part.num_tokens if config.loss_type == "bnpo" else total
        loss = baseline_loss(policy, reference, part, scored, config, num_tokens=count, phases=phases)
        with phases("train"):
            optimizer.collect()  # adds the gradients of the micro-batch before
            loss.backward()
    with phases("train"):
        optimizer.step(Ranks(0, 1, policy.device))
        optimizer.schedule.step()
    policy.model.eval()
    return parts
