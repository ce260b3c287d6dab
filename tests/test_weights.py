"""The engine's view of the policy's weights: shared wherever it can be, and the newest in every rollout."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import LINEARS, TOLERANCE, addresses, copied, engine_of, gap, greedy, numbers, text_loss
from oracle import Operators
from stepping import ALONE
from tiny import ROOT, TORCHRUN, made_once, tiny_policy
from torch import nn

from bicot.grpo.config import Config, RewardConfig
from bicot.grpo.optim import MasterAdamW
from bicot.model.adapters import add_lora
from bicot.model.policy import Policy, load_policy
from bicot.model.weights import Weights

MODELS = [{}, {"kv_heads": 1, "biased": True}, {"kv_heads": 2, "tied": True}]
CONFIG = Config(rewards=RewardConfig("scene"), learning_rate=0.02, warmup_steps=0)


def scramble(policy: Policy, seed: int = 0) -> None:
    """Change every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise, alpha=0.1 * parameter.float().std(correction=0).item() + 1e-3)


# shared storage


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("loaded", [False, True])
def test_decoding_reads_the_parameters_themselves(options: dict[str, Any], loaded: bool, tmp_path: Path) -> None:
    policy = tiny_policy(**options)
    if loaded:
        policy.save_pretrained(tmp_path)
        policy = load_policy(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[0, 8, 9, 10]])
    parameters, logits = dict(policy.model.named_parameters()), policy.model(input_ids=ids).logits
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights = Weights(policy)
    assert copied(weights) == []
    for name, parameter in policy.model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, values[name]), name
    assert torch.equal(policy.model(input_ids=ids).logits, logits)
    for layer, view in zip(policy.decoder.layers, weights.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        stacks = [
            (view.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (view.gate_up, [mlp.gate_proj, mlp.up_proj]),
            (view.out, [attention.o_proj]),
            (view.down, [mlp.down_proj]),
        ]
        for stack, modules in stacks:
            for attribute in ("weight", "bias") if options.get("biased") else ("weight",):
                begin = getattr(stack, attribute).data_ptr()
                for module in modules:
                    parameter = getattr(module, attribute)
                    assert parameter.data_ptr() == begin
                    begin += parameter.numel() * parameter.element_size()
    assert weights.text_head.weight.data_ptr() == policy.text_head.weight.data_ptr()
    assert weights.embed_text.tensor.data_ptr() == policy.decoder.get_input_embeddings().weight.data_ptr()
    assert (weights.text_head.weight.data_ptr() == weights.embed_text.tensor.data_ptr()) == bool(options.get("tied"))


@pytest.mark.parametrize("options", MODELS)
def test_a_checkpoint_is_the_same_byte_for_byte(options: dict[str, Any], tmp_path: Path) -> None:
    policy = tiny_policy(**options)
    policy.save_pretrained(tmp_path / "before")
    weights = Weights(policy)
    policy.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    loaded = load_policy(tmp_path / "after", dtype=torch.float32)
    for (name, a), b in zip(policy.model.state_dict().items(), loaded.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(weights.layers) == len(loaded.decoder.layers)


def adamw_step(policy: Policy) -> None:
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.02)
    text_loss(policy).backward()
    optimizer.step()


def master_step(policy: Policy, optimizer: MasterAdamW | None = None) -> None:
    optimizer = optimizer or MasterAdamW(policy.trainable_parameters(), CONFIG)
    text_loss(policy).backward()
    optimizer.step(ALONE)


def load_another(policy: Policy) -> None:
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}
    for i, name in enumerate(name for name in state if name != "lm_head.weight"):  # may be the embeddings
        state[name] += 0.05 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(i))
    policy.model.load_state_dict(state)


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("change", [adamw_step, master_step, load_another, scramble])
def test_rollouts_follow_what_is_written(options: dict[str, Any], change: Callable[[Policy], None]) -> None:
    policy = tiny_policy(**options)
    engine = engine_of(policy)
    first, places = greedy(engine), addresses(engine.weights)
    assert gap(first, policy) < TOLERANCE
    change(policy)
    assert gap(first, policy) > 100 * TOLERANCE, "the change shows"
    assert gap(greedy(engine), policy) < TOLERANCE
    assert engine.weights.refresh() is False and addresses(engine.weights) == places and copied(engine.weights) == []


def test_rollouts_follow_bfloat16_weights_and_their_masters(policy: Policy) -> None:
    policy.model.to(torch.bfloat16)
    engine = engine_of(policy)
    first = numbers(greedy(engine))
    optimizer = MasterAdamW(policy.trainable_parameters(), CONFIG)
    for _ in range(2):
        master_step(policy, optimizer)
        now = numbers(greedy(engine))
        assert torch.equal(now, numbers(greedy(engine_of(copy.deepcopy(policy)))))
        assert len(now) != len(first) or (now - first).abs().max() > 100 * TOLERANCE
        first = now


@pytest.mark.parametrize("frozen", ["generation_embeddings", "generation_aligner", "generation_head", "vqmodel"])
def test_rollouts_follow_the_modules_that_usually_stay_frozen(policy: Policy, frozen: str) -> None:
    engine = engine_of(policy)
    first = greedy(engine)
    with torch.no_grad():
        for parameter in policy.model.get_submodule(f"model.{frozen}").parameters():
            parameter.add_(torch.rand_like(parameter))
    assert gap(first, policy) > 100 * TOLERANCE
    assert gap(greedy(engine), policy) < TOLERANCE


def replace_one(policy: Policy) -> None:
    weight = policy.decoder.layers[1].self_attn.k_proj.weight
    weight.data = weight.data * 3


def replace_parameter(policy: Policy) -> None:
    mlp = policy.decoder.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach() * 3)


def replace_module(policy: Policy) -> None:
    policy.model.lm_head = nn.Linear(32, policy.config.text_config.vocab_size, bias=False)


def there_and_back(policy: Policy) -> None:
    policy.model.double().float()
    scramble(policy)


@pytest.mark.parametrize("move", [replace_one, replace_parameter, replace_module, there_and_back])
def test_parameters_that_move_are_followed(policy: Policy, move: Callable[[Policy], None]) -> None:
    engine = engine_of(policy)
    first = greedy(engine)
    move(policy)
    assert gap(first, policy) > 100 * TOLERANCE
    assert engine.weights.refresh() is True, "captured graphs are invalid"
    places = addresses(engine.weights)
    assert engine.weights.refresh() is False and addresses(engine.weights) == places
    assert copied(engine.weights) == []
    assert gap(greedy(engine), policy) < TOLERANCE


@pytest.mark.parametrize("trains", [False, True])
def test_a_refresh_copies_nothing_that_stayed(policy: Policy, trains: bool) -> None:
    """All but the table of image tokens, which is computed; pictures' weights where they stay frozen."""
    vq = policy.model.model.vqmodel.requires_grad_(trains)
    weights = engine_of(policy).weights
    weights.refresh()
    with Operators() as ran:
        weights.refresh()
    own = len(list(weights.image_decoder.model.parameters()))
    assert ran.names["copy_"] == 1 + trains * own and own > 20
    for change in (lambda p: p.add_(1), lambda p: setattr(p, "data", p.data + 1)):
        with torch.no_grad():
            change(vq.decoder.conv_out.bias)
        weights.refresh()
        assert torch.equal(weights.image_decoder.model.decoder.conv_out.bias, vq.decoder.conv_out.bias)


def test_adapters_of_the_picture_decoder_are_followed(policy: Policy) -> None:
    """Also those of a frozen policy, which can be switched off."""
    pytest.importorskip("peft")
    policy.adapters = add_lora(policy.model, 4, 8, 0.0, ["conv_out"], [])
    policy.freeze()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(1.0)
    weights = engine_of(policy).weights
    own, layer = weights.image_decoder.model.decoder.conv_out, policy.model.model.vqmodel.decoder.conv_out
    adapted = own.weight.clone()
    with policy.without_adapters():
        weights.refresh()
        assert torch.equal(own.weight, layer.base_layer.weight)
    weights.refresh()
    assert torch.equal(own.weight, adapted) and not torch.equal(adapted, layer.base_layer.weight)


def test_another_dtype_needs_another_engine(policy: Policy) -> None:
    engine = engine_of(policy)
    policy.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32.* to .*bfloat16.*: build a new RolloutEngine"):
        greedy(engine)


def test_weights_in_storage_of_others_are_copied_and_followed(policy: Policy) -> None:
    """Parameters that are views, with gaps, of a buffer whose owner writes to it: moving them would cut them off."""
    attention = policy.decoder.layers[0].self_attn
    flat = torch.zeros(3, 2000)
    for row, module in zip(flat, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
        row[:1024] = module.weight.detach().flatten()
        module.weight.data = row[:1024].view(32, 32)
    engine = engine_of(policy)
    first, places = greedy(engine), addresses(engine.weights)
    assert copied(engine.weights) == [f"model.language_model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    flat.mul_(-2)
    assert gap(first, policy) > 100 * TOLERANCE
    assert gap(greedy(engine), policy) < TOLERANCE
    assert engine.weights.refresh() is False and addresses(engine.weights) == places
    assert attention.k_proj.weight.data_ptr() == flat[1].data_ptr()


def test_other_architectures_are_refused(policy: Policy) -> None:
    policy.config.text_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="'llama' with 'gelu'"):
        Weights(policy)


# DeepSpeed, two ranks


SHARED = ["zero1", "zero2, engine after", "zero2, bfloat16"]
COPIED = ["zero2, biased", "zero2, a group for each"]
ZERO3 = ["zero3", "zero3, small ones whole", "zero3, bfloat16", "zero3, adapters"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of tests/sharded_rollout.py saw in each case."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")

    def make(folder: Path) -> None:
        command = [*TORCHRUN, str(ROOT / "tests" / "sharded_rollout.py"), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)

    folder = made_once(tmp_path_factory, "sharded", make)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [*SHARED, *COPIED, *ZERO3])
def test_rollouts_follow_deepspeed(sharded: list[dict[str, Any]], case: str) -> None:
    assert set(sharded[0]) == {*SHARED, *COPIED, *ZERO3}
    for seen in (rank[case] for rank in sharded):
        if "bfloat16" in case:
            assert all(seen["equal"]), "bit for bit what an unsharded policy of the same weights gives"
        else:
            assert max(seen["gap"]) < TOLERANCE
        assert min(seen["change"]) > 100 * TOLERANCE, "every step shows"
        assert not any(seen["moved"][1:]) and seen["addresses"][1:] == seen["addresses"][:-1]
        assert bool(seen["copied"]) == (case not in SHARED)
        if case in COPIED:  # no more than the stacks that the flat buffers pull apart
            assert {name.rpartition(".")[2] for name in seen["copied"]} <= set(LINEARS) - {"o_proj", "down_proj"}
        if "whole" in case:  # and stays so: a refresh leaves alone what ZeRO-3 holds complete
            assert seen["sharded"] == ["down_proj", "embed_tokens", "gate_proj", "up_proj"]
        else:
            assert ("q_proj" in seen["sharded"] or "base_layer" in seen["sharded"]) == (case in ZERO3)


@pytest.mark.parametrize("case", ["zero2, engine after", "zero2, a group for each", "zero3", "zero3, small ones whole"])
def test_rollouts_do_not_change_training(sharded: list[dict[str, Any]], case: str) -> None:
    """Every way to share the work ends at the same weights, so no rollout came between a trainer and its parameters."""
    for seen in sharded:
        torch.testing.assert_close(seen[case]["numbers"], seen["zero1"]["numbers"], atol=TOLERANCE, rtol=0)
