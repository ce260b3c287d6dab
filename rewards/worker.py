"""One reward at work: its device, its CUDA streams, its micro-batches, and what happens when it fails.

Shapes: S samples of a chunk, images [S, 3, H, W] float32 in [0, 1].
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .base import Example, Reward, Unavailable, upload

OnError = Literal["raise", "skip"]


class RewardError(RuntimeError):
    """A reward failed: the message names the reward, the prompt, and the file with the picture."""


@dataclass(frozen=True)
class Placement:
    """Where and how a reward works.

    Args:
        device: "cpu", "cuda:1", …; None = the run's.
        micro_batch: most pictures of one call of `score`.
        offload: keep the weights in host memory between uses, and nothing of them on the device; costs a copy of them
            for each chunk of pictures.
    """

    device: str | None = None
    micro_batch: int = 16
    offload: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch!r} must be at least 1")


@dataclass(frozen=True)
class Scored:
    """What one reward made of one chunk.

    Args:
        values: [S] float32 on the CPU, NaN = does not apply, or skipped.
        seconds: that it worked.
        done: `time.perf_counter()` when it was done.
        skipped: number of samples that it failed on.
    """

    values: Tensor
    seconds: float
    done: float
    skipped: int


class Worker:
    """Scores chunks in order: in a thread, on streams of its own, if `threads`; else when the scores are asked for.

    Args:
        reward: its `model`, if it has one, is frozen and moved.
        placement: where it works.
        device: the run's.
        threads: whether it works while the caller does.
        on_error: what happens to a sample that it fails on.
        failures: folder for the picture of such a sample, if it is to be kept.
    """

    def __init__(
        self,
        reward: Reward,
        placement: Placement,
        *,
        device: str | torch.device,
        threads: bool,
        on_error: OnError,
        failures: Path | None,
    ) -> None:
        self.reward, self.micro_batch, self.on_error, self.failures = reward, placement.micro_batch, on_error, failures
        self.device = _device(placement.device or device, reward.name)
        self.applies: Callable[[Example], bool] | None = getattr(reward, "applies", None)
        self.at_work: Callable[[], AbstractContextManager[None]] = nullcontext
        model: nn.Module | None = getattr(reward, "model", None)
        if model is not None:
            model.requires_grad_(False).eval().to("cpu" if placement.offload else self.device)
        if placement.offload:
            if model is None:
                raise ValueError(f"reward {reward.name!r} has no `model` to offload")
            self.at_work = functools.partial(borrowed, host_copies(model, self.device), self.device)
        gpu = self.device if self.device.type == "cuda" else _device(device, reward.name)
        self.thread = ThreadPoolExecutor(1, f"reward-{reward.name}", _work_on, (gpu,)) if threads else None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def check(self, example: Example) -> None:
        """Raises ValueError if the reward's own `check` does, unless such samples are skipped."""
        check: Callable[[Example], None] | None = getattr(self.reward, "check", None)
        if check is None or self.on_error == "skip" or not self.asks(example):
            return
        try:
            check(example)
        except ValueError as error:
            raise ValueError(f"reward {self.reward.name!r}: {error}") from error

    def submit(
        self, images: Tensor, examples: Sequence[Example], ready: torch.cuda.Event | None
    ) -> Callable[[], Scored]:
        """-> a function that waits for the scores (or makes them, without a thread); `ready` follows the pictures."""
        job = functools.partial(self._run, images, list(examples), ready)
        return self.thread.submit(job).result if self.thread else functools.cache(job)

    @torch.no_grad()
    def _run(self, images: Tensor, examples: list[Example], ready: torch.cuda.Event | None) -> Scored:
        asked = [s for s, example in enumerate(examples) if self.asks(example)]
        with ExitStack() as stack:
            stack.enter_context(record_function(f"reward {self.reward.name}"))
            for stream in self._streams(images.device) if self.thread else ():
                if ready:
                    stream.wait_event(ready)
                stack.enter_context(torch.cuda.stream(stream))
            images = images.to(self.device)
            start = now(self.device)
            with self.at_work():
                scores, lost = self._score(images, examples, asked)
            end = now(self.device)
            values = scores.cpu()  # this thread waits for its own stream, nobody else does
            done = time.perf_counter()
        seconds = seconds_between(start, end)
        for s in sorted(set(asked).difference(lost)):
            if values[s].isinf() or (self.applies and values[s].isnan()):
                lost.append(s)
                self._lose(ValueError(f"its score is {values[s].item()}"), images[s], examples[s])
                values[s] = torch.nan
        return Scored(values, seconds, done, len(lost))

    def asks(self, example: Example) -> bool:
        try:
            return self.applies is None or self.applies(example)
        except Exception as error:
            raise RewardError(
                f"reward {self.reward.name!r} cannot say whether it applies to {example.prompt!r}: {error}"
            ) from error

    def _score(self, images: Tensor, examples: list[Example], asked: list[int]) -> tuple[Tensor, list[int]]:
        """-> scores [S] of the samples `asked`, NaN elsewhere, and those samples that it failed on."""
        scores = torch.full((len(examples),), torch.nan, device=self.device)
        lost: list[int] = []
        for first in range(0, len(asked), self.micro_batch):
            part = asked[first : first + self.micro_batch]
            index = upload(part, self.device)
            try:
                scores[index] = self._call(images[index], [examples[s] for s in part])
            except torch.OutOfMemoryError as error:
                raise RewardError(
                    f"reward {self.reward.name!r} is out of memory with {len(part)} pictures: lower its micro_batch, "
                    f"or give it another device or offload: {error}"
                ) from error
            except Unavailable as error:
                self._lose(error, images[part[0]], examples[part[0]])
                lost += part
            except Exception as error:
                alone = [s for s in part if not self._succeeds(s, images, examples, scores)]
                if not alone:
                    raise RewardError(
                        f"reward {self.reward.name!r} failed on a batch of {len(part)} prompts from "
                        f"{examples[part[0]].prompt!r} on, though on none of them alone: {error}"
                    ) from error
                lost += alone
        return scores, lost

    def _succeeds(self, s: int, images: Tensor, examples: list[Example], scores: Tensor) -> bool:
        """Score one sample of a micro-batch that failed."""
        try:
            scores[s] = self._call(images[s : s + 1], examples[s : s + 1])[0]
        except Exception as error:
            self._lose(error, images[s], examples[s])
            return False
        return True

    def _call(self, images: Tensor, examples: list[Example]) -> Tensor:
        scores = torch.as_tensor(self.reward.score(images, examples), dtype=torch.float32, device=self.device)
        if scores.shape != (len(examples),):
            raise ValueError(f"it returned {tuple(scores.shape)} for {len(examples)} pictures")
        return scores

    def _lose(self, error: Exception, image: Tensor, example: Example) -> None:
        """Keep the picture that the reward failed on; raise, unless such samples are skipped."""
        kept = ""
        if self.failures:
            import matplotlib.image  # here, so that scoring needs nothing but torch and transformers

            path = self.failures / f"failed-{re.sub('[^a-zA-Z0-9_.-]', '_', self.reward.name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            matplotlib.image.imsave(path, image.float().clamp(0, 1).nan_to_num().permute(1, 2, 0).cpu().numpy())
            kept = f" (picture: {path})"
        if self.on_error == "raise":
            raise RewardError(f"reward {self.reward.name!r} failed on {example.prompt!r}{kept}: {error}") from error

    def _streams(self, source: torch.device) -> Iterator[torch.cuda.Stream]:
        """One on each GPU that takes part, since a copy between two takes the current stream of both; the reward's own
        last, which makes its GPU the current one."""
        for device in dict.fromkeys(d for d in (source, self.device) if d.type == "cuda"):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device, priority=0)  # the lowest; the engine decodes at -1
            yield self.streams[device]


def now(device: torch.device) -> Any:
    """A point in time: an event of the device's current stream, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Of two points in time; waits for the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_copies(model: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of a model on the CPU, and its values: pinned, if a GPU is to read them."""
    tensors = list(chain(model.parameters(), model.buffers()))
    for tensor in tensors if device.type == "cuda" else ():
        tensor.data = tensor.data.pin_memory()  # at once, or the host would hold both
    return [(tensor, tensor.data) for tensor in tensors]


@contextmanager
def borrowed(copies: list[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[None]:
    """A model on `device` for as long as this lasts; its weights do not change, so nothing is copied back."""
    for tensor, home in copies:
        tensor.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, home in copies:
            tensor.data = home


def _work_on(device: torch.device) -> None:
    """Make a GPU this thread's own. On a thread that has none, the end of each stream context would make GPU 0 the
    current one, and the next call would put a second CUDA context there, from every rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _device(name: str | torch.device, reward: str) -> torch.device:
    """With its index. Raises ValueError for one that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"reward {reward!r} cannot use device {str(name)!r}: {error}") from error
