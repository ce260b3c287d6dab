"""One BiCoT-GRPO update: rollout and advantages in, new weights and metrics out.

Shapes: S samples on this rank, R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.grpo_loss import GRPOLoss, TokenStream, grpo_loss
from ..kernels.host import upload
from ..model.chunk import RolloutChunk
from ..model.policy import Policy
from ..model.prompts import PromptEncoder
from ..model.sequences import Stream, token_counts
from .config import STREAMS, Config
from .distributed import Ranks
from .memory import Shape, reference_tokens
from .off_policy import corrected
from .optim import MasterAdamW
from .token_weights import TokenWeights

Ahead = list[list[TokenStream]]


def _rows(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config, names: Sequence[str]
) -> list[Stream]:
    """What passes for these streams: plans, pictures, and where guided log-probs train the pictures without prompts."""
    prompts, plans, image_prompts, tokens = rollout.ids
    pictures = policy.image_ids(tokens)
    rows: dict[str, list[Stream]] = {"text": [(prompts, plans)], "image": [(image_prompts, pictures)]}
    if _guided(config):
        rows["image"].append(([encoder.unconditional_ids(len(prompt)) for prompt in image_prompts], pictures))
    return [row for name in names for row in rows[name]]


def _guided(config: Config) -> bool:
    return config.policy_logits == "guided" and config.cfg_weight != 1


def token_streams(
    policy: Policy,
    rollout: RolloutChunk,
    encoder: PromptEncoder,
    config: Config,
    names: Sequence[str] = STREAMS,
) -> list[TokenStream]:
    """Forward the plans and the pictures of a micro-batch: the text stream and the image stream, or one of them."""
    num_samples, num_tokens = rollout.image_tokens.shape
    hidden = policy.hidden(*_rows(policy, rollout, encoder, config, names))
    compared = config.importance_sampling_correction or config.off_policy_mask_threshold is not None
    streams = []
    if "text" in names:
        features, trained = hidden.pop(0), _text_tokens(rollout, config)
        own: slice | Tensor = slice(None)
        if isinstance(trained, Tensor):  # a slice of all would copy the gradient
            own = upload(trained, policy.device)
            features = features[own]
        text = TokenStream(
            targets=upload(rollout.plans.values[trained], policy.device),
            sample=upload(torch.repeat_interleave(rollout.plans.lengths)[trained], policy.device),
            hidden=features,
            weight=policy.text_head.weight,
            bias=policy.text_head.bias,
            sampling_logprob=rollout.plan_logprobs.values[own] if compared else None,
            temperature=config.temperature,
            name="text",
        )
        streams.append(text)
    if "image" in names:
        features, *unconditional = map(policy.image_features, hidden)
        for other in unconditional:  # the head is linear: the guided logits are the head on the guided features
            other = other.detach() if config.detach_uncond else other
            features = other + config.cfg_weight * (features - other)
        sampled = rollout.guided_logprobs if _guided(config) else rollout.image_logprobs
        image = TokenStream(
            targets=rollout.image_tokens.flatten(),
            sample=torch.arange(num_samples, device=policy.device).repeat_interleave(num_tokens),
            hidden=features,
            weight=policy.image_head.weight,
            bias=policy.image_head.bias,
            sampling_logprob=sampled.flatten() if compared else None,
            temperature=config.image_temperature,
            name="image",
        )
        streams.append(image)
    return streams


@record_function("reference")
@torch.no_grad()
def reference_logprobs(
    reference: Policy,
    micro_batches: list[RolloutChunk],
    encoder: PromptEncoder,
    config: Config,
    passes: list[RolloutChunk] | None = None,
) -> list[dict[str, Tensor]]:
    """Log-probs of every token under the reference model (without its adapters), by stream, for each micro-batch.

    A stream without KL is left out: neither its rows nor its head are computed. The policy has a forward pass of its
    own even where only adapters differ: one pass for both would have each row twice, and save no product.

    Args:
        passes: `reference_passes` over the same samples; None = one pass a micro-batch.
    """
    with reference.without_adapters():
        found = [
            {
                stream.name: stream.stats().logprob
                for stream in token_streams(reference, part, encoder, config, config.kl_streams)
            }
            for part in passes or micro_batches
        ]
    if passes is None:
        return found
    counts = [dict(zip(STREAMS, _counts(part, config), strict=True)) for part in micro_batches]
    each: list[dict[str, Tensor]] = [{} for _ in micro_batches]
    for name in config.kl_streams:
        parts = torch.cat([one[name] for one in found]).split([count[name] for count in counts])
        for own, part in zip(each, parts, strict=True):
            own[name] = part.clone()  # aligned, as Triton's kernels are compiled for
    return each


def reference_passes(
    reference: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config
) -> list[RolloutChunk] | None:
    """With `micro_batch_tokens`, what passes through the reference at a time: without gradients, more than trains."""
    if config.micro_batch_tokens is None:
        return None
    shape = Shape.of(reference.config, reference.dtype.itemsize)
    most = reference_tokens(shape, int(config.micro_batch_tokens), config.gradient_checkpointing)
    return _by_tokens(reference, rollout, encoder, config, config.kl_streams, most)


def micro_batches_of(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config
) -> list[RolloutChunk]:
    """The micro-batches of a rollout: by `micro_batch_tokens`, or else `split`."""
    if config.micro_batch_tokens is None:
        return split(rollout, config)
    return _by_tokens(policy, rollout, encoder, config, STREAMS, int(config.micro_batch_tokens))


def _by_tokens(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config, names: Sequence[str], most: int
) -> list[RolloutChunk]:
    counts = token_counts(_rows(policy, rollout.on_host(), encoder, config, names))
    starts = cut(*counts, config.num_generations, most)
    return [rollout[start:end] for start, end in pairwise([*starts, len(rollout)])]


def cut(alone: Sequence[int], more: Sequence[int], group: int, most: int) -> list[int]:
    """Where parts of at most so many tokens begin. A group that has more is cut between its samples; a sample is not.

    Args:
        alone: [S] tokens of a sample that begins a part.
        more: [S] tokens that it adds after the sample above.
        group: samples of one prompt.
    """
    starts, tokens = list[int](), 0
    for first in range(0, len(alone), group):
        whole = alone[first] + sum(more[first + 1 : first + group]) <= most
        size = group if whole else 1
        for start in range(first, min(first + group, len(alone)), size):
            rest = sum(more[start + 1 : start + size])
            if starts and tokens + more[start] + rest <= most:
                tokens += more[start] + rest
            else:
                starts.append(start)
                tokens = alone[start] + rest
    return starts


def split(rollout: RolloutChunk, config: Config) -> list[RolloutChunk]:
    """The micro-batches of a rollout; their ids are on the host, so that no forward pass waits for the one before."""
    size, rollout = config.micro_batch, rollout.on_host()
    return [rollout[start : start + size] for start in range(0, len(rollout), size)]


def skips_groups(config: Config) -> bool:
    """Whether `update` leaves out groups whose advantages are all 0, because nothing but the advantages trains.

    Not with bnpo, whose normaliser counts the tokens of each micro-batch, with a function of token weights, which sees
    the whole micro-batch, or with DeepSpeed, which wants as many micro-batches on each rank.
    """
    other = (
        config.kl_streams
        or config.entropy_target is not None
        or any(config.of_stream(stream)["entropy_coef"] for stream in STREAMS)
    )
    return not (other or config.loss_type == "bnpo" or config.token_weights or config.deepspeed)


def begins_early(config: Config) -> bool:
    """Whether `begin` may run before the scores are there.

    Not with DeepSpeed, which wants a micro-batch in one call, with LoRA's dropout, from whose generator rewards might
    draw, or where `skips_groups`, since the pass may be over a group that is left out.
    """
    return not (config.deepspeed or config.lora_dropout or skips_groups(config))


def _teaching(
    policy: Policy, micro_batches: list[RolloutChunk], advantages: Tensor, encoder: PromptEncoder, config: Config
) -> tuple[list[RolloutChunk], Tensor]:
    """Micro-batches and advantages of the groups with an advantage other than 0."""
    size = config.num_generations
    teaches = (advantages.view(-1, size) != 0).any(1).tolist()
    if all(teaches):
        return micro_batches, advantages
    if not any(teaches):  # one sample, whose gradients of 0 the other ranks and AdamW's moments count on
        return [micro_batches[0][:1]], advantages[:1]
    kept, first = list[RolloutChunk](), 0
    for part in micro_batches:  # it may begin and end within a group
        edges = [0, *(at for at in range(1, len(part)) if (first + at) % size == 0), len(part)]
        kept += [part[start:end] for start, end in pairwise(edges) if teaches[(first + start) // size]]
        first += len(part)
    joined = RolloutChunk.cat(kept)
    return micro_batches_of(policy, joined, encoder, config), advantages.view(-1, size)[teaches].flatten()


@record_function("forward")
def begin(policy: Policy, micro_batches: list[RolloutChunk], encoder: PromptEncoder, config: Config) -> Ahead:
    """The first forward pass of `update`, which needs no advantages; rewards work beside it."""
    _train_mode(policy, config)
    return [token_streams(policy, micro_batches[0], encoder, config)]


def update(
    policy: Policy,
    optimizer: MasterAdamW,
    micro_batches: list[RolloutChunk],
    advantages: Tensor,
    reference: list[dict[str, Tensor]] | None,
    encoder: PromptEncoder,
    config: Config,
    ranks: Ranks,
    ahead: Ahead | None = None,
) -> dict[str, Tensor]:
    """`num_iterations` optimizer updates on one rollout.

    Args:
        micro_batches: `micro_batches_of` the rollout of this rank.
        advantages: [S] of this rank's samples; on the CPU, where `skips_groups` reads them.
        reference: `reference_logprobs` of the micro-batches, None where beta is 0 for both streams.
        ahead: what `begin` returned, if it was called; it is taken out, so that no memory is held longer than needed.

    Returns:
        Metrics as device scalars: means over the tokens of the whole step, of the last iteration. Where `skips_groups`,
        over those of the groups that are left, and `samples_dropped`, the share of samples that are not.
    """
    tokens = float(sum(sum(_counts(part, config)) for part in micro_batches))
    num_tokens = ranks.sum(torch.full((), tokens, device=policy.device))
    num_samples, dropped = len(advantages) * ranks.size, {}
    if skips_groups(config):
        before = len(advantages)
        micro_batches, advantages = _teaching(policy, micro_batches, advantages, encoder, config)
        share = torch.full((), (before - len(advantages)) / num_samples, device=policy.device)
        dropped = {"samples_dropped": ranks.sum(share)}
    counts = [_counts(part, config) for part in micro_batches]
    each = upload(advantages, policy.device).split([len(part) for part in micro_batches])
    old: list[tuple[Tensor, ...] | None] = [None] * len(micro_batches)
    weigh = TokenWeights(config.token_weights) if config.token_weights else None
    _train_mode(policy, config)

    @record_function("loss")
    def loss_of(i: int) -> tuple[Tensor, GRPOLoss]:
        part, mine = micro_batches[i], each[i]
        with record_function("forward"):
            streams = ahead.pop() if ahead else token_streams(policy, part, encoder, config)
        for s, stream in enumerate(streams):
            before, ref = old[i], None if reference is None else reference[i].get(stream.name)
            stream = replace(stream, ref_logprob=ref, old_logprob=None if before is None else before[s])
            stream = replace(stream, **config.of_stream(stream.name))
            streams[s] = replace(stream, token_weight=weigh(stream, mine)) if weigh else stream
        result = grpo_loss(
            corrected(streams, mine, config),
            mine,
            loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
            kl_estimator=config.kl_estimator,
            use_bias_correction_kl=config.use_bias_correction_kl,
            delta=config.delta,
            importance_sampling_clip_max=config.importance_sampling_clip_max
            if config.importance_sampling_correction
            else math.inf,
            max_completion_length=config.max_completion_length + policy.num_image_tokens,
            num_tokens=None if config.loss_type == "bnpo" else num_tokens,
            num_samples=num_samples,
        )
        # bnpo averages over each micro-batch, and the micro-batches count alike
        share = len(micro_batches) * ranks.size if config.loss_type == "bnpo" else 1
        return result.loss / share, result

    for iteration in range(config.num_iterations):
        meter = _Meter()
        for i in range(len(micro_batches)):
            loss, result = optimizer.backward(partial(loss_of, i))
            if iteration == 0 and config.num_iterations > 1:
                old[i] = result.logprobs
            meter.add(result.metrics, {"text": counts[i][0], "image": counts[i][1]}, loss)
        grad_norm = optimizer.step(ranks.sum_gradients)
    optimizer.schedule.step()
    policy.model.eval()
    return {**meter.reduce(ranks), **dropped, "grad_norm": grad_norm}


def _counts(part: RolloutChunk, config: Config) -> tuple[int, int]:
    """Tokens of the text and of the image."""
    return len(part.plans.values[_text_tokens(part, config)]), part.image_tokens.numel()


def _text_tokens(rollout: RolloutChunk, config: Config) -> slice | Tensor:
    """Those of the plans that train: an index on the CPU, or all."""
    if not config.mask_truncated_completions:
        return slice(None)
    return torch.repeat_interleave(~rollout.truncated, rollout.plans.lengths).nonzero()[:, 0]


def _train_mode(policy: Policy, config: Config) -> None:
    """In it alone, activations are recomputed and LoRA's dropout acts."""
    policy.model.train(config.gradient_checkpointing is True or config.lora_dropout > 0)


class _Meter:
    """Token-weighted means of the streams' metrics over micro-batches and ranks; maxima for the keys that say so.

    K metrics, the loss among them, which is a sum.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.values: list[Tensor] = []  # [K] of each micro-batch
        self.tokens: list[list[float]] = []

    def add(self, metrics: dict[str, Tensor], tokens: dict[str, int], loss: Tensor) -> None:
        self.keys = ["loss", *metrics]
        self.values.append(torch.stack([loss, *metrics.values()]))
        self.tokens.append([1.0, *(float(tokens[key.partition("/")[0]]) for key in metrics)])

    def reduce(self, ranks: Ranks) -> dict[str, Tensor]:
        values = torch.stack(self.values)
        weights = upload(torch.tensor(self.tokens), values.device).to(values)
        totals = ranks.sum(torch.stack([(values * weights).sum(0), weights.sum(0)]))
        largest = ranks.max(values.amax(0))
        sums, tokens = (dict(zip(self.keys, row.unbind(), strict=True)) for row in totals)
        result = {}
        for i, key in enumerate(self.keys):
            result[key] = largest[i] if key.endswith("/ratio_max") else sums[key] / tokens[key].clamp(min=1)
        result["loss"] = sums["loss"]
        for name in ("kl", "entropy"):
            if parts := [key for key in self.keys if key.endswith(f"/{name}")]:
                result[name] = sum(sums[key] for key in parts) / sum(tokens[key] for key in parts).clamp(min=1)
        return result
