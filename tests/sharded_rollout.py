"""torchrun --nproc-per-node 2 tests/sharded_rollout.py FOLDER: rollouts of policies that DeepSpeed trains, on a CPU.

Each case trains a tiny policy for some steps, with a rollout before each and after the last; every rank rolls out other
prompts, and another number of chunks. What it saw goes to FOLDER/rank<r>.json, for tests/test_weights.py to judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from forced import PROMPTS, addresses, copied, engine_of, gap, greedy, numbers
from tiny import tiny_policy

from bicot.model.policy import Policy

STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2, engine after": {"stage": 2, "after": True},
    "zero2, bfloat16": {"stage": 2, "dtype": torch.bfloat16},
    "zero2, biased": {"stage": 2, "biased": True},  # weights and biases take turns in the flat buffer
    "zero2, a group for each": {"stage": 2, "after": True, "apart": True},
    "zero3": {"stage": 3},
    "zero3, small ones whole": {"stage": 3, "after": True, "whole_below": 1100},
    "zero3, bfloat16": {"stage": 3, "after": True, "dtype": torch.bfloat16},
    "zero3, adapters": {"stage": 3, "adapters": True},
}


def policy_of(case: dict[str, Any]) -> Policy:
    policy = tiny_policy(biased=case.get("biased", False))
    policy.model.to(case.get("dtype", torch.float32))
    if case.get("adapters"):
        import peft

        targets = ["q_proj", "v_proj", "up_proj", "o_proj", "lm_head", "vision_head"]
        peft.get_peft_model(policy.model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return policy


def unsharded(policy: Policy, case: dict[str, Any]) -> Policy:
    """Another policy, with the same weights."""
    same = policy_of(case)
    parameters = list(policy.model.parameters())
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters):
        for own, parameter in zip(same.model.parameters(), parameters, strict=True):
            own.copy_(parameter)
    return same


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": case.get("dtype") == torch.bfloat16},
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": case.get("whole_below", 0)},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
    }
    policy = policy_of(case)
    prompts, max_rows = ([PROMPTS[0]], 8) if rank == 0 else (PROMPTS[::-1], 2)
    engine = None if case.get("after") else engine_of(policy, max_rows=max_rows)
    trainable: list[Any] = policy.trainable_parameters()
    if case.get("apart"):
        trainable = [{"params": [parameter]} for parameter in trainable]
    trainer, *_ = deepspeed.initialize(model=policy.model, model_parameters=trainable, config=config)
    engine = engine or engine_of(policy, max_rows=max_rows)
    seen: dict[str, Any] = {"gap": [], "change": [], "equal": [], "moved": [], "addresses": []}
    before = None
    for step in range(STEPS + 1):
        seen["moved"].append(engine.weights.refresh())
        seen["addresses"].append(addresses(engine.weights))
        body = policy.decoder.named_parameters()
        seen["sharded"] = sorted({name.split(".")[-2] for name, parameter in body if parameter.numel() == 0})
        chunk, same = greedy(engine, prompts), unsharded(policy, case)
        seen["gap"].append(gap(chunk, same))
        seen["equal"].append(torch.equal(numbers(chunk), numbers(greedy(engine_of(same, max_rows=max_rows), prompts))))
        if before is not None:
            seen["change"].append(gap(before, same))
        before = chunk
        if step < STEPS:
            logits = trainer(input_ids=torch.tensor([[0, 8 + rank, 9, 10, 11]])).logits
            trainer.backward(logits.float().log_softmax(-1)[0, :, 3].sum())
            trainer.step()
    seen["copied"] = copied(engine.weights)
    seen["numbers"] = numbers(chunk).tolist()
    trainer.destroy()
    return seen


def main() -> None:
    # its shared-memory collectives for CPUs would be compiled first; gloo's do
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {name: run(case, rank) for name, case in CASES.items()}
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
