"""Runs one reward in micro-batches, on its device, in its thread and on its CUDA streams, and handles its failures.

If the reward raises an exception on a micro-batch, its samples are scored one by one, except after `Unavailable`. A
sample on which it raises again stops the run with a RewardError that names reward, prompt and picture. With
`on_reward_error: skip`, the sample gets no score from this reward (NaN), and is counted.

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
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..kernels.host import now, seconds_between, upload
from .base import Example, Reward, Unavailable

OnError = Literal["raise", "skip"]
PICTURES = 16  # in one call of a reward


class RewardError(RuntimeError):
    """A reward failed: the message names the reward, the prompt, and the file with the picture."""


@dataclass(frozen=True)
class Placement:
    """Where and how a reward works.

    Args:
        device: "cpu", "cuda:1", …; None = the run's device.
        micro_batch: maximum number of pictures in one call of `score`; "auto" = `PICTURES`, or in a run as many as fit
            by its memory plan.
        offload: keep the weights in host memory, and copy them to the device for each chunk of pictures.
    """

    device: str | None = None
    micro_batch: int = PICTURES
    offload: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch == "auto":
            object.__setattr__(self, "micro_batch", PICTURES)
        if not isinstance(self.micro_batch, int) or self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch!r} must be at least 1, or auto")


@dataclass(frozen=True)
class Scored:
    """The scores of one reward for one chunk.

    Args:
        values: [S] float32 on the CPU; NaN = the reward does not apply, or was skipped.
        seconds: how long it worked.
        done: `time.perf_counter()` when the scores were ready.
        skipped: number of samples that it failed on.
    """

    values: Tensor
    seconds: float
    done: float
    skipped: int


class Worker:
    """Scores chunks in order: with `threads` in a thread and on streams of its own, otherwise when the scores are read.

    Args:
        reward: the reward. Its `model`, if it has one, is frozen and moved to the device.
        placement: where it works.
        device: the run's device.
        threads: whether it works at the same time as the caller.
        on_error: "raise" = an error of the reward stops the run; "skip" = the sample gets no score, and is counted.
        failures: folder for the pictures that the reward failed on; None = they are not kept.
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
        model = model_of(reward)
        if model is not None:
            model.requires_grad_(False).eval().to("cpu" if placement.offload else self.device)
        if placement.offload:
            if model is None:
                raise ValueError(f"reward {reward.name!r} has no `model`, a torch module, to offload")
            self.at_work = functools.partial(borrowed, host_copies(model, self.device), self.device)
        gpu = self.device if self.device.type == "cuda" else _device(device, reward.name)
        self.thread = ThreadPoolExecutor(1, f"reward-{reward.name}", _work_on, (gpu,)) if threads else None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def check(self, example: Example) -> None:
        """Raises ValueError if the reward's own `check` does, unless failures are skipped."""
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
        """Start scoring -> a function that returns the scores. It waits for the thread, or without one does the work.

        `ready` is an event after which the pictures are complete.
        """
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
            values = scores.cpu()  # waits for this thread's stream, and delays no other
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
        """Score the samples `asked` -> scores [S] (NaN for all others), and the samples that the reward failed on."""
        scores = torch.full((len(examples),), torch.nan, device=self.device)
        lost: list[int] = []
        for first in range(0, len(asked), self.micro_batch):
            batch = asked[first : first + self.micro_batch]
            index = upload(batch, self.device)
            try:
                scores[index] = self._call(images[index], [examples[s] for s in batch])
            except torch.OutOfMemoryError as error:
                raise RewardError(
                    f"reward {self.reward.name!r} is out of memory with {len(batch)} pictures: lower its micro_batch, "
                    f"or give it another device or offload: {error}"
                ) from error
            except Unavailable as error:
                self._lose(error, images[batch[0]], examples[batch[0]])
                lost += batch
            except Exception as error:
                alone = [s for s in batch if not self._succeeds(s, images, examples, scores)]
                if not alone:
                    raise RewardError(
                        f"reward {self.reward.name!r} failed on {len(batch)} prompts together (the first: "
                        f"{examples[batch[0]].prompt!r}), but on none of them alone: {_named(error)}"
                    ) from error
                lost += alone
        return scores, lost

    def _succeeds(self, s: int, images: Tensor, examples: list[Example], scores: Tensor) -> bool:
        """Score one sample of a failed micro-batch alone -> whether that works."""
        try:
            scores[s] = self._call(images[[s]], [examples[s]])[0]  # a copy: it may change the pictures
        except Exception as error:
            self._lose(error, images[s], examples[s])
            return False
        return True

    def _call(self, images: Tensor, examples: list[Example]) -> Tensor:
        try:
            scores = torch.as_tensor(self.reward.score(images, examples), dtype=torch.float32, device=self.device)
        except SystemExit as error:  # it would end the run without a word
            raise RuntimeError(f"it called sys.exit({error})") from error
        if scores.shape != (len(examples),):
            raise ValueError(f"it returned scores {[*scores.shape]}, expected [{len(examples)}], one for each picture")
        return scores

    def _lose(self, error: Exception, image: Tensor, example: Example) -> None:
        """Save the picture that the reward failed on; raise the error, unless failures are skipped."""
        kept = ""
        if self.failures:
            import matplotlib.image  # here, so that scoring needs nothing but torch and transformers

            path = self.failures / f"failed-{re.sub('[^a-zA-Z0-9_.-]', '_', self.reward.name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            matplotlib.image.imsave(path, image.float().clamp(0, 1).nan_to_num().permute(1, 2, 0).cpu().numpy())
            kept = f" (picture: {path})"
        if self.on_error == "raise":
            where = f"reward {self.reward.name!r} failed on {example.prompt!r}{kept}"
            raise RewardError(f"{where}: {_named(error)}") from error

    def _streams(self, source: torch.device) -> Iterator[torch.cuda.Stream]:
        """A stream on the GPU of the pictures and on the reward's, because a copy between two GPUs uses the current
        stream of both. The reward's own GPU is last, so that it becomes the current one."""
        for device in dict.fromkeys(d for d in (source, self.device) if d.type == "cuda"):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device, priority=0)  # the lowest; the engine decodes at -1
            yield self.streams[device]


def model_of(reward: Reward) -> nn.Module | None:
    """The reward's `model`, if it is a module of torch. It may as well be the name of one on a server."""
    model = getattr(reward, "model", None)
    return model if isinstance(model, nn.Module) else None


def _named(error: Exception) -> str:
    """The message of an exception; with its type, unless the message itself says what is wrong."""
    return str(error) if isinstance(error, (ValueError, Unavailable)) else f"{type(error).__name__}: {error}"


def host_copies(model: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a model on the CPU, each with its values, which are pinned if they will be copied to a GPU."""
    tensors = list(chain(model.parameters(), model.buffers()))
    for tensor in tensors if device.type == "cuda" else ():
        tensor.data = tensor.data.pin_memory()  # one by one, so that the host never holds two copies of the model
    return [(tensor, tensor.data) for tensor in tensors]


@contextmanager
def borrowed(copies: list[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[None]:
    """Inside, the model is on `device`. Its weights do not change, so nothing is copied back."""
    for tensor, home in copies:
        tensor.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, home in copies:
            tensor.data = home


def _work_on(device: torch.device) -> None:
    """Set the thread's current GPU. Without one, the end of each stream context would make GPU 0 the current one, and
    the next call of every rank would create a second CUDA context there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _device(name: str | torch.device, reward: str) -> torch.device:
    """The device with its index. Raises ValueError if it is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"reward {reward!r} cannot use device {str(name)!r}: {error}") from error
