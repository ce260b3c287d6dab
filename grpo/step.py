"""One BiCoT-GRPO update: from a rollout and its advantages to new weights and metrics.

Shapes: S samples on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

Ahead = list[list[TokenStream]]  # the streams of the first micro-batch, which `update` takes out


def _sequences(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config, names: Sequence[str]
) -> list[Stream]:
    """The sequences of these streams: plans, pictures, and for guided log-probs also unconditional pictures."""
    prompts, plans, image_prompts, tokens = rollout.ids
    pictures = policy.image_ids(tokens)
    streams: dict[str, list[Stream]] = {"text": [(prompts, plans)], "image": [(image_prompts, pictures)]}
    if _guided(config):
        streams["image"].append(([encoder.unconditional_ids(len(prompt)) for prompt in image_prompts], pictures))
    return [stream for name in names for stream in streams[name]]


def _guided(config: Config) -> bool:
    return config.policy_logits == "guided" and config.cfg_weight != 1


def token_streams(
    policy: Policy,
    rollout: RolloutChunk,
    encoder: PromptEncoder,
    config: Config,
    names: Sequence[str] = STREAMS,
) -> list[TokenStream]:
    """Run the forward pass of a micro-batch -> the text stream (plans), the image stream (pictures), or both."""
    hidden = policy.hidden(*_sequences(policy, rollout, encoder, config, names))
    streams = []
    if "text" in names:
        streams.append(_text_stream(policy, rollout, config, hidden.pop(0)))
    if "image" in names:
        streams.append(_image_stream(policy, rollout, config, *hidden))
    return streams


def _text_stream(policy: Policy, rollout: RolloutChunk, config: Config, hidden: Tensor) -> TokenStream:
    trained = _text_tokens(rollout, config)
    on_device: slice | Tensor = slice(None)
    if isinstance(trained, Tensor):  # indexing with all tokens would copy the gradient
        on_device = upload(trained, policy.device)
        hidden = hidden[on_device]
    return TokenStream(
        targets=upload(rollout.plans.values[trained], policy.device),
        sample=upload(torch.repeat_interleave(rollout.plans.lengths)[trained], policy.device),
        hidden=hidden,
        weight=policy.text_head.weight,
        bias=policy.text_head.bias,
        sampling_logprob=rollout.plan_logprobs.values[on_device] if _needs_sampling_logprobs(config) else None,
        temperature=config.temperature,
        name="text",
    )


def _image_stream(
    policy: Policy, rollout: RolloutChunk, config: Config, hidden: Tensor, unconditional: Tensor | None = None
) -> TokenStream:
    num_samples, num_tokens = rollout.image_tokens.shape
    features, sampled = policy.image_features(hidden), rollout.image_logprobs
    if unconditional is not None:  # the head is linear, so guided features give guided logits
        other = policy.image_features(unconditional)
        other = other.detach() if config.detach_uncond else other
        features, sampled = other + config.cfg_weight * (features - other), rollout.guided_logprobs
    return TokenStream(
        targets=rollout.image_tokens.flatten(),
        sample=torch.arange(num_samples, device=policy.device).repeat_interleave(num_tokens),
        hidden=features,
        weight=policy.image_head.weight,
        bias=policy.image_head.bias,
        sampling_logprob=sampled.flatten() if _needs_sampling_logprobs(config) else None,
        temperature=config.image_temperature,
        name="image",
    )


def _needs_sampling_logprobs(config: Config) -> bool:
    return config.importance_sampling_correction or config.off_policy_mask_threshold is not None


@record_function("reference")
@torch.no_grad()
def reference_logprobs(
    reference: Policy,
    micro_batches: list[RolloutChunk],
    encoder: PromptEncoder,
    config: Config,
    passes: list[RolloutChunk] | None = None,
) -> list[dict[str, Tensor]]:
    """Log-probs of every token under the reference model, from which the loss computes the KL, for each micro-batch.

    A stream without KL is left out, so that it costs no forward pass. With LoRA, the reference model is the policy
    without adapters. Both could share a forward pass, but it would contain each sequence twice and save no matrix
    product.

    Args:
        passes: `reference_passes` over the same samples; None = one forward pass for each micro-batch.
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
            own[name] = part.clone()  # a copy is aligned, which Triton's kernels were compiled for
    return each


def reference_passes(
    reference: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config
) -> list[RolloutChunk] | None:
    """With `micro_batch_tokens`, the parts of the rollout for the reference's forward passes; otherwise None.

    A pass without gradients needs less memory, so its parts are larger than the micro-batches of training.
    """
    if config.micro_batch_tokens is None:
        return None
    shape = Shape.of(reference.config, reference.dtype.itemsize)
    most = reference_tokens(shape, int(config.micro_batch_tokens), config.gradient_checkpointing)
    return _by_tokens(reference, rollout, encoder, config, config.kl_streams, most)


def micro_batches_of(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config
) -> list[RolloutChunk]:
    """The micro-batches of a rollout: at most `micro_batch_tokens` tokens each, or else as `split` makes them."""
    if config.micro_batch_tokens is None:
        return split(rollout, config)
    return _by_tokens(policy, rollout, encoder, config, STREAMS, int(config.micro_batch_tokens))


def _by_tokens(
    policy: Policy, rollout: RolloutChunk, encoder: PromptEncoder, config: Config, names: Sequence[str], most: int
) -> list[RolloutChunk]:
    counts = token_counts(_sequences(policy, rollout.on_host(), encoder, config, names))
    starts = cut(*counts, config.num_generations, most)
    return [rollout[start:end] for start, end in pairwise([*starts, len(rollout)])]


def cut(alone: Sequence[int], more: Sequence[int], group: int, most: int) -> list[int]:
    """The samples at which parts of at most `most` tokens begin.

    A group with more tokens is cut between its samples. A sample is never cut.

    Args:
        alone: [S] number of tokens of each sample if a part begins with it.
        more: [S] number of tokens that each sample adds if the sample before it is in the same part.
        group: number of samples for each prompt.
        most: maximum number of tokens in a part.
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
    """Cut a rollout into micro-batches of whole groups.

    Their ids are on the host, so that preparing a forward pass does not wait for the GPU to finish the one before.
    """
    size, rollout = config.micro_batch, rollout.on_host()
    return [rollout[start : start + size] for start in range(0, len(rollout), size)]


def skips_groups(config: Config) -> bool:
    """Whether `update` leaves out groups whose advantages are all 0.

    It does so if only the advantages cause gradients, which a KL or an entropy bonus would too. Three more settings
    exclude it: bnpo, whose normaliser counts the tokens of each micro-batch; token weights, whose function sees the
    whole micro-batch; and DeepSpeed, which needs the same number of micro-batches on each rank.
    """
    other = (
        config.kl_streams
        or config.entropy_target is not None
        or any(config.of_stream(stream)["entropy_coef"] for stream in STREAMS)
    )
    return not (other or config.loss_type == "bnpo" or config.token_weights or config.deepspeed)


def begins_early(config: Config) -> bool:
    """Whether `begin` may run before the scores are known.

    It may not with DeepSpeed, which runs the forward and backward pass of a micro-batch in one call; with LoRA's
    dropout, since rewards could draw from the same random generator meanwhile; or with `skips_groups`, since the
    groups of this micro-batch may be left out.
    """
    return not (config.deepspeed or config.lora_dropout or skips_groups(config))


def _groups_that_train(
    policy: Policy, micro_batches: list[RolloutChunk], advantages: Tensor, encoder: PromptEncoder, config: Config
) -> tuple[list[RolloutChunk], Tensor]:
    """The micro-batches and advantages without the groups whose advantages are all 0."""
    size = config.num_generations
    trains = (advantages.view(-1, size) != 0).any(1).tolist()
    if all(trains):
        return micro_batches, advantages
    if not any(trains):  # keep one sample: other ranks and AdamW need gradients, even if they are 0
        return [micro_batches[0][:1]], advantages[:1]
    kept, first = list[RolloutChunk](), 0
    for part in micro_batches:  # a micro-batch may begin and end within a group
        edges = [0, *(at for at in range(1, len(part)) if (first + at) % size == 0), len(part)]
        kept += [part[start:end] for start, end in pairwise(edges) if trains[(first + start) // size]]
        first += len(part)
    joined = RolloutChunk.cat(kept)
    return micro_batches_of(policy, joined, encoder, config), advantages.view(-1, size)[trains].flatten()


@record_function("forward")
def begin(policy: Policy, micro_batches: list[RolloutChunk], encoder: PromptEncoder, config: Config) -> Ahead:
    """Run the first forward pass of `update` while the rewards are at work. It needs no advantages."""
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
    """Make `num_iterations` optimizer updates on one rollout.

    Args:
        micro_batches: `micro_batches_of` this rank's rollout.
        advantages: [S] of this rank's samples, on the CPU.
        reference: `reference_logprobs` of the micro-batches; None if beta is 0 for both streams.
        ahead: what `begin` returned, if it was called. `update` empties it, to free its memory as early as possible.

    Returns:
        Metrics of the last iteration as scalars on the device. They are means over the tokens of the whole step. With
        `skips_groups` they are means over the groups that remain, and `samples_dropped` is the share of the samples
        that were left out.
    """
    tokens = float(sum(sum(_counts(part, config)) for part in micro_batches))
    num_tokens = ranks.sum(torch.full((), tokens, device=policy.device))
    num_samples, dropped = len(advantages) * ranks.size, {}
    if skips_groups(config):
        before = len(advantages)
        micro_batches, advantages = _groups_that_train(policy, micro_batches, advantages, encoder, config)
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
        streams = _with_options(streams, old[i], reference[i] if reference else {}, config)
        if weigh:
            streams = [replace(stream, token_weight=weigh(stream, mine)) for stream in streams]
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
        # bnpo's loss is a mean over each micro-batch, so the step's loss is the mean over micro-batches
        share = len(micro_batches) * ranks.size if config.loss_type == "bnpo" else 1
        return result.loss / share, result

    for iteration in range(config.num_iterations):
        meter = _Meter()
        for i in range(len(micro_batches)):
            loss, result = optimizer.backward(partial(loss_of, i), ranks, last=i + 1 == len(micro_batches))
            if iteration == 0 and config.num_iterations > 1:
                old[i] = result.logprobs
            meter.add(result.metrics, {"text": counts[i][0], "image": counts[i][1]}, loss)
        grad_norm = optimizer.step(ranks)
    optimizer.schedule.step()
    _set_mode(policy, training=False)
    return {**meter.reduce(ranks), **dropped, "grad_norm": grad_norm}


def _with_options(
    streams: list[TokenStream], old: Sequence[Tensor] | None, reference: Mapping[str, Tensor], config: Config
) -> list[TokenStream]:
    """The streams with their log-probs before the update and under the reference model, and with their settings."""
    before: Sequence[Tensor | None] = old or [None] * len(streams)
    return [
        replace(s, old_logprob=lpo, ref_logprob=reference.get(s.name), **config.of_stream(s.name))
        for s, lpo in zip(streams, before, strict=True)
    ]


def _counts(part: RolloutChunk, config: Config) -> tuple[int, int]:
    """Number of text tokens that are trained, and of image tokens."""
    return len(part.plans.values[_text_tokens(part, config)]), part.image_tokens.numel()


def _text_tokens(rollout: RolloutChunk, config: Config) -> slice | Tensor:
    """Which tokens of the plans are trained: indices on the CPU, or a slice of all."""
    if not config.mask_truncated_completions:
        return slice(None)
    return torch.repeat_interleave(~rollout.truncated, rollout.plans.lengths).nonzero()[:, 0]


def _train_mode(policy: Policy, config: Config) -> None:
    """Switch on training mode if it is needed: for recomputing activations or for LoRA's dropout."""
    _set_mode(policy, training=policy.recomputes is True or config.lora_dropout > 0)


def _set_mode(policy: Policy, training: bool) -> None:
    if policy.model.training != training:  # setting it in all modules takes milliseconds, in which a GPU is idle
        policy.model.train(training)


class _Meter:
    """Reduces K metrics over micro-batches and ranks.

    The loss is summed, `…/ratio_max` is a maximum, and all others are means over the tokens of their stream.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.values: list[Tensor] = []  # [K] for each micro-batch
        self.tokens: list[list[float]] = []  # the weight of each value

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
