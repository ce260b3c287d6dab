"""Rollouts and the loss with LoRA adapters of PEFT, of every kind that is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forced import (
    FORMAT,
    LINEARS,
    TOLERANCE,
    addresses,
    copied,
    engine_of,
    gap,
    greedy,
    image_hidden,
    numbers,
    text_loss,
)
from tiny import tiny_policy

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.step import token_streams
from bicot.model.policy import Policy
from bicot.model.weights import Weights

peft = pytest.importorskip("peft")
ADAPTERS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": LINEARS},
    "some": {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True, "lora_alpha": 3},
    "ends": {"target_modules": ["o_proj", "lm_head", "embed_tokens"]},
    "bias": {"target_modules": [*LINEARS, "vision_head"], "lora_bias": True, "bias": "all"},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "up_proj"]},
    "rows": {"target_modules": LINEARS, "trainable_token_indices": [0, 8, 9]},
    "bias of its own": {"target_modules": ["q_proj", "up_proj", "down_proj", "lm_head"], "lora_bias": True},
    "rows of a head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [8, 9]}},
    "image": {"target_modules": r".*(language_model.*_proj|generation_aligner.*(fc1|\.0)|proj_out|vision_head)"},
}


def adapt(policy: Policy, name: str, seed: int = 0, **more: Any) -> Any:
    """Adapters that change what the model says from the start, in its place -> the PeftModel."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(policy.model, peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[name], **more))
    assert adapted.get_base_model() is policy.model
    return adapted


def train_adapters(policy: Policy) -> None:
    """Moves everything that trains, as a step on rewards would, and checks that the base does not."""
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    assert before
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.05)
    features = image_hidden(policy, [[0, 8, 9], [0, 8]], torch.arange(32).view(2, 16))
    loss = text_loss(policy) + policy.model.model.generation_head.vision_head(features).log_softmax(-1)[:, 3].sum()
    loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters() if name in before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_rollouts_use_the_adapters(name: str, when: str) -> None:
    policy = tiny_policy(biased=name == "bias")
    bare = gap(greedy(engine_of(policy)), policy)
    assert bare < TOLERANCE
    engine = engine_of(policy) if when == "before" else None
    adapted = adapt(policy, name)
    engine = engine or engine_of(policy)
    first = greedy(engine)
    assert gap(first, policy) < TOLERANCE
    places = addresses(engine.weights)
    train_adapters(policy)
    assert gap(first, policy) > 100 * TOLERANCE
    second = greedy(engine)
    assert gap(second, policy) < TOLERANCE
    with adapted.disable_adapter():
        assert gap(second, policy) > 100 * TOLERANCE
        without = greedy(engine)
        assert gap(without, policy) < TOLERANCE
    assert torch.equal(numbers(greedy(engine)), numbers(second))
    assert engine.weights.refresh() is False
    if not {"modules_to_save", "trainable_token_indices"} & ADAPTERS[name].keys():  # off, those lie elsewhere
        assert addresses(engine.weights) == places


def test_what_has_no_adapter_is_not_copied(policy: Policy) -> None:
    adapt(policy, "copies")
    weights = Weights(policy)
    layers = range(policy.config.text_config.num_hidden_layers)
    assert copied(weights) == [f"model.language_model.layers.{i}.self_attn.{x}_proj" for i in layers for x in "qkv"]
    head: Any = policy.model.lm_head
    assert weights.text_head.weight.data_ptr() == head.modules_to_save["default"].weight.data_ptr()
    with torch.no_grad():
        assert weights.layers[0].gate_up.weight.data_ptr() == policy.decoder.layers[0].mlp.gate_proj.weight.data_ptr()


def test_merged_adapters_count_once(policy: Policy) -> None:
    adapted = adapt(policy, "linears")
    engine = engine_of(policy)
    first, places = numbers(greedy(engine)), addresses(engine.weights)
    adapted.merge_adapter()
    torch.testing.assert_close(numbers(greedy(engine)), first, atol=TOLERANCE, rtol=0)
    with adapted.disable_adapter():  # PEFT takes merged adapters out again when the model is next used
        without = greedy(engine)
        assert gap(without, policy) < TOLERANCE
    torch.testing.assert_close(numbers(greedy(engine)), first, atol=TOLERANCE, rtol=0)
    assert addresses(engine.weights) == places


def test_several_adapters_at_once(policy: Policy) -> None:
    adapted = adapt(policy, "linears")
    engine = engine_of(policy)
    adapted.add_adapter("more", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    seen = [numbers(greedy(engine))]
    for names in (["more"], ["default", "more"]):
        adapted.base_model.set_adapter(names)
        chunk = greedy(engine)
        assert gap(chunk, policy) < TOLERANCE
        seen.append(numbers(chunk))
    assert len({tuple(values.tolist()) for values in seen}) == 3


def test_adapters_of_bfloat16_weights_are_added_before_rounding(policy: Policy) -> None:
    policy.model.to(torch.bfloat16)
    adapt(policy, "linears")
    weights = Weights(policy)
    module: Any = policy.decoder.layers[0].mlp.down_proj
    delta = module.lora_B.default.weight @ module.lora_A.default.weight * module.scaling["default"]
    assert delta.dtype == torch.float32
    merged = (module.base_layer.weight.float() + delta).bfloat16()
    assert torch.equal(weights.layers[0].down.weight, merged)
    assert not torch.equal(merged, module.base_layer.weight)


def test_other_kinds_of_adapters_are_refused(policy: Policy) -> None:
    adapt(policy, "linears", use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA adapters, and no other kind"):
        Weights(policy)
    policy = tiny_policy()
    engine = engine_of(policy)
    peft.get_peft_model(policy.model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="plain LoRA adapters, and no other kind"):
        greedy(engine)


def test_a_bias_of_an_adapter_is_removed_with_it(policy: Policy) -> None:
    adapted = adapt(policy, "linears")
    engine = engine_of(policy)
    assert engine.weights.layers[0].qkv.bias is None
    more = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False, lora_bias=True)
    adapted.add_adapter("more", more)
    adapted.base_model.set_adapter(["default", "more"])
    assert gap(greedy(engine), policy) < TOLERANCE
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name.endswith("lora_B.more.bias"):
                parameter.normal_()
    chunk = greedy(engine)
    assert gap(chunk, policy) < TOLERANCE and engine.weights.layers[0].qkv.bias is not None
    adapted.unload()
    assert gap(chunk, policy) > 100 * TOLERANCE
    assert gap(greedy(engine), policy) < TOLERANCE and engine.weights.layers[0].qkv.bias is None


@pytest.mark.parametrize("lora_bias", [False, True])
def test_the_loss_sees_adapters_on_the_heads(policy: Policy, lora_bias: bool) -> None:
    """Its log-probs are those of the rollout, and its gradients those of PEFT's own forward."""
    policy.model.double()
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["lm_head", "vision_head", "q_proj"], lora_bias=lora_bias
    )
    adapted = peft.get_peft_model(policy.model, config)
    chunk = greedy(engine_of(policy))
    text, image = token_streams(policy, chunk, policy.prompt_encoder(FORMAT), Config(rewards=RewardConfig("scene")))
    ours = [stream.stats().logprob for stream in (text, image)]
    torch.testing.assert_close(ours[0].float(), chunk.plan_logprobs.values, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours[1].float(), chunk.image_logprobs.flatten(), atol=TOLERANCE, rtol=0)

    prompts, plans, image_prompts, tokens = chunk.ids
    texts, pictures = policy.hidden((prompts, plans), (image_prompts, policy.image_ids(tokens)))
    head = policy.model.model.generation_head
    plain = [policy.model.lm_head(texts), head(pictures)]
    targets = [chunk.plans.values, chunk.image_tokens.flatten()]
    want = [x.log_softmax(-1).gather(1, t[:, None])[:, 0] for x, t in zip(plain, targets, strict=True)]
    trained = [p for name, p in policy.model.named_parameters() if p.requires_grad and "vision_model" not in name]
    gradients = [torch.autograd.grad(torch.cat(both).sum(), trained) for both in (ours, want)]
    assert len(trained) >= 2 * 4 * (1 + lora_bias / 2)
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    with adapted.disable_adapter():
        assert policy.text_head.weight is policy.model.lm_head.base_layer.weight
