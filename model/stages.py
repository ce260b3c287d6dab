"""The two stages of a rollout decode a batch of sequences, one token of each per step.

A plan ends at EOS or at L tokens, and a picture after T tokens. Every tensor that a step reads or writes keeps its
address, so that a step can be one CUDA graph. Each sequence is described by nine integers on the device, so a finished
one is dropped without copying its KV cache.

Shapes: R sequences of a step, S samples, L maximum number of tokens of a sample (T for pictures), D hidden.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from ..kernels.cfg_sample import Draw, cfg_sample
from ..kernels.host import upload
from ..kernels.record_draw import record_draw
from .decoder import Decoder
from .graphs import StepGraphs
from .kv import SCRATCH
from .settings import Sampling

# The integers that describe a sequence: first slot and length of its shared prefix; first slot and length of its own
# keys, including those of this step's token; position and slot of this token; the index of the outputs where the drawn
# token is written, and the counter that keys its random number. LENGTH to COUNTER grow by ADVANCE at every step: 1, or
# 0 for a filler, which only fills the batch up to the size of a graph.
PREFIX_START, PREFIX_LENGTH, START, LENGTH, POSITION, SLOT, OUTPUT, COUNTER, ADVANCE = range(9)

POLL = 8  # maximum number of steps that the host launches before it checks which plans have ended
_BUCKETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
IMAGE_STAGE = 1 << 31  # added to the position, so that the two stages of a sample never share a counter


class CachedSequence(NamedTuple):
    """A sequence whose first tokens are in the KV cache: their slots, and the number of its sample."""

    prefix_start: int
    prefix_length: int
    start: int
    length: int
    sample: int


class Stage:
    """The buffers of one stage, and its decode step.

    Args:
        decoder: the forward pass.
        graphs: runs the step, as CUDA graphs or eagerly.
        samples: maximum number of samples in a step.
        sequences_per_sample: 1, or 2 if each sample has an unconditional sequence too.
        length: L.
    """

    def __init__(
        self, decoder: Decoder, graphs: StepGraphs, samples: int, sequences_per_sample: int, length: int
    ) -> None:
        self.decoder, self.weights, self.graphs = decoder, decoder.weights, graphs
        self.device = decoder.cos.device
        self.sequences_per_sample, self.length = sequences_per_sample, length
        # a divisor of L, so that every sample ends with the end of a graph
        self.steps_per_graph = max(n for n in range(1, POLL + 1) if length % n == 0) if graphs.enabled else 1
        most, embeddings = self.bucket(samples) * sequences_per_sample, self.weights.embed_text.tensor
        self.x = torch.zeros(most, embeddings.shape[1], dtype=decoder.cos.dtype, device=self.device)
        self.state = torch.zeros(ADVANCE + 1, most, dtype=torch.int64, device=self.device)
        self.running = torch.zeros(most, dtype=torch.bool, device=self.device)
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        # one element more than S·L, which fillers write
        self.tokens = torch.zeros(samples * length + 1, dtype=torch.int64, device=self.device)
        self.logp_cond = torch.zeros(samples * length + 1, dtype=torch.float32, device=self.device)
        self.logp_guided = torch.zeros_like(self.logp_cond)

    def bucket(self, samples: int) -> int:
        """The size that a batch of `samples` is filled up to. One graph serves all batches up to its size."""
        if not self.graphs.enabled:
            return samples
        at = bisect_left(_BUCKETS, samples)
        return _BUCKETS[at] if at < len(_BUCKETS) else -(-samples // 256) * 256

    def _capture(self, steps: dict[Hashable, Callable[[], None]]) -> None:
        """Capture the graphs that are missing. A capture runs each step once, on fillers, which change no result."""
        missing = {key: step for key, step in steps.items() if self.graphs.lacks(key)}
        if missing:
            self._fill(0, len(self.running))
        for key, step in missing.items():
            self.graphs.capture(key, step, self.steps_per_graph)

    def _begin(self, sequences: Sequence[CachedSequence], first: int, counter: int) -> None:
        """Describe the sequences in the buffers, from index `first` on, with fillers behind them."""
        state = [
            (*seq[:LENGTH], seq.length + 1, seq.prefix_length + seq.length, seq.start + seq.length, i * self.length,
             (seq.sample << 32) + counter, 1)
            for i, seq in enumerate(sequences)
        ]  # fmt: skip
        end = first + len(sequences)
        self.state[:, first:end] = upload(state, self.device).T
        self.running[first:end] = True
        self._fill(end, first + self.bucket(len(sequences)))

    def _fill(self, begin: int, end: int) -> None:
        """Put fillers at these indices. They use the scratch slot, and write to the last output, which nobody reads."""
        if begin == end:
            return
        fillers = self.state[:, begin:end]
        fillers.zero_()
        fillers[START] = fillers[SLOT] = SCRATCH
        fillers[LENGTH] = 1
        fillers[OUTPUT] = len(self.tokens) - 1
        self.x[begin:end] = 0
        self.running[begin:end] = False

    def _hidden(self, count: int) -> Tensor:
        """Run the step's forward pass for the first `count` sequences -> hidden states [R, D] of their tokens."""
        return self.decoder.step(self.x[:count], *self.state[: SLOT + 1, :count])

    def _record(self, draw: Draw, count: int, table: Tensor, **ends: Any) -> None:
        """Write the drawn tokens to the outputs, advance the sequences, and embed the tokens for the next step."""
        outputs, state = (self.tokens, self.logp_cond, self.logp_guided), self.state[:, :count]
        record_draw(draw, state, outputs, table, self.x[:count], grows=LENGTH, output=OUTPUT, **ends)

    def _drawn(self, output: Tensor, samples: int) -> Tensor:
        """Reshape an output to [S, L], for the first `samples`."""
        return output[: samples * self.length].view(samples, self.length)


class PlanStage(Stage):
    """Writes plans. Each sample is one sequence, which ends at its EOS or after L tokens, and then leaves the batch.

    Ids that the tokenizer does not have are never drawn. The log-probabilities are those of the softmax over all V
    logits nevertheless, as with top-k and top-p, because training computes these.
    """

    def __init__(self, decoder: Decoder, graphs: StepGraphs, samples: int, length: int) -> None:
        super().__init__(decoder, graphs, samples, 1, length)
        self.look = _Look(self.device, len(self.running))

    def prepare(self, samples: int, eos: int, sampling: Sampling) -> None:
        """Capture the graphs of a batch of `samples`, and of the smaller ones that it becomes."""
        sizes = sorted({self.bucket(n) for n in range(1, samples + 1)}) if self.graphs.enabled else []
        self._capture(dict(self._graph(size, eos, sampling) for size in sizes))

    def _graph(self, size: int, eos: int, sampling: Sampling) -> tuple[Hashable, Callable[[], None]]:
        own = (sampling.temperature, sampling.top_k, sampling.top_p)
        return ("plan", size, eos, *own), lambda: self._step(size, eos, sampling)

    @record_function("text decode")
    def run(
        self, sequences: Sequence[CachedSequence], last_tokens: Sequence[int], eos: int, sampling: Sampling, seed: int
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Decode until every sequence has drawn `eos` or L tokens.

        Args:
            sequences: one for each sample, with its whole prompt but the last token in the KV cache.
            last_tokens: the last prompt token of each.

        Returns:
            The plans, up to and including their first EOS, and the log-probabilities of their tokens.
        """
        samples = count = len(sequences)
        self.prepare(samples, eos, sampling)
        self.seed.fill_(seed)
        self.x[:samples] = F.embedding(upload(last_tokens, self.device), self.weights.embed_text.tensor)
        self._begin(sequences, 0, counter=0)
        look = self.look
        look.forget()
        for t in range(0, self.length, self.steps_per_graph):
            size = self.bucket(count)
            self.graphs.run(*self._graph(size, eos, sampling), self.steps_per_graph)
            running = look.next(self.running[:count], t)
            if running is None or all(running):
                continue
            going = [i for i, runs in enumerate(running) if runs]
            if not going:
                break
            if self.bucket(len(going)) < size:
                self._keep(going)
                count = len(going)
                look.forget()
        tokens = self._drawn(self.tokens, samples).tolist()
        ends = [ids.index(eos) + 1 if eos in ids else len(ids) for ids in tokens]
        logprobs = self._drawn(self.logp_cond, samples).clone()
        plans = [ids[:end] for ids, end in zip(tokens, ends, strict=True)]
        return plans, [logprob[:end] for logprob, end in zip(logprobs, ends, strict=True)]

    def _step(self, count: int, eos: int, sampling: Sampling) -> None:
        logits = self.weights.text_head(self._hidden(count))
        draw = cfg_sample(
            logits,
            None,
            mask=self.weights.text_mask,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=self.seed,
            offset=self.state[COUNTER, :count],
        )
        self._record(draw, count, self.weights.embed_text.tensor, running=self.running[:count], end=eos)

    def _keep(self, going: list[int]) -> None:
        """Keep only the sequences with these indices in the batch."""
        index = upload(going, self.device)
        for tensor in (self.x, self.running):
            tensor[: len(going)] = tensor[index]
        self.state[:, : len(going)] = self.state[:, index]
        self._fill(len(going), self.bucket(len(going)))


class ImageStage(Stage):
    """Draws pictures. With guidance, the conditional sequences are the first half of the batch, the unconditional ones
    the second."""

    def prepare(self, samples: int, sampling: Sampling) -> None:
        """Capture the graph of a batch of `samples`."""
        self._capture(dict([self._graph(self.bucket(samples), sampling)]))

    def _graph(self, size: int, sampling: Sampling) -> tuple[Hashable, Callable[[], None]]:
        own = (sampling.cfg_weight, sampling.image_temperature, sampling.image_top_k, sampling.image_top_p)
        return ("image", size, *own), lambda: self._step(size, self.sequences_per_sample * size, sampling)

    @record_function("image decode")
    def run(
        self,
        conditional: Sequence[CachedSequence],
        unconditional: Sequence[CachedSequence],
        boi: int,
        sampling: Sampling,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw T tokens of every sample -> tokens, conditional and guided log-probabilities, each [S, T].

        Args:
            conditional: one for each sample, with its whole prompt but `<begin_of_image>` in the KV cache.
            unconditional: the same with the unconditional prompts; empty = no guidance.
            boi: the id of `<begin_of_image>`.
        """
        samples = len(conditional)
        self.prepare(samples, sampling)
        size = self.bucket(samples)
        self.seed.fill_(seed)
        self.x[: self.sequences_per_sample * size] = self.weights.embed_text.tensor[boi]
        for half, sequences in enumerate((conditional, unconditional)):
            if sequences:
                self._begin(sequences, half * size, IMAGE_STAGE)
        for _ in range(0, self.length, self.steps_per_graph):
            self.graphs.run(*self._graph(size, sampling), self.steps_per_graph)
        outputs = (self.tokens, self.logp_cond, self.logp_guided)
        tokens, logp, guided = (self._drawn(output, samples).clone() for output in outputs)
        return tokens, logp, guided

    def _step(self, samples: int, count: int, sampling: Sampling) -> None:
        logits = self.weights.image_head(self.weights.image_features(self._hidden(count)))
        draw = cfg_sample(
            logits[:samples],
            logits[samples:] if count > samples else None,
            guidance=sampling.cfg_weight,
            temperature=sampling.image_temperature,
            top_k=sampling.image_top_k,
            top_p=sampling.image_top_p,
            seed=self.seed,
            offset=self.state[COUNTER, :samples],
        )
        self._record(draw, count, self.weights.embed_image)


class _Look:
    """Tells the host which sequences still run, without stalling a GPU: each look returns the flags that the previous
    look began to copy."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.flags = torch.empty(most, dtype=torch.bool, pin_memory=True)
            self.copied = torch.cuda.Event()
        self.pending = self.next_look = 0

    def next(self, running: Tensor, step: int) -> list[bool] | None:
        """The flags after an earlier step; None if there are none yet, or it is not time to look."""
        if not self.on_gpu:
            return running.tolist()
        if step < self.next_look:
            return None
        self.next_look = step + POLL
        seen = None
        if self.pending:
            self.copied.synchronize()  # the copy is POLL steps old; the steps after it keep the device busy
            seen = self.flags[: self.pending].tolist()
        self.flags[: len(running)].copy_(running, non_blocking=True)
        self.copied.record()
        self.pending = len(running)
        return seen

    def forget(self) -> None:
        """Drop the pending flags: the batch has changed, and they would be those of other sequences."""
        self.pending = self.next_look = 0
