"""The two stages of a rollout on the device: rows that decode together, step by step.

Everything a step reads or writes keeps its address, so that a step can be one CUDA graph. Rows are described by numbers
on the device: a row that leaves, or a group that shares its prompt, moves numbers and no keys or values.

Shapes: R rows of a step, S samples, L tokens of a sample (a plan's limit, or a picture's T), D hidden.
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
from ..kernels.record_draw import record_draw
from .decoder import Decoder
from .graphs import StepGraphs
from .kv import SCRATCH
from .packed import upload
from .settings import Sampling

# The integers that describe a row: first slot and length of its shared prefix; first slot and length of its own keys,
# this step's token included; position and slot of that token; where its draw is written, and the counter it is drawn
# with. LENGTH to COUNTER grow by ADVANCE at every step: 1, or 0 for a row that only fills its batch.
PREFIX_START, PREFIX_LENGTH, START, LENGTH, POSITION, SLOT, OUTPUT, COUNTER, ADVANCE = range(9)

POLL = 8  # most steps that the host hands over at once: it looks at which plans have ended after so many
_BUCKETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
IMAGE_STAGE = 1 << 31  # added to the position, so that the two stages of a sample never share a counter


class Row(NamedTuple):
    """Where a row's tokens lie before the first step, and the number of its sample."""

    prefix_start: int
    prefix_length: int
    start: int
    length: int
    sample: int


class Stage:
    """Buffers of one stage and its step.

    Args:
        decoder: the forward pass.
        graphs: what runs the step.
        samples: most samples of a step.
        rows_per_sample: 2 where each sample has an unconditional row too.
        length: L.
    """

    def __init__(self, decoder: Decoder, graphs: StepGraphs, samples: int, rows_per_sample: int, length: int) -> None:
        self.decoder, self.weights, self.graphs = decoder, decoder.weights, graphs
        self.device = decoder.cos.device
        self.rows_per_sample, self.length = rows_per_sample, length
        # steps of one graph; all steps of a sample are whole graphs
        self.block = max(n for n in range(1, POLL + 1) if length % n == 0) if graphs.enabled else 1
        rows = self.bucket(samples) * rows_per_sample
        self.x = torch.zeros(rows, self.weights.embed_text.tensor.shape[1], dtype=decoder.cos.dtype, device=self.device)
        self.numbers = torch.zeros(ADVANCE + 1, rows, dtype=torch.int64, device=self.device)
        self.running = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        # one place more than S·L, where rows that only fill their batch write
        self.tokens = torch.zeros(samples * length + 1, dtype=torch.int64, device=self.device)
        self.logp_cond = torch.zeros(samples * length + 1, device=self.device)
        self.logp_guided = torch.zeros(samples * length + 1, device=self.device)

    def bucket(self, samples: int) -> int:
        """Samples of the step that takes `samples`: each bucket has one graph."""
        if not self.graphs.enabled:
            return samples
        at = bisect_left(_BUCKETS, samples)
        return _BUCKETS[at] if at < len(_BUCKETS) else -(-samples // 256) * 256

    def _capture(self, steps: dict[Hashable, Callable[[], None]]) -> None:
        """Capture the graphs that are missing, on rows that fill a batch: these change nothing that counts."""
        missing = {key: step for key, step in steps.items() if self.graphs.lacks(key)}
        if missing:
            self._fill(0, len(self.running))
        for key, step in missing.items():
            self.graphs.capture(key, step, self.block)

    def _begin(self, rows: Sequence[Row], first_row: int, counter: int) -> None:
        """Set the numbers of `rows`, from `first_row` of the buffers on, and fill their bucket."""
        numbers = [
            (*row[:LENGTH], row.length + 1, row.prefix_length + row.length, row.start + row.length, i * self.length,
             (row.sample << 32) + counter, 1)
            for i, row in enumerate(rows)
        ]  # fmt: skip
        end = first_row + len(rows)
        self.numbers[:, first_row:end] = upload(numbers, self.device).T
        self.running[first_row:end] = True
        self._fill(end, first_row + self.bucket(len(rows)))

    def _fill(self, begin: int, end: int) -> None:
        """Rows that only fill a batch write to the scratch slot, read it, and draw into the place nobody reads."""
        if begin == end:
            return
        idle = self.numbers[:, begin:end]
        idle.zero_()
        idle[START] = idle[SLOT] = SCRATCH
        idle[LENGTH] = 1
        idle[OUTPUT] = len(self.tokens) - 1
        self.x[begin:end] = 0
        self.running[begin:end] = False

    def _hidden(self, rows: int) -> Tensor:
        """[R, D] after one token of each row."""
        numbers = self.numbers[:, :rows]
        return self.decoder.step(self.x[:rows], *numbers[: SLOT + 1])

    def _record(self, draw: Draw, rows: int, table: Tensor, **ends: Any) -> None:
        """Keep what was drawn, count it, and make it the input of the next step."""
        columns, numbers = (self.tokens, self.logp_cond, self.logp_guided), self.numbers[:, :rows]
        record_draw(draw, numbers, columns, table, self.x[:rows], grows=LENGTH, place=OUTPUT, **ends)

    def _drawn(self, column: Tensor, samples: int) -> Tensor:
        """[S, L] of an output buffer."""
        return column[: samples * self.length].view(samples, self.length)


class PlanStage(Stage):
    """Writes plans: a row a sample; rows that have ended leave the batch.

    Ids that the tokenizer does not have are never drawn. As with top-k and top-p, the log-probs are still those of the
    softmax over all V logits, which is what training computes.
    """

    def __init__(self, decoder: Decoder, graphs: StepGraphs, samples: int, rows_per_sample: int, length: int) -> None:
        super().__init__(decoder, graphs, samples, rows_per_sample, length)
        self.look = _Look(self.device, len(self.running))

    def prepare(self, samples: int, eos: int, sampling: Sampling) -> None:
        """Capture the graphs of a batch of so many, and of what may be left of it."""
        sizes = sorted({self.bucket(n) for n in range(1, samples + 1)}) if self.graphs.enabled else []
        self._capture(dict(self._graph(rows, eos, sampling) for rows in sizes))

    def _graph(self, rows: int, eos: int, sampling: Sampling) -> tuple[Hashable, Callable[[], None]]:
        return ("plan", rows, eos, sampling), lambda: self._step(rows, eos, sampling)

    @record_function("text decode")
    def run(
        self, rows: Sequence[Row], last_tokens: Sequence[int], eos: int, sampling: Sampling, seed: int
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Decode until every row has drawn `eos` or L tokens -> plans up to and with their first EOS, and log-probs.

        Args:
            rows: their samples, all keys and values but the last prompt token's written.
            last_tokens: that token of each row.
        """
        self.prepare(len(rows), eos, sampling)
        self.seed.fill_(seed)
        self.x[: len(rows)] = F.embedding(upload(last_tokens, self.device), self.weights.embed_text.tensor)
        self._begin(rows, 0, counter=0)
        count, look = len(rows), self.look
        look.forget()
        for t in range(0, self.length, self.block):
            size = self.bucket(count)
            self.graphs.run(*self._graph(size, eos, sampling), self.block)
            running = look.next(self.running[:count], t)
            if running is None or all(running):
                continue
            going = [row for row, runs in enumerate(running) if runs]
            if not going:
                break
            if self.bucket(len(going)) < size:
                self._keep(going)
                count = len(going)
                look.forget()
        tokens = self._drawn(self.tokens, len(rows)).tolist()
        ends = [row.index(eos) + 1 if eos in row else len(row) for row in tokens]
        logprobs = self._drawn(self.logp_cond, len(rows)).clone()
        plans = [row[:end] for row, end in zip(tokens, ends, strict=True)]
        return plans, [row[:end] for row, end in zip(logprobs, ends, strict=True)]

    def _step(self, rows: int, eos: int, sampling: Sampling) -> None:
        logits = self.weights.text_head(self._hidden(rows))
        draw = cfg_sample(
            logits,
            None,
            mask=self.weights.text_mask,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=self.seed,
            offset=self.numbers[COUNTER, :rows],
        )
        self._record(draw, rows, self.weights.embed_text.tensor, running=self.running[:rows], end=eos)

    def _keep(self, going: list[int]) -> None:
        index = upload(going, self.device)
        for tensor in (self.x, self.running):
            tensor[: len(going)] = tensor[index]
        self.numbers[:, : len(going)] = self.numbers[:, index]
        self._fill(len(going), self.bucket(len(going)))


class ImageStage(Stage):
    """Draws pictures: with guidance two rows a sample, [conditional; unconditional] halves of a batch."""

    def prepare(self, samples: int, sampling: Sampling) -> None:
        """Capture the graph of a batch of so many."""
        self._capture(dict([self._graph(self.bucket(samples), sampling)]))

    def _graph(self, size: int, sampling: Sampling) -> tuple[Hashable, Callable[[], None]]:
        return ("image", size, sampling), lambda: self._step(size, self.rows_per_sample * size, sampling)

    @record_function("image decode")
    def run(
        self, rows: Sequence[Row], unconditional: Sequence[Row], boi: int, sampling: Sampling, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw T tokens of every sample -> tokens, conditional and guided log-probs, each [S, T].

        Args:
            rows: the samples, all keys and values but `<begin_of_image>`'s written.
            unconditional: the same without their prompts; empty = no guidance.
            boi: the token that begins a picture.
        """
        samples = len(rows)
        self.prepare(samples, sampling)
        size = self.bucket(samples)
        step_rows = self.rows_per_sample * size
        self.seed.fill_(seed)
        self.x[:step_rows] = self.weights.embed_text.tensor[boi]
        for half, part in enumerate((rows, unconditional)):
            if part:
                self._begin(part, half * size, IMAGE_STAGE)
        for _ in range(0, self.length, self.block):
            self.graphs.run(*self._graph(size, sampling), self.block)
        columns = (self.tokens, self.logp_cond, self.logp_guided)
        tokens, logp, guided = (self._drawn(column, samples).clone() for column in columns)
        return tokens, logp, guided

    def _step(self, samples: int, rows: int, sampling: Sampling) -> None:
        logits = self.weights.image_head(self.weights.image_features(self._hidden(rows)))
        draw = cfg_sample(
            logits[:samples],
            logits[samples:] if rows > samples else None,
            guidance=sampling.cfg_weight,
            temperature=sampling.image_temperature,
            top_k=sampling.image_top_k,
            top_p=sampling.image_top_p,
            seed=self.seed,
            offset=self.numbers[COUNTER, :samples],
        )
        self._record(draw, rows, self.weights.embed_image)


class _Look:
    """Which rows still run, without stalling a GPU: each look returns the flags that the look before it asked for."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.flags = torch.empty(rows, dtype=torch.bool, pin_memory=True)
            self.copied = torch.cuda.Event()
        self.pending = self.next_look = 0

    def next(self, running: Tensor, step: int) -> list[bool] | None:
        """Flags of the rows after an earlier step, or None if it is not time to look."""
        if not self.on_gpu:
            return running.tolist()
        if step < self.next_look:
            return None
        self.next_look = step + POLL
        seen = None
        if self.pending:
            self.copied.synchronize()  # asked for POLL steps ago: those behind it keep the device busy
            seen = self.flags[: self.pending].tolist()
        self.flags[: len(running)].copy_(running, non_blocking=True)
        self.copied.record()
        self.pending = len(running)
        return seen

    def forget(self) -> None:
        """Other rows, or at other places: what was asked for means nothing to them."""
        self.pending = self.next_look = 0
