"""train: the reference pass and the update on one rollout, by micro-batches, with activations recomputed or kept.

python -m bicot.bench.bench_train [--device cpu|cuda] [--output FILE.json]
Random samples of a step: on a GPU of Janus-Pro-1B, 16 pictures of 576 tokens with plans of 80; on a CPU of the toy. The
learning rate is 0, so that every update is given the same weights. Peak MiB is beyond weights, masters and moments.
Checked: log-probs and gradient norm against those of the batch that bench_step trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grpo.config import Config
from ..grpo.step import reference_logprobs, split, update
from ..model.engine import RolloutChunk
from ..model.packed import Packed
from .bench_step import Contest, Setting, settings
from .harness import Case, Outputs, Provider, expect, main, short


class Training(NamedTuple):
    """A rollout cut into micro-batches, and the log-probs that the reference gives it."""

    contest: Contest
    config: Config
    parts: list[RolloutChunk]
    advantages: Tensor
    logprobs: list[list[Tensor]]


def setting_of(device: str, tiny: bool) -> Setting:
    model = "tiny" if tiny else "toy" if device == "cpu" else "Janus-Pro-1B"
    setting = settings(device, tiny, model)[-1]
    return replace(setting, config=replace(setting.config, learning_rate=0.0))


@lru_cache(maxsize=1)
def prepared(device: str, tiny: bool) -> tuple[Contest, RolloutChunk]:
    """The models, and random samples of one step with plans of full length."""
    contest = Contest(setting_of(device, tiny), device)
    contest.policy.model.gradient_checkpointing_enable({"use_reentrant": False})  # takes effect in train mode alone
    policy, encoder, config = contest.policy, contest.encoder, contest.config
    each = [e.prompt for e in contest.batch(0) for _ in range(config.num_generations)]
    draw = torch.Generator().manual_seed(1)
    vocab, codes = policy.text_head.weight.shape[0], policy.image_head.weight.shape[0]
    plans = torch.randint(4, vocab, (len(each), config.max_completion_length), generator=draw).tolist()
    tokens = torch.randint(codes, (len(each), policy.num_image_tokens), generator=draw).to(device)
    texts, unused = list(map(encoder.decode_plan, plans)), torch.zeros(tokens.shape, device=device)
    image_prompts = [encoder.image_ids(*both, policy.num_image_tokens) for both in zip(each, texts, strict=True)]
    packed = Packed.of(plans, device)
    return contest, RolloutChunk(
        prompts=Packed.of([encoder.plan_ids(prompt, config.max_completion_length) for prompt in each], device),
        plans=packed,
        plan_logprobs=packed,
        plan_texts=texts,
        truncated=torch.ones(len(each), dtype=torch.bool),
        image_prompts=Packed.of(image_prompts, device),
        image_tokens=tokens,
        image_logprobs=unused,
        guided_logprobs=unused,
        images=unused,
        spans=(),
    )


def inputs(device: str, tiny: bool, config: Config) -> Training:
    contest, rollout = prepared(device, tiny)
    parts = split(rollout, config)
    logprobs = reference_logprobs(contest.reference, parts, contest.encoder, config)
    advantages = torch.linspace(-1, 1, len(rollout), device=device)
    return Training(contest, config, parts, advantages, logprobs)


def refer(x: Training) -> Outputs:
    """Log-probs of all texts and of all pictures."""
    each = reference_logprobs(x.contest.reference, x.parts, x.contest.encoder, x.config)
    return (*map(torch.cat, zip(*each, strict=True)), None)


def train(x: Training) -> Outputs:
    """The gradient norm."""
    contest = x.contest
    given = (contest.policy, contest.optimizer, x.parts, x.advantages, x.logprobs, contest.encoder, x.config)
    return (None, None, update(*given, contest.ranks)["grad_norm"])


def truth(device: str, tiny: bool, x: Training) -> Callable[[Outputs], float]:
    shipped = inputs(device, tiny, x.contest.config)
    return expect([*refer(shipped)[:2], train(shipped)[2]])


def case(device: str, tiny: bool, micro_batches: int, recompute: bool) -> Case:
    setting = setting_of(device, tiny)
    config, dtype = setting.config, getattr(torch, setting.config.dtype)
    prompts = config.prompts_per_device // micro_batches
    batch: dict[str, Any] = {"per_device_train_batch_size": prompts, "gradient_accumulation_steps": micro_batches}
    images = setting.images["ours"]
    labels = {"model": setting.model, "images": images, "micro-batches": micro_batches}
    labels |= {"activations": f"activations {'recomputed' if recompute else 'kept'}", "dtype": short(dtype)}
    return Case(
        labels,
        dtype,
        partial(inputs, device, tiny, replace(config, gradient_checkpointing=recompute, **batch)),
        partial(truth, device, tiny),
        {"reference": Provider(refer), "update": Provider(train)},
        makes=("tokens", images * (config.max_completion_length + setting.image_tokens)),
    )


def cases(device: str, tiny: bool) -> list[Case]:
    return [case(device, tiny, count, recompute) for recompute in (True, False) for count in (2, 1)]


if __name__ == "__main__":
    raise SystemExit(main("train", __doc__, cases))
