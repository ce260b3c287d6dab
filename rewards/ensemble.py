"""All rewards of a run behind one call: pictures in, a [S, R] matrix out, scored while the policy goes on decoding.

With threads (the default on a GPU) `submit` hands the pictures to a thread for each reward and returns: each works on
CUDA streams of its own, which wait for an event behind the pictures; the caller waits only in `result`. These streams
have the lowest priority and the engine's a higher one, so that decoding goes first where both have work. Without
(`serial`, the default on a CPU, where all share the cores) the rewards run one after another in `result`.

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

from .base import Example, Reward
from .worker import OnError, Placement, Scored, Worker, now, seconds_between

Schedule = Literal["auto", "serial", "threads"]


class RewardHandle:
    """Scores on their way; `result()` waits for them, and for nothing else. After it, `metrics` says what they took."""

    def __init__(self, names: Sequence[str], device: torch.device, chunks: list[list[Callable[[], Scored]]]) -> None:
        self.names, self.device = names, device
        self._chunks = chunks  # chunk by chunk, reward by reward
        self._scored: list[list[Scored]] = []

    @classmethod
    def cat(cls, handles: Sequence[RewardHandle]) -> RewardHandle:
        """The samples of all handles, in order."""
        return cls(handles[0].names, handles[0].device, [jobs for handle in handles for jobs in handle._chunks])

    @record_function("reward wait")
    def result(self) -> Tensor:
        """[S, R] float32 on the CPU, NaN = does not apply, or skipped.

        Raises:
            RewardError: a reward raised, or returned another shape or a score that is not finite.
        """
        asked = now(self.device)
        self._scored = [[scored() for scored in jobs] for jobs in self._chunks]
        self._waited = asked, now(self.device), time.perf_counter()
        return torch.cat([torch.stack([scored.values for scored in jobs], dim=1) for jobs in self._scored])

    @property
    def metrics(self) -> dict[str, float]:
        """Of each reward: `milliseconds` that it worked; `milliseconds_hidden` of these, before the caller's stream had
        done its own work and nothing was left but to wait; samples `skipped` because it failed on them.

        On a GPU this waits for what the caller's stream had been given before `result`.
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
        placements: by a reward's name; one that is not there has the default.
        device: of the run: where rewards without another placement work.
        schedule: threads, serial, or auto: threads on a GPU.
        on_reward_error: raise stops the run; skip leaves the sample without this reward and counts it.
        failures: folder for the picture that a reward failed on; None keeps none.

    Raises:
        ValueError: two rewards of one name, a device that is not there, offload of a reward without `model`.
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
        every = [*rewards, *monitors]
        self.names = _different([reward.name for reward in every])
        trained = [1.0] * len(rewards) if weights is None else list(weights)
        self.weights = torch.tensor([*trained, *[0.0] * len(monitors)])
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
            for reward in every
        ]

    def beside(self, other: RewardEnsemble) -> RewardEnsemble:
        """An ensemble of both's rewards, this one's first; the same rewards, not copies.

        Raises:
            ValueError: they have a name in common.
        """
        both = copy.copy(self)
        both.names = _different([*self.names, *other.names])
        both.weights = torch.cat([self.weights, other.weights])
        both.workers = [*self.workers, *other.workers]
        return both

    def check(self, example: Example) -> None:
        """Raises ValueError if one of the rewards cannot score the example, unless such samples are skipped."""
        for worker in self.workers:
            worker.check(example)

    def silent(self, example: Example) -> list[str]:
        """The rewards that train and do not apply to the example."""
        every = zip(self.names, self.weights.tolist(), self.workers, strict=True)
        return [name for name, weight, worker in every if weight and not worker.asks(example)]

    def submit(self, images: Tensor, examples: Sequence[Example]) -> RewardHandle:
        """Start scoring S pictures, which the current stream has made or is about to, of S examples."""
        ready = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        jobs = [worker.submit(images, examples, ready) for worker in self.workers]
        return RewardHandle(self.names, images.device, [jobs])

    def total(self, scores: Tensor) -> Tensor:
        """[S, R] -> [S]: the weighted sum of the rewards that apply, NaN where none does."""
        weights = self.weights.to(scores)
        applies = (~scores.isnan() & (weights != 0)).any(1)
        return (scores.nan_to_num(nan=0.0) * weights).sum(1).masked_fill(~applies, torch.nan)

    def metrics(self, scores: Tensor) -> dict[str, float]:
        """Of scores [S, R]: mean and unbiased std of each reward over the samples that have it, share that has not."""
        out = {}
        for name, column in zip(self.names, scores.cpu().unbind(1), strict=True):
            there = column[~column.isnan()]
            out[f"rewards/{name}/mean"] = there.mean().item()
            out[f"rewards/{name}/std"] = there.std().item() if len(there) > 1 else torch.nan
            out[f"rewards/{name}/missing"] = 1 - len(there) / len(column)
        return out


def _different(names: list[str]) -> list[str]:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two rewards have the name {twice.pop()!r}; names must differ, they label the metrics")
    return names
