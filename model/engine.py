"""The rollout engine takes prompts, and yields plans, image tokens, their log-probabilities and pictures, in chunks.

Both stages read the policy's own parameters, so a rollout follows the latest optimizer step. A plan takes one sequence
and usually fewer than a hundred steps. A guided picture takes two sequences and T = 576 steps. A step reads all weights
however many sequences it decodes, so the batches are as large as possible: all plans are written in one batch, if
`max_rows` and the KV cache allow it, and then the pictures are drawn in chunks. (Drawing the first pictures while the
last plans are written would save no steps, and each such step would read both heads.)

Every random number depends on (seed, sample, stage, position) only, so a sample's tokens do not depend on its chunk.

Shapes: S samples of a chunk, T image tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.kv_pool import FP8, converts_fp8
from .chunk import Clock, RolloutChunk, Span
from .decoder import Decoder
from .graphs import StepGraphs, use_graphs
from .kv import KVPool
from .packed import Packed
from .policy import Policy
from .prompts import PromptEncoder
from .settings import Sampling
from .stages import CachedSequence, ImageStage, PlanStage
from .weights import Weights

KVDtype = Literal["auto", "fp8"]
T = TypeVar("T")


def _slices(samples: Sequence[T], most: int) -> list[Sequence[T]]:
    return [samples[start : start + most] for start in range(0, len(samples), most)]


_NO_LOGPROBS = torch.empty(0)  # for a plan that was given, not sampled


@dataclass
class _Sample:
    """A sample of the rollout. It has its prompt first, then also its plan, and then the prompt of its picture."""

    number: int
    prompt: str
    prompt_ids: list[int]  # one list for the whole group
    image_prompt: int  # slots of the picture's prompt in the KV cache; an upper bound until there is a plan
    plan: list[int] = field(default_factory=list)
    plan_logprobs: Tensor = _NO_LOGPROBS
    text: str = ""
    image_ids: list[int] = field(default_factory=list)


def _plan_slots(batch: Sequence[_Sample], limit: int) -> int:
    """Number of slots for the plans of a batch: those of one prompt for each group, and `limit` for each plan."""
    prompts = {id(sample.prompt_ids): len(sample.prompt_ids) - 1 for sample in batch}
    return sum(prompts.values()) + len(batch) * limit


def _image_slots(batch: Sequence[_Sample], length: int, sequences_per_sample: int) -> int:
    """Number of slots for the pictures of a batch: their prompts, one shared unconditional prompt, and their tokens."""
    lengths = [sample.image_prompt for sample in batch]
    shared = max(lengths) if sequences_per_sample == 2 else 0
    return sum(lengths) + shared + len(batch) * sequences_per_sample * length


class RolloutEngine:
    """Samples plans and pictures from a policy. On a GPU it works on CUDA streams of its own.

    The constructor makes the q, k, v weights of each layer views of one tensor, and also gate and up. The Parameter
    objects and their values stay the same.

    Args:
        policy: the model to sample from, with the weights that it has at each call of `generate`.
        encoder: writes the prompts of both stages.
        max_rows: maximum number of sequences in a decode step. A picture with guidance counts as two.
        max_context: maximum number of tokens in a sequence; None = the model's limit.
        cuda_graphs: whether decode steps are CUDA graphs; "auto" = on a GPU, if Triton's kernels take the dtype.
        kv_dtype: "auto" = the policy's dtype; "fp8" = float8_e4m3fn with a scale for each token and head.
        kv_bytes: maximum size of the KV cache; None = half of a GPU's free memory. It limits the size of a chunk.
        kv_release: free the KV cache at the end of each rollout. CUDA graphs are then captured again in each rollout.

    Raises:
        ValueError: CUDA graphs without a GPU or without Triton's kernels, an fp8 cache on a GPU that cannot convert it,
            or a model that the engine cannot decode.
    """

    @torch.inference_mode(False)  # training cannot use tensors that are made in this mode
    def __init__(
        self,
        policy: Policy,
        encoder: PromptEncoder,
        *,
        max_rows: int = 256,
        max_context: int | None = None,
        cuda_graphs: bool | Literal["auto"] = "auto",
        kv_dtype: KVDtype = "auto",
        kv_bytes: int | None = None,
        kv_release: bool = False,
    ) -> None:
        max_context = min(max_context or policy.max_context, policy.max_context)
        self.encoder = replace(encoder, max_context=min(max_context, encoder.max_context))
        self.policy, self.max_rows, self.device = policy, max_rows, policy.device
        on_gpu = self.device.type == "cuda"
        graphs = use_graphs(cuda_graphs, self.device, policy.dtype)
        if kv_dtype == "fp8" and on_gpu and not converts_fp8(self.device):
            raise ValueError('kv_dtype="fp8" needs a GPU of compute capability 8.9 or more; use "auto"')
        self.weights = Weights(policy)
        dtype = FP8 if kv_dtype == "fp8" else policy.dtype
        self.pool, self.kv_release = KVPool(policy.config.text_config, dtype, self.device, kv_bytes), kv_release
        # a higher priority than that of the rewards, which work at the same time on streams of the default priority
        self.decode_stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self.picture_stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self.graphs = StepGraphs(self.decode_stream if graphs else None)
        self.decoder = Decoder(policy, self.weights, self.pool, max_context, self.graphs)
        self.weights.image_decoder.graphs = StepGraphs(self.picture_stream if graphs else None)
        self.plan_stage: PlanStage | None = None
        self.image_stages: dict[int, ImageStage] = {}  # by the number of sequences per sample

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        group_size: int,
        sampling: Sampling,
        seed: int,
        first_sample: int | list[int] = 0,
        plans: Sequence[str | None] | None = None,
    ) -> Iterator[RolloutChunk]:
        """Yield chunks that together hold `group_size` samples of every prompt, in order.

        Work on the CUDA stream that is current when a chunk is yielded sees the chunk complete. On a GPU, the next
        chunk is drawn while the pictures of this one are decoded and while the caller works on it.

        Args:
            prompts: raw prompts.
            group_size: G.
            sampling: temperatures, truncation and guidance.
            seed: of this rollout, 64 bits.
            first_sample: number of the first sample. Ranks that share a step need different numbers. A list gives the
                number of each prompt's first sample.
            plans: None = sample them; otherwise the text of each prompt's plan, where None = draw without a plan.

        Raises:
            ValueError: an empty prompt, or one too long for the context, before anything is sampled; a prompt or plan
                (named) that leaves no room for the picture in the context or the KV cache; logits that are not finite.
        """
        with record_function("tokenizer"):
            samples = self._samples(prompts, group_size, sampling.max_completion_length, first_sample, plans)
        if self.decode_stream:
            self.decode_stream.wait_stream(torch.cuda.current_stream(self.device))  # the optimizer may still be writing
        with self._on(self.decode_stream, self.picture_stream):
            if self.weights.refresh():
                self.graphs.clear()
        sequences_per_sample = 1 if sampling.cfg_weight == 1 else 2
        most_images = self._most_images(sequences_per_sample)
        plan_slots = partial(_plan_slots, limit=sampling.max_completion_length)
        image_slots = partial(
            _image_slots, length=self.policy.num_image_tokens, sequences_per_sample=sequences_per_sample
        )
        # reserve once, for plans of any length: if the pool grows later, all graphs must be captured again
        self._reserve(
            [plan_slots(batch) for batch in _slices(samples if plans is None else [], self.max_rows)]
            + [image_slots(batch) for batch in _slices(samples, most_images)]
        )
        for planned in self._batches(samples, self.max_rows, plan_slots) if plans is None else [samples]:
            with self._on(self.decode_stream):
                # for each batch, since another rollout may have begun in between
                self._prepare(len(samples), sequences_per_sample, sampling, plans is None)
                clock = Clock(self.device)
                if plans is None:
                    self._write_plans(planned, sampling, seed)
                spans = [clock.lap("plan")]
            for batch in self._batches(planned, most_images, image_slots):
                with self._on(self.decode_stream):
                    clock = Clock(self.device)
                    drawn = self._draw(batch, sequences_per_sample, sampling, seed)
                    spans.append(clock.lap("draw"))
                with self._on(self.picture_stream, self.decode_stream):
                    clock = Clock(self.device)
                    images = self.weights.image_decoder(drawn[0])
                    spans.append(clock.lap("decode"))
                yield self._chunk(batch, drawn, images, tuple(spans))
                spans = []
        if self.kv_release:  # the current stream, which frees the memory, has waited for the last chunk
            self.graphs.clear()
            self.pool.release()

    def _samples(
        self,
        prompts: Sequence[str],
        group_size: int,
        limit: int,
        first_sample: int | list[int],
        plans: Sequence[str | None] | None,
    ) -> list[_Sample]:
        """The samples of a rollout, with the ids of their first prompts. Raises ValueError as `generate` does."""
        prompt_ids: list[list[int]] = [[] for _ in prompts]
        if plans is None:
            for prompt in prompts:  # one that leaves no room for its picture, even without a plan, is an error now
                self.encoder.image_ids(prompt, "", self.policy.num_image_tokens)
            prompt_ids = [self.encoder.plan_ids(prompt, limit) for prompt in prompts]
        # The text of the picture's prompt is shorter than the plan's prompt and the plan together. But encoding the
        # plan's text may give more tokens than were sampled, so there is room for a quarter more.
        longest, room = limit + limit // 4, self.encoder.max_context - self.policy.num_image_tokens - 1
        first = first_sample
        if isinstance(first, int):
            first = list(range(first, first + len(prompts) * group_size, group_size))
        samples = [
            _Sample(first[i] + g, prompts[i], ids, min(len(ids) + longest, room))
            for i, ids in enumerate(prompt_ids)
            for g in range(group_size)
        ]
        for sample, plan in zip(samples, [plan for plan in plans or () for _ in range(group_size)], strict=False):
            self._ask_for_picture(sample, plan)
        return samples

    def _on(
        self, stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None = None
    ) -> AbstractContextManager[Any]:
        """Inside, work goes to `stream`, after the work that `after` has now. Without a GPU this does nothing."""
        if stream and after:
            stream.wait_stream(after)
        return torch.cuda.stream(stream) if stream else nullcontext()

    def _most_images(self, sequences_per_sample: int) -> int:
        return max(1, self.max_rows // sequences_per_sample)

    def _reserve(self, tokens: Sequence[int]) -> None:
        """Let the KV cache grow until it holds the largest of `tokens`, or to its limit."""
        if self.pool.reserve(max(tokens, default=0)):
            self.graphs.clear()

    def _prepare(self, samples: int, sequences_per_sample: int, sampling: Sampling, plan: bool) -> None:
        """Make the stages, and capture the graphs that the samples need before the first step."""
        limit, length, most = sampling.max_completion_length, self.policy.num_image_tokens, self.max_rows
        if self.plan_stage is None or (plan and self.plan_stage.length != limit):
            self.graphs.clear()
            self.plan_stage = PlanStage(self.decoder, self.graphs, most, limit)
        images = self._most_images(sequences_per_sample)
        if sequences_per_sample not in self.image_stages:
            stage = ImageStage(self.decoder, self.graphs, images, sequences_per_sample, length)
            self.image_stages[sequences_per_sample] = stage
        if self.graphs.missing and os.environ.get("RANK", "0") == "0":
            print("capturing the CUDA graphs of rollouts, which takes some seconds", file=sys.stderr, flush=True)
        self.decoder.prepare()
        if plan:
            self.plan_stage.prepare(min(samples, most), self.policy.tokenizer.eos_token_id, sampling)
        chunks = {len(chunk) for chunk in _slices(range(samples), images)}  # sizes: full ones, and the last one
        for size in chunks:
            self.image_stages[sequences_per_sample].prepare(size, sampling)
        if self.weights.image_decoder.graphs.missing:
            with self._on(self.picture_stream, self.decode_stream):
                for size in chunks:
                    self.weights.image_decoder(torch.zeros(size, length, dtype=torch.int64, device=self.device))

    def _batches(
        self, samples: Sequence[_Sample], most: int, slots: Callable[[Sequence[_Sample]], int]
    ) -> Iterator[Sequence[_Sample]]:
        """Split the samples into batches of at most `most` that fit the KV cache, which grows if it can.

        `slots` says how many slots of the cache a batch takes.
        """
        self._reserve([slots(batch) for batch in _slices(samples, most)])
        for sample in samples:
            if slots([sample]) > self.pool.capacity:
                raise ValueError(
                    f"a prompt does not fit the KV cache: it needs {slots([sample])} tokens, {self.pool.capacity} fit, "
                    f"at {self.pool.bytes_per_token} bytes each; raise rollout_kv_gib (kv_bytes of the engine), lower "
                    f"max_completion_length, or shorten the prompt: {sample.prompt[:120]!r}"
                )
        start = 0
        while start < len(samples):
            stop = start + 1
            while stop < min(start + most, len(samples)) and slots(samples[start : stop + 1]) <= self.pool.capacity:
                stop += 1
            yield samples[start:stop]
            start = stop

    def _write_plans(self, samples: Sequence[_Sample], sampling: Sampling, seed: int) -> None:
        """Stage 1: write the plan of each sample. The prompt of a group is prefilled once."""
        limit = sampling.max_completion_length
        assert self.plan_stage
        self.pool.reset()
        prompts = {id(sample.prompt_ids): sample.prompt_ids for sample in samples}
        starts = {key: self.pool.take(len(ids) - 1) for key, ids in prompts.items()}
        self.decoder.prefill([ids[:-1] for ids in prompts.values()], list(starts.values()))
        sequences = [
            CachedSequence(starts[id(s.prompt_ids)], len(s.prompt_ids) - 1, self.pool.take(limit), 0, s.number)
            for s in samples
        ]
        eos = self.policy.tokenizer.eos_token_id
        plans, logprobs = self.plan_stage.run(sequences, [s.prompt_ids[-1] for s in samples], eos, sampling, seed)
        with record_function("tokenizer"):
            for sample, plan, logprob in zip(samples, plans, logprobs, strict=True):
                sample.plan, sample.plan_logprobs = plan, logprob
                self._ask_for_picture(sample, self.encoder.decode_plan(plan))

    def _ask_for_picture(self, sample: _Sample, plan: str | None) -> None:
        sample.text = plan or ""
        sample.image_ids = self.encoder.image_ids(sample.prompt, plan, self.policy.num_image_tokens)
        sample.image_prompt = len(sample.image_ids) - 1

    def _draw(
        self, samples: Sequence[_Sample], sequences_per_sample: int, sampling: Sampling, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 2: draw the pictures -> tokens, conditional and guided log-probabilities, each [S, T].

        An unconditional prompt is BOS, pad tokens and `<begin_of_image>`, as long as the conditional one. So the
        longest one is prefilled, and every sample uses as much of it as it needs as a shared prefix.
        """
        length = self.policy.num_image_tokens
        self.pool.reset()
        prompts = [s.image_ids[:-1] for s in samples]
        starts = [self.pool.take(len(prompt) + length) for prompt in prompts]
        conditional = [
            CachedSequence(0, 0, start, len(prompt), sample.number)
            for sample, prompt, start in zip(samples, prompts, starts, strict=True)
        ]
        unconditional = []
        if sequences_per_sample == 2:
            longest = max(map(len, prompts))
            shared = self.pool.take(longest)
            unconditional = [CachedSequence(shared, len(p), self.pool.take(length), 0, 0) for p in prompts]
            prompts.append(self.encoder.unconditional_ids(longest + 1)[:-1])
            starts.append(shared)
        self.decoder.prefill(prompts, starts)
        stage = self.image_stages[sequences_per_sample]
        return stage.run(conditional, unconditional, self.encoder.boi_token_id, sampling, seed)

    def _chunk(
        self, samples: Sequence[_Sample], drawn: tuple[Tensor, Tensor, Tensor], images: Tensor, spans: tuple[Span, ...]
    ) -> RolloutChunk:
        """The chunk of a batch. The current stream waits until it is complete, so that it may use and free it."""
        if self.decode_stream and self.picture_stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.decode_stream)
            current.wait_stream(self.picture_stream)
            drawn[0].record_stream(self.picture_stream)
            for tensor in (*drawn, images, *(s.plan_logprobs for s in samples if s.plan)):
                tensor.record_stream(current)
        eos = self.policy.tokenizer.eos_token_id
        tokens, logp, guided = drawn
        return RolloutChunk(
            prompts=Packed.of([s.prompt_ids for s in samples]),
            plans=Packed.of([s.plan for s in samples]),
            plan_logprobs=Packed.of([s.plan_logprobs for s in samples]),
            plan_texts=[s.text for s in samples],
            truncated=torch.tensor([bool(s.plan) and s.plan[-1] != eos for s in samples]),
            image_prompts=Packed.of([s.image_ids for s in samples]),
            image_tokens=tokens,
            image_logprobs=logp,
            guided_logprobs=guided,
            images=images,
            spans=spans,
        )
