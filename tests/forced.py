"""Rollouts of a policy, and what transformers computes for their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bicot.model.chunk import RolloutChunk
from bicot.model.engine import RolloutEngine
from bicot.model.policy import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import Sampling
from bicot.model.weights import Weights

FORMAT = PromptFormat("t2i_r1", "", "plan {}")
PROMPTS = ["a red circle", "two blue square and a circle of w1 w2 w3", "w3"]
TOLERANCE = 1e-4  # float32 log-probs and pixels
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GREEDY = Sampling(max_completion_length=6, temperature=0, image_temperature=0, cfg_weight=1.0)


def engine_of(policy: Policy, **options: Any) -> RolloutEngine:
    return RolloutEngine(policy, policy.prompt_encoder(FORMAT), **options)


def draw(
    engine: RolloutEngine, prompts: Sequence[str], group_size: int, sampling: Sampling, seed: int = 11, **more: Any
) -> RolloutChunk:
    return RolloutChunk.cat(list(engine.generate(prompts, group_size, sampling, seed, **more)))


def rollout(
    policy: Policy, prompts: Sequence[str], group_size: int, sampling: Sampling, max_rows: int = 512, **options: Any
) -> RolloutChunk:
    return draw(engine_of(policy, max_rows=max_rows, **options), prompts, group_size, sampling)


def greedy(engine: RolloutEngine, prompts: Sequence[str] = PROMPTS) -> RolloutChunk:
    return draw(engine, prompts, 1, GREEDY, seed=0)


def assert_same(a: RolloutChunk, b: RolloutChunk) -> None:
    """The same tokens, and log-probs up to the rounding of differently shaped products."""
    assert torch.equal(a.plans.offsets, b.plans.offsets) and torch.equal(a.plans.values, b.plans.values)
    assert torch.equal(a.image_tokens, b.image_tokens)
    for name in ("image_logprobs", "guided_logprobs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(a.plan_logprobs.values, b.plan_logprobs.values, atol=TOLERANCE, rtol=0)


def numbers(chunk: RolloutChunk) -> Tensor:
    """All that depends on the weights, flat, float32."""
    columns = (chunk.plan_logprobs.values, chunk.image_logprobs, chunk.images, chunk.plans.values, chunk.image_tokens)
    return torch.cat([column.flatten().float() for column in columns])


def addresses(weights: Weights) -> list[int]:
    """Where everything lies that decoding reads."""
    tensors = [source.tensor for source in weights._sources] + [weights.embed_image]
    tensors += list(weights.image_decoder.model.parameters())
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def copied(weights: Weights) -> list[str]:
    """The modules whose weights are copies."""
    return [name for source in weights._sources if source.copied for name in source.names]


def text_hidden(policy: Policy, prompts: Sequence[Sequence[int]], plans: Sequence[Sequence[int]]) -> Tensor:
    """The hidden states that predict each plan token, packed."""
    return policy.hidden((prompts, plans))[0]


def image_hidden(policy: Policy, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """The image head's features that predict each image token, packed: tokens [S, T] -> [S·T, D]."""
    return policy.image_features(policy.hidden((prompts, policy.image_ids(tokens.tolist())))[0])


@torch.no_grad()
def gap(chunk: RolloutChunk, policy: Policy) -> float:
    """Largest difference of a greedy rollout's log-probs and pictures from transformers' own, each sample alone.

    Infinite where a token is not the one that transformers' greedy `generate` would draw.
    """
    pictures = policy.model.model.vqmodel.decode(chunk.image_tokens)
    differences = [chunk.images - ((pictures + 1) / 2).clamp(0, 1)]
    for s, plan_logprobs in enumerate(chunk.plan_logprobs.unpack()):
        prompt, plan = chunk.prompts.tolist()[s], torch.tensor(chunk.plans.tolist()[s])
        text = policy.model(input_ids=torch.tensor([[*prompt, *plan.tolist()]])).logits[0, len(prompt) - 1 : -1]
        ids, tokens = chunk.image_prompts.tolist()[s], chunk.image_tokens[s]
        embeds = torch.cat([policy.embed_text(torch.tensor(ids)), policy.embed_image(tokens)])
        hidden = policy.decoder(inputs_embeds=embeds[None])[0][0, len(ids) - 1 : -1]
        image = policy.model.model.generation_head(hidden)
        for logits, drawn, recorded in ((text, plan, plan_logprobs), (image, tokens, chunk.image_logprobs[s])):
            if not torch.equal(logits.argmax(-1), drawn):
                return math.inf
            differences.append(recorded - logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0])
    return max(difference.abs().max().item() for difference in differences)


def text_loss(policy: Policy) -> Tensor:
    """Uses every part of the language model."""
    return policy.model(input_ids=torch.tensor([[0, 8, 9, 10, 11]])).logits.log_softmax(-1)[0, :, 3].sum()
