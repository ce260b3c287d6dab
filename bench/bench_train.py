"""train: the reference pass and the update on one rollout, against transformers' own forward pass with a plain loss.

python -m bicot.bench.bench_train [--device cpu|cuda] [--output FILE.json]
The rollout is that of one step: on a GPU of Janus-Pro-1B, 16 pictures of 576 tokens with plans of 80; on a CPU of the
toy, and of two layers of Janus-Pro-1B's width with one prompt of two samples. Its rewards are random. The learning rate
is 0, so that every update is given the same weights, and beta is 0, so that an update has no reference pass in it.
Eager is the forward pass and loss of bench/baseline_t2i_r1.py: padded, text and image apart, by transformers' layers.
torch.compile is the same with each layer compiled, and Liger the same with Liger's norms, rotary embedding and SwiGLU
(on a GPU). "ours, varlen" and the like, on a GPU, are ours with each other attn_implementation that is installed. The
floor is the matrix products of the packed sequences, without recomputing, so "% of floor" is the MFU, relative to the
measured rate of a product. Peak MiB is beyond weights, masters and moments. Checked: log-probs and gradient norm
against those of the batch that bench_step trains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.step import reference_logprobs, split, update
from ..kernels.group_advantages import group_advantages
from ..model.attention import Attention, available
from ..model.chunk import RolloutChunk
from ..model.policy import Policy
from .baseline_t2i_r1 import Rollout, baseline_loss, transformers_norms
from .baseline_t2i_r1 import logprobs as baseline_logprobs
from .bench_step import Contest, Setting, settings
from .harness import Case, Outputs, Provider, Unavailable, expect, main, short
from .step_profile import training_flops

Layers = Callable[[Policy], AbstractContextManager[None]]


class Training(NamedTuple):
    """A rollout cut into micro-batches, and the rewards [S, 1] of its samples."""

    contest: Contest
    config: Config
    parts: list[RolloutChunk]
    rewards: Tensor


def settings_of(device: str, tiny: bool) -> list[Setting]:
    names = ["tiny"] if tiny else ["toy", "Janus-Pro-1B of 2 layers"] if device == "cpu" else ["Janus-Pro-1B"]
    found = []
    for name in names:
        few: dict[str, Any] = {"learning_rate": 0.0, "beta": 0.0, "micro_batch_tokens": None}
        if name.endswith("layers"):
            few |= {"num_generations": 2, "gradient_accumulation_steps": 1}
        setting = settings(device, tiny, name, 64 if name.endswith("layers") else None)[-1]
        found.append(replace(setting, config=replace(setting.config, **few)))
    return found


@lru_cache(maxsize=1)
def prepared(device: str, model: str, tiny: bool) -> tuple[Contest, RolloutChunk]:
    """Make the models and the rollout of a step."""
    setting = next(each for each in settings_of(device, tiny) if each.model == model)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(setting.config, beta=1.0)  # without a KL there would be no reference
        contest = Contest(replace(setting, config=config), Ranks(0, 1, torch.device(device)), folder)
    contest.config = setting.config
    return contest, contest._roll_out(contest._step_examples())[0]


def inputs(device: str, model: str, tiny: bool, config: Config) -> Training:
    contest, rollout = prepared(device, model, tiny)
    rewards = torch.rand(len(rollout), 1, generator=torch.Generator().manual_seed(2)).to(device)
    return Training(contest, config, split(rollout, config), rewards)


def refer(x: Training) -> Outputs:
    """Compute the log-probs of all texts and of all pictures."""
    config = replace(x.config, beta=1.0)  # without a KL nothing would be computed
    assert x.contest.reference
    each = reference_logprobs(x.contest.reference, x.parts, x.contest.encoder, config)
    return (*(torch.cat([one[name] for one in each]) for name in config.kl_streams), None)


def train(x: Training) -> Outputs:
    """Update the policy -> the gradient norm."""
    contest = x.contest
    contest.policy.recompute(x.config.gradient_checkpointing)
    advantages = group_advantages(x.rewards, x.config.num_generations)
    given = (contest.policy, contest.optimizer, x.parts, advantages, None, contest.encoder, x.config)
    return (None, None, update(*given, contest.ranks)["grad_norm"])


def with_attention(name: str, ours: Callable[[Training], Outputs], x: Training) -> Outputs:
    """Run ours with this implementation of attention."""
    for policy in (x.contest.policy, x.contest.reference):
        if policy:
            policy.attention = Attention(name)
    return ours(x)


@contextmanager
def compiled(policy: Policy) -> Iterator[None]:
    """The forward pass of each layer is compiled. Ours does not call it."""
    layers = list(policy.decoder.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


@contextmanager
def liger(policy: Policy) -> Iterator[None]:
    """Norms, activations and rotary embedding are Liger's kernels, as its `apply_liger_kernel_to_llama` puts them."""
    if policy.device.type == "cpu":
        raise Unavailable("its kernels need a GPU")
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def norm(self: Any, x: Tensor) -> Tensor:
        return liger_rms_norm(x, self.weight, self.variance_epsilon)

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    with (
        patch.object(LlamaRMSNorm, "forward", norm),
        patch.object(LlamaMLP, "forward", mlp),
        patch.object(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb),
    ):
        yield


def with_layers(layers: Layers, theirs: Callable[[Training], Outputs], x: Training) -> Outputs:
    """Run theirs with transformers' layers, as they are inside `layers`."""
    policy = x.contest.policy
    with transformers_norms(policy), layers(policy):
        return theirs(x)


@torch.no_grad()
def their_reference(x: Training) -> Outputs:
    policy, texts, pictures = x.contest.policy, [], []
    policy.model.eval()
    for part in map(Rollout.of, x.parts):
        logprobs, mask = baseline_logprobs(policy, part)
        plan = logprobs.shape[1] - part.image_tokens.shape[1]
        texts.append(logprobs[:, :plan][mask[:, :plan].bool()])
        pictures.append(logprobs[:, plan:].flatten())
    return torch.cat(texts), torch.cat(pictures), None


def their_update(x: Training) -> Outputs:
    parts = list(map(Rollout.of, x.parts))
    total = sum(part.num_tokens for part in parts)
    policy, optimizer = x.contest.policy, x.contest.optimizer
    for part, rewards in zip(parts, x.rewards.split(x.config.micro_batch), strict=True):
        optimizer.collect()  # adds the gradients of the micro-batch before
        baseline_loss(policy, None, part, rewards, x.config, num_tokens=total).backward()
    norm = optimizer.step(x.contest.ranks)
    policy.model.eval()
    return (None, None, norm)


def truth(device: str, model: str, tiny: bool, x: Training) -> Callable[[Outputs], float]:
    shipped = inputs(device, model, tiny, x.contest.config)
    return expect([*refer(shipped)[:2], train(shipped)[2]])


def case(device: str, tiny: bool, setting: Setting, count: int, phase: str, recompute: bool) -> Case:
    """The case of a phase, with the step in `count` micro-batches."""
    config, dtype = setting.config, getattr(torch, setting.config.dtype)
    batch: dict[str, Any] = {"per_device_train_batch_size": config.prompts_per_device // count}
    batch |= {"gradient_accumulation_steps": count, "gradient_checkpointing": recompute}
    images = setting.images["ours"]
    labels = {"phase": phase, "model": setting.model, "images": images, "micro-batches": count, "dtype": short(dtype)}
    if phase == "update":
        labels["activations"] = f"activations {'recomputed' if recompute else 'kept'}"
    ours, theirs = (refer, their_reference) if phase == "reference" else (train, their_update)
    implementations = {"ours" if x == "sdpa" else f"ours, {x}": x for x in available(torch.device(device), dtype)}
    providers = {name: Provider(partial(with_attention, x, ours)) for name, x in implementations.items()}
    layers: dict[str, Layers] = {"eager": lambda policy: nullcontext(), "Liger": liger}
    if phase == "update" or device == "cuda" or tiny:  # Inductor 2.13 fails on the toy's pass without gradients
        layers["torch.compile"] = compiled
    providers |= {name: Provider(partial(with_layers, kind, theirs)) for name, kind in layers.items()}
    where, makes = (device, setting.model, tiny), ("images", float(images))
    given = partial(inputs, *where, replace(config, **batch))

    def flops(x: Training) -> float:
        of = training_flops(x.contest.policy, x.parts)
        return of["reference"] if phase == "reference" else of["forward"] + of["loss"] + of["backward"]

    return Case(labels, dtype, given, partial(truth, *where), providers, flops=flops, makes=makes)


def cases(device: str, tiny: bool) -> list[Case]:
    return [
        case(device, tiny, setting, count, phase, recompute)
        for setting in settings_of(device, tiny)
        for phase, recompute in (("update", False), ("reference", False), ("update", True))
        for count in sorted({setting.config.gradient_accumulation_steps, 1})
    ]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
