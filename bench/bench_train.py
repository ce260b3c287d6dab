"""train: the reference pass and the update on one rollout, against transformers' own forward pass with a plain loss.

python -m bicot.bench.bench_train [--device cpu|cuda] [--output FILE.json]
Random samples of a step: on a GPU of Janus-Pro-1B, 16 pictures of 576 tokens with plans of 80; on a CPU of the toy, and
of two layers of Janus-Pro-1B's width with one prompt of two samples. The learning rate is 0, so that every update is
given the same weights, and beta is 0, so that an update has no reference pass in it. Eager is the forward pass and loss
of bench/baseline_t2i_r1.py: padded, text and image apart, by transformers' layers; torch.compile is that with each
layer compiled. "ours, varlen" and the like, on a GPU, are ours with each other attn_implementation that is installed.
Peak MiB is beyond weights, masters and moments. Checked: log-probs and gradient norm against those of the batch that
bench_step trains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.step import reference_logprobs, split, update
from ..kernels.group_advantages import group_advantages
from ..model.attention import Attention, available
from ..model.chunk import RolloutChunk
from ..model.packed import Packed
from ..model.policy import Policy
from .baseline_t2i_r1 import Rollout, baseline_loss
from .baseline_t2i_r1 import logprobs as baseline_logprobs
from .bench_step import Contest, Setting, settings
from .harness import Case, Outputs, Provider, expect, main, short


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
        setting = settings(device, tiny, name, 64 if name.endswith("layers") else None)[-1]
        few: dict[str, Any] = (
            {"num_generations": 2, "gradient_accumulation_steps": 1} if name.endswith("layers") else {}
        )
        found.append(replace(setting, config=replace(setting.config, learning_rate=0.0, beta=0.0, **few)))
    return found


@lru_cache(maxsize=1)
def prepared(device: str, model: str, tiny: bool) -> tuple[Contest, RolloutChunk]:
    """The models, and random samples of one step with plans of full length."""
    setting = next(each for each in settings_of(device, tiny) if each.model == model)
    with tempfile.TemporaryDirectory() as folder:  # beta: only what has a KL has a reference
        config = replace(setting.config, beta=1.0)
        contest = Contest(replace(setting, config=config), Ranks(0, 1, torch.device(device)), folder)
    contest.config = setting.config
    contest.policy.model.gradient_checkpointing_enable({"use_reentrant": False})  # takes effect in train mode alone
    policy, encoder, config = contest.policy, contest.encoder, contest.config
    each = [e.prompt for e in contest._step_examples() for _ in range(config.num_generations)]
    draw = torch.Generator().manual_seed(1)
    vocab, codes = policy.text_head.weight.shape[0], policy.image_head.weight.shape[0]
    plans = torch.randint(4, vocab, (len(each), config.max_completion_length), generator=draw).tolist()
    tokens = torch.randint(codes, (len(each), policy.num_image_tokens), generator=draw).to(device)
    texts, unused = list(map(encoder.decode_plan, plans)), torch.zeros(tokens.shape, device=device)
    image_prompts = [encoder.image_ids(*both, policy.num_image_tokens) for both in zip(each, texts, strict=True)]
    packed = Packed.of(plans)
    return contest, RolloutChunk(
        prompts=Packed.of([encoder.plan_ids(prompt, config.max_completion_length) for prompt in each]),
        plans=packed,
        plan_logprobs=packed,
        plan_texts=texts,
        truncated=torch.ones(len(each), dtype=torch.bool),
        image_prompts=Packed.of(image_prompts),
        image_tokens=tokens,
        image_logprobs=unused,
        guided_logprobs=unused,
        images=unused,
        spans=(),
    )


def inputs(device: str, model: str, tiny: bool, config: Config) -> Training:
    contest, rollout = prepared(device, model, tiny)
    rewards = torch.rand(len(rollout), 1, generator=torch.Generator().manual_seed(2)).to(device)
    return Training(contest, config, split(rollout, config), rewards)


def refer(x: Training) -> Outputs:
    """Log-probs of all texts and of all pictures."""
    config = replace(x.config, beta=1.0)  # only what has a KL needs a reference
    assert x.contest.reference
    each = reference_logprobs(x.contest.reference, x.parts, x.contest.encoder, config)
    return (*(torch.cat([one[name] for one in each]) for name in config.kl_streams), None)


def train(x: Training) -> Outputs:
    """The gradient norm."""
    contest = x.contest
    advantages = group_advantages(x.rewards, x.config.num_generations)
    given = (contest.policy, contest.optimizer, x.parts, advantages, None, contest.encoder, x.config)
    return (None, None, update(*given, contest.ranks)["grad_norm"])


def with_attention(name: str, ours: Callable[[Training], Outputs], x: Training) -> Outputs:
    """Ours with another implementation of attention."""
    both = [policy for policy in (x.contest.policy, x.contest.reference) if policy]
    for policy in both:
        policy.attention = Attention(name)
    try:
        return ours(x)
    finally:
        for policy in both:
            policy.attention = Attention()


@contextmanager
def compiled(x: Training) -> Iterator[None]:
    """The layers' own forward passes compiled; ours calls the modules inside them."""
    layers = list(x.contest.policy.decoder.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


Layers = Callable[[Training], AbstractContextManager[None]]  # what transformers' layers are within
PEERS: dict[str, Layers] = {"eager": lambda x: nullcontext(), "torch.compile": compiled}


@torch.no_grad()
def their_reference(layers: Layers, x: Training) -> Outputs:
    policy = x.contest.policy
    policy.model.eval()
    with layers(x):
        texts, pictures = [], []
        for part in map(Rollout.of, x.parts):
            logprobs, mask = baseline_logprobs(policy, part)
            text, picture = logprobs.split(
                [logprobs.shape[1] - part.image_tokens.shape[1], part.image_tokens.shape[1]], 1
            )
            texts.append(text[mask[:, : text.shape[1]].bool()])
            pictures.append(picture.flatten())
    return torch.cat(texts), torch.cat(pictures), None


def _loss(policy: Policy, part: Rollout, rewards: Tensor, config: Config, num_tokens: int) -> tuple[Tensor, None]:
    return baseline_loss(policy, None, part, rewards, config, num_tokens=num_tokens), None


def their_update(layers: Layers, x: Training) -> Outputs:
    parts = list(map(Rollout.of, x.parts))
    total = sum(part.num_tokens for part in parts)
    policy, optimizer = x.contest.policy, x.contest.optimizer
    with layers(x):
        for part, rewards in zip(parts, x.rewards.split(x.config.micro_batch), strict=True):
            optimizer.backward(partial(_loss, policy, part, rewards, x.config, total))
        norm = optimizer.step(x.contest.ranks.sum_gradients)
        policy.model.eval()
    return (None, None, norm)


def truth(device: str, model: str, tiny: bool, x: Training) -> Callable[[Outputs], float]:
    shipped = inputs(device, model, tiny, x.contest.config)
    return expect([*refer(shipped)[:2], train(shipped)[2]])


def cases(device: str, tiny: bool) -> list[Case]:
    found = []
    for setting in settings_of(device, tiny):
        config, dtype = setting.config, getattr(torch, setting.config.dtype)
        counts = sorted({config.gradient_accumulation_steps, 1})
        for phase, recompute in (("update", False), ("reference", False), ("update", True)):
            for count in counts:
                batch: dict[str, Any] = {"per_device_train_batch_size": config.prompts_per_device // count}
                batch |= {"gradient_accumulation_steps": count, "gradient_checkpointing": recompute}
                labels = {"phase": phase, "model": setting.model, "images": setting.images["ours"]}
                labels |= {"micro-batches": count, "dtype": short(dtype)}
                if phase == "update":
                    labels["activations"] = f"activations {'recomputed' if recompute else 'kept'}"
                ours, theirs = (refer, their_reference) if phase == "reference" else (train, their_update)
                providers = {"ours": Provider(ours)}
                for name in available(torch.device(device), dtype)[1:]:
                    providers[f"ours, {name}"] = Provider(partial(with_attention, name, ours))
                providers |= {name: Provider(partial(theirs, layers)) for name, layers in PEERS.items()}
                if phase == "reference" and device == "cpu" and not tiny:
                    del providers["torch.compile"]  # Inductor 2.13 fails on the toy's pass without gradients
                where = (device, setting.model, tiny)
                each = config.max_completion_length + setting.image_tokens
                case = Case(
                    labels, dtype, partial(inputs, *where, replace(config, **batch)), partial(truth, *where), providers,
                    makes=("tokens", setting.images["ours"] * each),
                )  # fmt: skip
                found.append(case)
    return found


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
