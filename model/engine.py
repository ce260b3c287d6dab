"""The rollout engine: prompts in; plans, image tokens, their log-probs and the pictures out, chunk by chunk.

Shapes: B prompts of a chunk, G samples each, S = B·G samples, T image tokens, V a head's vocabulary. Both stages read
the policy's own parameters, so a rollout follows the latest optimizer step.

Each draw is keyed by (seed, sample, stage, position): a sample's tokens do not depend on its chunk or on the other
samples in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cfg_sample import Draw, cfg_sample
from .cache import SlotCache
from .packed import Packed, right_pad
from .policy import Head, Policy
from .prompts import PromptEncoder
from .settings import Sampling

_IMAGE_STAGE = 1 << 31  # added to the position, so that the two stages of a sample never share a counter


@dataclass(frozen=True)
class RolloutChunk:
    """S samples, whole groups, in the order of the prompts.

    Args:
        prompts: Packed int64, stage-1 prompt ids.
        plans: Packed int64, plan ids up to and including the first EOS.
        plan_logprobs: Packed float32, of the plan tokens at the sampling temperature.
        plan_texts: the plans as text.
        truncated: [S] bool, plans that reached max_completion_length without EOS.
        image_prompts: Packed int64, stage-2 prompt ids with `<begin_of_image>` last.
        image_tokens: [S, T] int64.
        image_logprobs, guided_logprobs: [S, T] float32, under the conditional and the guided distribution.
        images: [S, 3, H, W] float32 in [0, 1].
        seconds: wall time of "plan", "draw" and "decode".
    """

    prompts: Packed
    plans: Packed
    plan_logprobs: Packed
    plan_texts: list[str]
    truncated: Tensor
    image_prompts: Packed
    image_tokens: Tensor
    image_logprobs: Tensor
    guided_logprobs: Tensor
    images: Tensor
    seconds: dict[str, float]

    def __len__(self) -> int:
        return len(self.plan_texts)

    def __getitem__(self, rows: slice) -> RolloutChunk:
        """Contiguous samples; `seconds` stays that of the whole."""
        return RolloutChunk(**{f.name: _rows(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def cat(cls, chunks: Sequence[RolloutChunk]) -> RolloutChunk:
        """The samples of all chunks, in order."""
        columns = {f.name: [getattr(chunk, f.name) for chunk in chunks] for f in fields(cls)}
        return cls(**{name: _join(column) for name, column in columns.items()})


def _rows(value, rows: slice):  # type: ignore[no-untyped-def]
    return value if isinstance(value, dict) else value[rows]


def _join(column: list):  # type: ignore[type-arg, no-untyped-def]
    first = column[0]
    if isinstance(first, dict):
        return {key: sum(value[key] for value in column) for key in first}
    if isinstance(first, list):
        return [item for value in column for item in value]
    return Packed.cat(column) if isinstance(first, Packed) else torch.cat(column)


class RolloutEngine:
    """Samples plans and pictures from a policy.

    Args:
        policy: whose weights are read at every call.
        encoder: writes the prompts of both stages.
        max_rows: most rows of one decode step; a sample takes one, and in the guided image stage two. The samples of
            one prompt stay together, so a group larger than this runs on its own.
    """

    def __init__(self, policy: Policy, encoder: PromptEncoder, *, max_rows: int = 256) -> None:
        self.policy = policy
        self.encoder = encoder
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], group_size: int, sampling: Sampling, seed: int, first_sample: int = 0
    ) -> Iterator[RolloutChunk]:
        """Yield chunks that together hold `group_size` samples of every prompt, in order.

        Args:
            prompts: raw prompts.
            group_size: G.
            sampling: temperatures, truncation and guidance.
            seed: of this rollout, 64 bits.
            first_sample: number of the first sample; a rank that generates a later part of a step starts there.

        Raises:
            ValueError: an empty or too long prompt (named), before anything is sampled; logits that are not finite.
        """
        room = sampling.max_completion_length
        plan_prompts = [self.encoder.plan_ids(prompt, room) for prompt in prompts]
        rows_per_sample = 1 if sampling.cfg_weight == 1 else 2
        per_chunk = max(1, self.max_rows // (group_size * rows_per_sample))
        for start in range(0, len(prompts), per_chunk):
            part = slice(start, start + per_chunk)
            first = first_sample + start * group_size
            yield self._chunk(prompts[part], plan_prompts[part], group_size, sampling, seed, first)

    def _chunk(
        self,
        prompts: Sequence[str],
        plan_prompts: list[list[int]],
        group_size: int,
        sampling: Sampling,
        seed: int,
        first_sample: int,
    ) -> RolloutChunk:
        policy, device = self.policy, self.policy.device
        samples = torch.arange(len(prompts) * group_size, device=device) + first_sample
        clock = _Clock(device)
        plans, plan_logprobs = self._write_plans(plan_prompts, group_size, sampling, seed, samples)
        clock.lap("plan")
        eos = policy.tokenizer.eos_token_id
        texts = [self.encoder.decode_plan(plan) for plan in plans]
        image_prompts = [
            self.encoder.image_ids(prompts[s // group_size], text, policy.num_image_tokens)
            for s, text in enumerate(texts)
        ]
        tokens, logp, guided = self._draw_images(image_prompts, sampling, seed, samples)
        clock.lap("draw")
        images = policy.decode_images(tokens)
        clock.lap("decode")
        return RolloutChunk(
            prompts=Packed.of([ids for ids in plan_prompts for _ in range(group_size)], device),
            plans=Packed.of(plans, device),
            plan_logprobs=Packed.of(plan_logprobs, device),
            plan_texts=texts,
            truncated=torch.tensor([plan[-1] != eos for plan in plans], device=device),
            image_prompts=Packed.of(image_prompts, device),
            image_tokens=tokens,
            image_logprobs=logp,
            guided_logprobs=guided,
            images=images,
            seconds=clock.seconds,
        )

    def _write_plans(
        self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int, samples: Tensor
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Stage 1. Each prompt is prefilled once; its keys and values are then copied to its G samples."""
        policy, device = self.policy, self.policy.device
        eos = policy.tokenizer.eos_token_id
        limit = sampling.max_completion_length
        cache, hidden = self._prefill(prompts, limit)
        groups = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        cache.take(groups)
        hidden = hidden[groups]
        running = torch.arange(len(samples), device=device)  # the samples still writing; finished ones leave the batch
        tokens = torch.full((len(samples), limit), eos, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(samples), limit, device=device)
        lengths = torch.full((len(samples),), limit, device=device)
        for t in range(limit):
            draw = cfg_sample(
                _logits(hidden, policy.text_head),
                None,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=seed,
                offset=(samples[running] << 32) + t,
            )
            tokens[running, t], logprobs[running, t] = draw.token, draw.logp_cond.float()
            ended = draw.token == eos
            lengths[running[ended]] = t + 1
            if ended.any():
                going = ended.logical_not().nonzero()[:, 0]
                running, token = running[going], draw.token[going]
                cache.take(going)
            else:
                token = draw.token
            if not len(running) or t + 1 == limit:
                break
            hidden = self._step(cache, policy.embed_text(token[:, None]))
        ends = lengths.tolist()
        plans = [row[:end] for row, end in zip(tokens.tolist(), ends, strict=True)]
        return plans, [row[:end] for row, end in zip(logprobs, ends, strict=True)]

    def _draw_images(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, samples: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 2 -> tokens, conditional and guided log-probs, each [S, T]. Rows are [conditional; unconditional]."""
        policy = self.policy
        guided = sampling.cfg_weight != 1
        rows = prompts + [self.encoder.unconditional_ids(len(p)) for p in prompts] if guided else prompts
        cache, hidden = self._prefill(rows, policy.num_image_tokens)
        draws: list[Draw] = []
        for t in range(policy.num_image_tokens):
            logits = _logits(policy.image_features(hidden), policy.image_head)
            cond, uncond = logits.chunk(2) if guided else (logits, None)
            draw = cfg_sample(
                cond,
                uncond,
                guidance=sampling.cfg_weight,
                temperature=sampling.image_temperature,
                top_k=sampling.image_top_k,
                top_p=sampling.image_top_p,
                seed=seed,
                offset=(samples << 32) + _IMAGE_STAGE + t,
            )
            draws.append(draw)
            if t + 1 < policy.num_image_tokens:
                embeds = policy.embed_image(draw.token[:, None])
                hidden = self._step(cache, embeds.repeat(2, 1, 1) if guided else embeds)
        tokens, logp, logp_guided = (torch.stack(column, dim=1) for column in zip(*draws, strict=True))
        return tokens, logp.float(), logp_guided.float()

    def _prefill(self, prompts: list[list[int]], room: int) -> tuple[SlotCache, Tensor]:
        """Run prompts of any lengths -> their cache, with `room` more tokens a row, and last hidden states [B, D]."""
        policy, device = self.policy, self.policy.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        num_layers = policy.config.text_config.num_hidden_layers
        cache = SlotCache(num_layers, int(lengths.max()) + room, device)
        cache.prefill(lengths)
        hidden = policy.decoder(
            inputs_embeds=policy.embed_text(right_pad(prompts, device)),
            position_ids=cache.slots,
            past_key_values=cache,
            use_cache=True,
        )[0]
        return cache, hidden[torch.arange(len(prompts), device=device), lengths.to(device) - 1]

    def _step(self, cache: SlotCache, embeds: Tensor) -> Tensor:
        """One more token a row: embeds [rows, 1, D] -> hidden [rows, D]."""
        cache.advance()
        return self.policy.decoder(
            inputs_embeds=embeds,
            position_ids=cache.slots,
            attention_mask=cache.mask(),
            past_key_values=cache,
            use_cache=True,
        )[0][:, 0]


def _logits(features: Tensor, head: Head) -> Tensor:
    return F.linear(features, head.weight, head.bias)


class _Clock:
    """Wall seconds between laps, the device's queue included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = now - self.start
        self.start = now
