"""The rollout engine: prompts in; plans, image tokens, their log-probs and the pictures out, chunk by chunk.

Both stages read the policy's own parameters, so a rollout follows the latest optimizer step. All plans are written in
one batch, as far as rows and memory go, before the pictures are drawn in chunks: a picture takes two rows and T = 576
steps, a plan one row and fewer than a hundred, and each step reads all weights whatever its rows. (Drawing the first
pictures while the last plans are written takes as many steps, and each of those reads both heads.)

Each draw is keyed by (seed, sample, stage, position): a sample's tokens do not depend on its chunk or on the other
samples in it.

Shapes: S samples of a chunk, T image tokens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.kv_pool import FP8, converts_fp8
from .decoder import Decoder
from .graphs import StepGraphs, use_graphs
from .kv import KVPool
from .packed import Packed
from .policy import Policy
from .prompts import PromptEncoder
from .settings import Sampling
from .stages import ImageStage, PlanStage, Row
from .weights import Weights

KVDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class Span:
    """A phase: its name, and its begin and end, as CUDA events on a GPU and as wall-clock seconds on a CPU."""

    name: str
    start: Any
    end: Any

    @property
    def seconds(self) -> float:
        """Waits for the phase to end."""
        if isinstance(self.start, float):
            return self.end - self.start
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@dataclass(frozen=True)
class RolloutChunk:
    """S consecutive samples, in the order of the prompts. What the host knows anyway stays there.

    Args:
        prompts: Packed int64 on the CPU, stage-1 prompt ids; empty where the plan was given.
        plans: Packed int64 on the CPU, plan ids up to and including the first EOS; empty likewise.
        plan_logprobs: Packed float32, of the plan tokens at the sampling temperature.
        plan_texts: the plans as text.
        truncated: [S] bool on the CPU, plans that reached max_completion_length without EOS.
        image_prompts: Packed int64 on the CPU, stage-2 prompt ids with `<begin_of_image>` last.
        image_tokens: [S, T] int64.
        image_logprobs, guided_logprobs: [S, T] float32, under the conditional and the guided distribution.
        images: [S, 3, H, W] float32 in [0, 1].
        spans: what "plan", "draw" and "decode" took; the plans of several chunks are one phase, of the first.
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
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.plan_texts)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; waits for the device."""
        return seconds_of(self.spans)

    @cached_property
    def ids(self) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
        """Prompts, plans, image prompts and image tokens as lists; the last are read from the device, once."""
        texts = (packed.tolist() for packed in (self.prompts, self.plans, self.image_prompts))
        return *texts, self.image_tokens.tolist()  # type: ignore[return-value]

    def on_host(self) -> RolloutChunk:
        """Itself; from now on nobody has to wait for its `ids`, or those of its parts."""
        _ = self.ids
        return self

    def __getitem__(self, rows: slice) -> RolloutChunk:
        """Contiguous samples; `spans` stay those of the whole."""
        part = RolloutChunk(**{f.name: _rows(getattr(self, f.name), rows) for f in fields(self)})
        if "ids" in vars(self):
            vars(part)["ids"] = tuple(column[rows] for column in self.ids)
        return part

    @classmethod
    def cat(cls, chunks: Sequence[RolloutChunk]) -> RolloutChunk:
        """The samples of all chunks, in order."""
        columns = {f.name: [getattr(chunk, f.name) for chunk in chunks] for f in fields(cls)}
        whole = cls(**{name: _join(column) for name, column in columns.items()})
        if all("ids" in vars(chunk) for chunk in chunks):
            vars(whole)["ids"] = tuple(_join(list(rows)) for rows in zip(*(chunk.ids for chunk in chunks), strict=True))
        return whole


def seconds_of(spans: Sequence[Span]) -> dict[str, float]:
    """By name, those of one name added up; waits for the device."""
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.name] = totals.get(span.name, 0.0) + span.seconds
    return totals


def _rows(value: Any, rows: slice) -> Any:
    return value if isinstance(value, tuple) else value[rows]


def _join(column: list[Any]) -> Any:
    first = column[0]
    if isinstance(first, (list, tuple)):
        return type(first)(item for value in column for item in value)
    return Packed.cat(column) if isinstance(first, Packed) else torch.cat(column)


def _slices(samples: Sequence[_Sample], most: int) -> list[Sequence[_Sample]]:
    return [samples[start : start + most] for start in range(0, len(samples), most)]


@dataclass
class _Sample:
    """One sample on its way: its prompt (ids shared with its group), then its plan, then the prompt of its picture."""

    number: int
    prompt: str
    prompt_ids: list[int]
    image_prompt: int  # tokens of the picture's prompt in the KV cache: how many, or at first how many at most
    plan: list[int] = field(default_factory=list)
    plan_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    text: str = ""
    image_ids: list[int] = field(default_factory=list)


class RolloutEngine:
    """Samples plans and pictures from a policy; on a GPU, on streams of its own.

    Building one makes the q, k, v and the gate, up weights of each layer views of common tensors: the same Parameter
    objects with the same values.

    Args:
        policy: whose weights are followed.
        encoder: writes the prompts of both stages.
        max_rows: most rows of one decode step; a sample takes one, and in the guided image stage two.
        max_context: most positions of a row; None = the model's.
        cuda_graphs: whether each decode step is one CUDA graph; "auto" = on a GPU where Triton takes the dtype.
        kv_dtype: "auto" = the policy's dtype; "fp8" = float8_e4m3fn with a scale for each token and head.
        kv_bytes: limit of the KV cache; None = half of a GPU's free memory. Chunks are as large as it allows.
        kv_release: give the KV cache back when a rollout has ended. Its CUDA graphs go with it: each rollout captures
            them anew.

    Raises:
        ValueError: CUDA graphs without a GPU or without Triton's kernels, an fp8 cache on a GPU that cannot convert it,
            or a model that the engine cannot decode.
    """

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
        # before rewards, which work beside them at the default priority
        self.decode_stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self.picture_stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self.graphs = StepGraphs(self.decode_stream if graphs else None)
        self.decoder = Decoder(policy, self.weights, self.pool, max_context, self.graphs)
        self.weights.image_decoder.graphs = StepGraphs(self.picture_stream if graphs else None)
        self.plan_stage: PlanStage | None = None
        self.image_stage: ImageStage | None = None

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

        A chunk is ready for the stream that is current when it is yielded. On a GPU the next chunk is drawn while the
        pictures of this one are decoded, and while the caller works on it.

        Args:
            prompts: raw prompts.
            group_size: G.
            sampling: temperatures, truncation and guidance.
            seed: of this rollout, 64 bits.
            first_sample: number of the first sample; a rank that generates a later part of a step starts there. Or of
                each prompt the number of its first sample.
            plans: None = sample them. Or of each prompt the text of its plan; None = a picture of the prompt alone.

        Raises:
            ValueError: an empty prompt, or one too long for the context or the KV cache (named), before anything is
                sampled; a plan that leaves no room for the picture; logits that are not finite.
        """
        limit = sampling.max_completion_length
        with record_function("tokenizer"):
            asked = [[] if plans is not None else self.encoder.plan_ids(prompt, limit) for prompt in prompts]
        # a request for a plan has all that a picture's has but the plan, whose text may take more tokens than it did
        longest, room = limit + limit // 4, self.encoder.max_context - self.policy.num_image_tokens - 1
        most = [min(len(ids) + longest, room) for ids in asked]
        first = first_sample
        if isinstance(first, int):
            first = list(range(first, first + len(prompts) * group_size, group_size))
        samples = [
            _Sample(first[i] + g, prompts[i], ids, most[i]) for i, ids in enumerate(asked) for g in range(group_size)
        ]
        for sample, plan in zip(samples, [plan for plan in plans or () for _ in range(group_size)], strict=False):
            self._ask_for_picture(sample, plan)
        if self.decode_stream:
            self.decode_stream.wait_stream(torch.cuda.current_stream(self.device))  # the optimizer may still be writing
        with self._on(self.decode_stream, self.picture_stream):
            if self.weights.refresh():
                self.graphs.clear()
        rows_per_image = 1 if sampling.cfg_weight == 1 else 2

        def plan_slots(part: Sequence[_Sample]) -> int:
            prompts = {id(sample.prompt_ids): len(sample.prompt_ids) - 1 for sample in part}
            return sum(prompts.values()) + len(part) * limit

        def image_slots(part: Sequence[_Sample]) -> int:
            lengths = [sample.image_prompt for sample in part]
            shared = max(lengths) if rows_per_image == 2 else 0
            return sum(lengths) + shared + len(part) * rows_per_image * self.policy.num_image_tokens

        most_images = self._most_images(rows_per_image)
        # now and for plans of any length: a pool that grew later would take its place, and the graphs, with it
        self._reserve(
            [plan_slots(part) for part in _slices(samples if plans is None else [], self.max_rows)]
            + [image_slots(part) for part in _slices(samples, most_images)]
        )
        with self._on(self.decode_stream):
            self._prepare(len(samples), rows_per_image, sampling, plans is None)

        for batch in self._parts(samples, self.max_rows, plan_slots) if plans is None else [samples]:
            with self._on(self.decode_stream):
                clock = Clock(self.device)
                if plans is None:
                    self._write_plans(batch, sampling, seed)
                spans = [clock.lap("plan")]
            for part in self._parts(batch, most_images, image_slots):
                with self._on(self.decode_stream):
                    clock = Clock(self.device)
                    drawn = self._draw(part, rows_per_image, sampling, seed)
                    spans.append(clock.lap("draw"))
                with self._on(self.picture_stream, self.decode_stream):
                    clock = Clock(self.device)
                    images = self.weights.image_decoder(drawn[0])
                    spans.append(clock.lap("decode"))
                yield self._chunk(part, drawn, images, tuple(spans))
                spans = []
        if self.kv_release:  # the current stream, which has the memory, is behind the last chunk
            self.graphs.clear()
            self.pool.release()

    def _on(
        self, stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None = None
    ) -> AbstractContextManager[Any]:
        """Work on `stream`, behind what `after` has been given; nothing of either without a GPU."""
        if stream and after:
            stream.wait_stream(after)
        return torch.cuda.stream(stream) if stream else nullcontext()

    def _most_images(self, rows_per_image: int) -> int:
        return max(1, self.max_rows // rows_per_image)

    def _reserve(self, tokens: Sequence[int]) -> None:
        """Let the KV cache grow towards the most of `tokens`."""
        if self.pool.reserve(max(tokens, default=0)):
            self.graphs.clear()

    def _prepare(self, samples: int, rows_per_image: int, sampling: Sampling, plan: bool) -> None:
        """The stages, and the graphs of prefills and of the largest batch of so many samples."""
        limit, length, most = sampling.max_completion_length, self.policy.num_image_tokens, self.max_rows
        if self.plan_stage is None or (plan and self.plan_stage.length != limit):
            self.graphs.clear()
            self.plan_stage = PlanStage(self.decoder, self.graphs, most, 1, limit)
        if self.image_stage is None or self.image_stage.rows_per_sample != rows_per_image:
            self.graphs.clear()
            images = self._most_images(rows_per_image)
            self.image_stage = ImageStage(self.decoder, self.graphs, images, rows_per_image, length)
        if self.graphs.missing and os.environ.get("RANK", "0") == "0":
            print("capturing the CUDA graphs of rollouts, which takes some seconds", file=sys.stderr, flush=True)
        self.decoder.prepare()
        images = min(samples, self._most_images(rows_per_image))
        if plan:
            self.plan_stage.prepare(min(samples, most), self.policy.tokenizer.eos_token_id, sampling)
        self.image_stage.prepare(images, sampling)
        if self.weights.image_decoder.graphs.missing:
            with self._on(self.picture_stream, self.decode_stream):
                self.weights.image_decoder(torch.zeros(images, length, dtype=torch.int64, device=self.device))

    def _parts(
        self, samples: Sequence[_Sample], most: int, slots: Callable[[Sequence[_Sample]], int]
    ) -> Iterator[Sequence[_Sample]]:
        """Consecutive samples, as many at a time as `most` and the KV cache, which grows for them, allow."""
        self._reserve([slots(part) for part in _slices(samples, most)])
        for sample in samples:
            if slots([sample]) > self.pool.capacity:
                raise ValueError(
                    f"a prompt does not fit the KV cache: it needs {slots([sample])} tokens and {self.pool.capacity} "
                    f"fit, at {self.pool.bytes_per_token} bytes a token; raise kv_bytes, lower max_completion_length, "
                    f"or shorten it: {sample.prompt[:120]!r}"
                )
        start = 0
        while start < len(samples):
            stop = start + 1
            while stop < min(start + most, len(samples)) and slots(samples[start : stop + 1]) <= self.pool.capacity:
                stop += 1
            yield samples[start:stop]
            start = stop

    def _write_plans(self, samples: Sequence[_Sample], sampling: Sampling, seed: int) -> None:
        """Stage 1: fill in the plan of each sample. A prompt is prefilled once, for all of its group."""
        limit = sampling.max_completion_length
        assert self.plan_stage
        self.pool.reset()
        prompts = {id(sample.prompt_ids): sample.prompt_ids for sample in samples}
        starts = {key: self.pool.take(len(ids) - 1) for key, ids in prompts.items()}
        self.decoder.prefill([ids[:-1] for ids in prompts.values()], list(starts.values()))
        rows = [
            Row(starts[id(s.prompt_ids)], len(s.prompt_ids) - 1, self.pool.take(limit), 0, s.number) for s in samples
        ]
        eos = self.policy.tokenizer.eos_token_id
        plans, logprobs = self.plan_stage.run(rows, [s.prompt_ids[-1] for s in samples], eos, sampling, seed)
        with record_function("tokenizer"):
            for sample, plan, logprob in zip(samples, plans, logprobs, strict=True):
                sample.plan, sample.plan_logprobs = plan, logprob
                self._ask_for_picture(sample, self.encoder.decode_plan(plan))

    def _ask_for_picture(self, sample: _Sample, plan: str | None) -> None:
        sample.text = plan or ""
        sample.image_ids = self.encoder.image_ids(sample.prompt, plan, self.policy.num_image_tokens)
        sample.image_prompt = len(sample.image_ids) - 1

    def _draw(
        self, samples: Sequence[_Sample], rows_per_image: int, sampling: Sampling, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 2 -> tokens, conditional and guided log-probs, each [S, T].

        The unconditional row of length n reads BOS and n - 2 pads before `<begin_of_image>`: the beginning of the
        longest such prefix, which is written once for all of them.
        """
        length = self.policy.num_image_tokens
        assert self.image_stage
        self.pool.reset()
        prompts = [s.image_ids[:-1] for s in samples]
        starts = [self.pool.take(len(prompt) + length) for prompt in prompts]
        rows = [Row(0, 0, start, len(p), s.number) for s, p, start in zip(samples, prompts, starts, strict=True)]
        unconditional = []
        if rows_per_image == 2:
            longest = max(map(len, prompts))
            shared = self.pool.take(longest)
            unconditional = [Row(shared, len(p), self.pool.take(length), 0, 0) for p in prompts]
            prompts.append(self.encoder.unconditional_ids(longest + 1)[:-1])
            starts.append(shared)
        self.decoder.prefill(prompts, starts)
        return self.image_stage.run(rows, unconditional, self.encoder.boi_token_id, sampling, seed)

    def _chunk(
        self, samples: Sequence[_Sample], drawn: tuple[Tensor, Tensor, Tensor], images: Tensor, spans: tuple[Span, ...]
    ) -> RolloutChunk:
        """The samples as a chunk that the current stream may use."""
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


class Clock:
    """Begins with itself; `lap` ends a phase. Times the current stream of a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.start = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> Span:
        start, self.start = self.start, self._now()
        return Span(name, start, self.start)
