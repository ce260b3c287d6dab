"""The sampler against transformers, and against itself in other batches."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_policy
from transformers import DynamicCache

from bicot.model.engine import RolloutChunk, RolloutEngine
from bicot.model.policy import Policy
from bicot.model.prompts import PromptFormat
from bicot.model.settings import Sampling

FORMAT = PromptFormat("t2i_r1", "", "plan {}")
PROMPTS = ["a red circle", "two blue square and a circle of w1 w2 w3", "w3"]
TOLERANCE = 1e-4  # float32 log-probs, cached decode against one teacher-forced forward
MODELS = [{"kv_heads": 4}, {"kv_heads": 2, "vocab": 67, "codes": 41}, {"kv_heads": 1, "seed": 3}]


def rollout(
    policy: Policy, prompts: list[str], group_size: int, sampling: Sampling, max_rows: int = 512
) -> RolloutChunk:
    engine = RolloutEngine(policy, policy.prompt_encoder(FORMAT), max_rows=max_rows)
    return RolloutChunk.cat(list(engine.generate(prompts, group_size, sampling, seed=11)))


@pytest.mark.parametrize("options", MODELS)
def test_greedy_tokens_equal_transformers(options: dict[str, int]) -> None:
    policy = tiny_policy(**options)
    sampling = Sampling(max_completion_length=20, temperature=0, image_temperature=0, cfg_weight=3.0)
    chunk = rollout(policy, PROMPTS, 1, sampling)
    model, tokenizer = policy.model, policy.tokenizer
    model.generation_config.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    for s in range(len(PROMPTS)):
        prompt = torch.tensor([chunk.prompts.tolist()[s]])
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=2,
        )
        assert text[0, prompt.shape[1] :].tolist() == chunk.plans.tolist()[s]
        prompt = torch.tensor([chunk.image_prompts.tolist()[s]])
        image = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_mode="image",
            do_sample=False,
            guidance_scale=3.0,
            past_key_values=DynamicCache(),  # its own static cache fails in transformers 5.17
            bos_token_id=0,
            pad_token_id=2,
        )
        assert torch.equal(image[0], chunk.image_tokens[s])


@pytest.mark.parametrize("options", MODELS)
def test_recorded_logprobs_equal_teacher_forcing(options: dict[str, int]) -> None:
    """Each sample alone, unpadded, through the whole transformers model, at the sampling temperatures."""
    policy = tiny_policy(**options)
    w = 2.5
    sampling = Sampling(max_completion_length=12, temperature=0.8, image_temperature=1.3, top_k=9, cfg_weight=w)
    chunk = rollout(policy, PROMPTS, 3, sampling)
    recorded = chunk.plan_logprobs.rows()
    for s in range(len(chunk)):
        prompt, plan = chunk.prompts.tolist()[s], chunk.plans.tolist()[s]
        logits = policy.model(input_ids=torch.tensor([prompt + plan])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(plan)[:, None])[:, 0]
        torch.testing.assert_close(recorded[s], expected, atol=TOLERANCE, rtol=0)

        ids, tokens = chunk.image_prompts.tolist()[s], chunk.image_tokens[s]
        pads = [policy.tokenizer.bos_token_id] + [policy.tokenizer.pad_token_id] * (len(ids) - 2) + [ids[-1]]
        rows = policy.embed_text(torch.tensor([ids, pads]))
        embeds = torch.cat([rows, policy.embed_image(tokens).expand(2, -1, -1)], dim=1)
        hidden = policy.decoder(inputs_embeds=embeds)[0][:, len(ids) - 1 : -1]
        cond, uncond = policy.model.model.generation_head(hidden)
        for logits, got in ((cond, chunk.image_logprobs[s]), (uncond + w * (cond - uncond), chunk.guided_logprobs[s])):
            expected = (logits / 1.3).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_training_forward_equals_recorded_logprobs(policy: Policy) -> None:
    """The ragged, right-padded forward that training uses computes what sampling recorded."""
    chunk = rollout(policy, PROMPTS, 4, Sampling(max_completion_length=12, top_k=0, cfg_weight=2.0))
    hidden = policy.text_hidden(chunk.prompts.tolist(), chunk.plans.tolist())
    logp = (hidden @ policy.text_head.weight.T).log_softmax(-1).gather(1, chunk.plans.values[:, None])[:, 0]
    torch.testing.assert_close(logp, chunk.plan_logprobs.values, atol=TOLERANCE, rtol=0)
    features = policy.image_hidden(chunk.image_prompts.tolist(), chunk.image_tokens)
    logits = features @ policy.image_head.weight.T + policy.image_head.bias
    logp = logits.log_softmax(-1).gather(1, chunk.image_tokens.view(-1, 1)).view_as(chunk.image_logprobs)
    torch.testing.assert_close(logp, chunk.image_logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 12, 13])
@pytest.mark.parametrize("cfg_weight", [1.0, 3.0])
def test_tokens_do_not_depend_on_the_chunk(policy: Policy, max_rows: int, cfg_weight: float) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=cfg_weight)
    whole, parts = (rollout(policy, PROMPTS, 3, sampling, rows) for rows in (512, max_rows))
    assert torch.equal(whole.plans.values, parts.plans.values)
    assert torch.equal(whole.image_tokens, parts.image_tokens)
    torch.testing.assert_close(whole.guided_logprobs, parts.guided_logprobs, atol=TOLERANCE, rtol=0)


def test_samples_differ_within_a_group_and_between_seeds(policy: Policy) -> None:
    engine = RolloutEngine(policy, policy.prompt_encoder(FORMAT))
    sampling = Sampling(max_completion_length=10, cfg_weight=1.0)
    first, second = (next(engine.generate(PROMPTS, 4, sampling, seed)) for seed in (1, 2))
    assert len({tuple(row) for row in first.image_tokens.tolist()}) == len(first)
    assert not torch.equal(first.image_tokens, second.image_tokens)


def test_rollout_follows_the_weights(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=10, cfg_weight=1.0)
    before = rollout(policy, PROMPTS, 2, sampling)
    with torch.no_grad():
        policy.model.lm_head.weight.neg_()
    assert not torch.equal(before.plans.values, rollout(policy, PROMPTS, 2, sampling).plans.values)


def test_chunk_shapes_and_contents(policy: Policy) -> None:
    chunk = rollout(policy, PROMPTS, 2, Sampling(max_completion_length=10, cfg_weight=1.0))
    assert chunk.image_tokens.shape == (6, 16) and chunk.images.shape == (6, 3, 8, 8)
    assert chunk.images.min() >= 0 and chunk.images.max() <= 1
    assert torch.equal(chunk.image_logprobs, chunk.guided_logprobs)
    for s, plan in enumerate(chunk.plans.tolist()):
        assert plan.count(1) == (0 if chunk.truncated[s] else 1), "only the first EOS belongs to a plan"
        assert len(plan) <= 10
        assert chunk.plan_texts[s] == policy.tokenizer.decode(plan, skip_special_tokens=True).strip()
    part = chunk[2:5]
    assert len(part) == 3 and torch.equal(part.image_tokens, chunk.image_tokens[2:5])
    assert part.plans.tolist() == chunk.plans.tolist()[2:5]


def test_empty_and_too_long_prompts_are_named(policy: Policy) -> None:
    engine = RolloutEngine(policy, policy.prompt_encoder(FORMAT))
    with pytest.raises(ValueError, match="empty prompt"):
        next(engine.generate(["a", "  "], 2, Sampling(max_completion_length=10), seed=0))
    with pytest.raises(ValueError, match=r"prompt too long: .* exceed the context of 128.*w9 w9"):
        next(engine.generate(["w9 " * 130], 2, Sampling(max_completion_length=10), seed=0))
