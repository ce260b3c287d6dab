"""Scores pictures with all rewards of a run, while the policy goes on decoding. The scores are a matrix [S, R].

With `threads` (the default on a GPU), each reward has a thread and CUDA streams of its own. `submit` gives the pictures
to the threads and returns; only `result` waits. The streams wait until the pictures are complete. They have the lowest
priority and the engine's streams a higher one, so that decoding goes first when both have work. With `serial` (the
default on a CPU, where all share the cores), the rewards run one after another in `result`.

Shapes: S samples, R rewards (those that train first, then the monitored ones), images [S, 3, H, W] float32 in [0, 1].
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.host import now, seconds_between
from .base import Example, Reward
from .worker import OnError, Placement, Scored, Worker

Schedule = Literal["auto", "serial", "threads"]


class RewardHandle:
    """Scores that are being computed. `result()` waits for them; afterwards `metrics` says how long they took."""

    def __init__(self, names: Sequence[str], device: torch.device, chunks: list[list[Callable[[], Scored]]]) -> None:
        self.names, self.device = names, device
        self._chunks = chunks  # for each chunk one job for each reward
        self._scored: list[list[Scored]] = []

    @classmethod
    def cat(cls, handles: Sequence[RewardHandle]) -> RewardHandle:
        """The samples of all handles, in order."""
        return cls(handles[0].names, handles[0].device, [jobs for handle in handles for jobs in handle._chunks])

    @record_function("reward wait")
    def result(self) -> Tensor:
        """Wait for the scores, [S, R] float32 on the CPU; NaN = the reward does not apply, or was skipped.

        Raises:
            RewardError: a reward raised, or returned another shape or a score that is not finite.
        """
        asked = now(self.device)
        self._scored = [[scored() for scored in jobs] for jobs in self._chunks]
        self._waited = asked, now(self.device), time.perf_counter()
        return torch.cat([torch.stack([scored.values for scored in jobs], dim=1) for jobs in self._scored])

    @property
    def metrics(self) -> dict[str, float]:
        """For each reward: `milliseconds` of its work; `milliseconds_hidden`, the part of them in which the caller's
        stream still had other work; `skipped`, the number of samples that it failed on.

        On a GPU this waits for the work that the caller's stream had when `result` was called.
        """
        asked, answered, end = self._waited
        idle_since = end - seconds_between(asked, answered)
        metrics = {}
        for name, of_chunks in zip(self.names, zip(*self._scored, strict=True), strict=True):
            waited = sum(min(scored.seconds, max(0.0, scored.done - idle_since)) for scored in of_chunks)
            worked = sum(scored.seconds for scored in of_chunks)
            metrics[f"rewards/{name}/milliseconds"] = 1e3 * worked
            metrics[f"rewards/{name}/milliseconds_hidden"] = 1e3 * (worked - waited)
            metrics[f"rewards/{name}/skipped"] = float(sum(scored.skipped for scored in of_chunks))
        return metrics


class RewardEnsemble:
    """Scores pictures with every reward.

    Args:
        rewards: those that train.
        weights: one for each, default 1.
        monitors: scored as well, with weight 0.
        placements: name of a reward -> where it works; a reward that is missing there has the default.
        device: the run's device, where rewards work by default.
        schedule: "threads", "serial", or "auto" = threads on a GPU.
        on_reward_error: "raise" stops the run; "skip" leaves the sample without this score and counts it.
        failures: folder for pictures that a reward failed on; None = they are not kept.

    Raises:
        ValueError: two rewards have one name, a device is not there, or a reward without `model` is to be offloaded.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        monitors: Sequence[Reward] = (),
        *,
        placements: Mapping[str, Placement] | None = None,
        device: str | torch.device = "cpu",
        schedule: Schedule = "auto",
        on_reward_error: OnError = "raise",
        failures: str | Path | None = None,
    ) -> None:
        self._weigh([reward.name for reward in rewards], weights, [reward.name for reward in monitors])
        threads = torch.device(device).type == "cuda" if schedule == "auto" else schedule == "threads"
        places = placements or {}
        self.workers = [
            Worker(
                reward,
                places.get(reward.name, Placement()),
                device=device,
                threads=threads,
                on_error=on_reward_error,
                failures=Path(failures) if failures else None,
            )
            for reward in (*rewards, *monitors)
        ]

    @classmethod
    def of_names(
        cls, rewards: Sequence[str], weights: Sequence[float] | None, monitors: Sequence[str]
    ) -> RewardEnsemble:
        """An ensemble for scores that exist already, such as those in files."""
        ensemble = cls([])
        ensemble._weigh(rewards, weights, monitors)
        return ensemble

    def _weigh(self, rewards: Sequence[str], weights: Sequence[float] | None, monitors: Sequence[str]) -> None:
        self.names = _different([*rewards, *monitors])
        trained = [1.0] * len(rewards) if weights is None else list(weights)
        self.weights = torch.tensor([*trained, *[0.0] * len(monitors)])

    def beside(self, other: RewardEnsemble) -> RewardEnsemble:
        """An ensemble of the rewards of both, this one's first. The rewards are shared, not copied.

        Raises:
            ValueError: both have a reward of one name.
        """
        both = copy.copy(self)
        both.names = _different([*self.names, *other.names])
        both.weights = torch.cat([self.weights, other.weights])
        both.workers = [*self.workers, *other.workers]
        return both

    def check(self, example: Example) -> None:
        """Raises ValueError if a reward cannot score the example, unless failures are skipped."""
        for worker in self.workers:
            worker.check(example)

    def silent(self, example: Example) -> list[str]:
        """The rewards that train and do not apply to the example."""
        every = zip(self.names, self.weights.tolist(), self.workers, strict=True)
        return [name for name, weight, worker in every if weight and not worker.asks(example)]

    def applies(self, example: Example) -> bool:
        """Whether a reward that trains applies to the example."""
        return len(self.silent(example)) < int((self.weights != 0).sum())

    def submit(self, images: Tensor, examples: Sequence[Example]) -> RewardHandle:
        """Start scoring S pictures of S examples. The current stream may still be making the pictures."""
        ready = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        jobs = [worker.submit(images, examples, ready) for worker in self.workers]
        return RewardHandle(self.names, images.device, [jobs])

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum of the rewards that apply: [S, R] -> [S], NaN where none applies."""
        weights = self.weights.to(scores)
        applies = (~scores.isnan() & (weights != 0)).any(1)
        return (scores.nan_to_num(nan=0.0) * weights).sum(1).masked_fill(~applies, torch.nan)

    def metrics(self, scores: Tensor) -> dict[str, float]:
        """For each reward of scores [S, R]: mean and unbiased std over the samples that have a score, and the share of
        samples that have none."""
        out = {}
        for name, column in zip(self.names, scores.cpu().unbind(1), strict=True):
            there = column[~column.isnan()]
            out[f"rewards/{name}/mean"] = there.mean().item()
            out[f"rewards/{name}/std"] = std_of(there)
            out[f"rewards/{name}/missing"] = 1 - len(there) / len(column)
        return out


def std_of(values: Tensor) -> float:
    """The unbiased standard deviation; NaN for fewer than two values. Exactly 0 if all are equal: rounding would keep
    that of eight times 0.35 above 0."""
    return (values - values.min()).std().item() if len(values) > 1 else torch.nan


def _different(names: list[str]) -> list[str]:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two rewards have the name {twice.pop()!r}; names must differ, they label the metrics")
    return names
