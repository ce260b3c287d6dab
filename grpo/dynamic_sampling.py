"""Dynamic sampling (DAPO, arXiv 2503.14476) replaces groups with equal rewards by groups of other prompts.

In each round, samples of another prompt are drawn for each group whose rewards are all equal. They replace the group if
their rewards differ. A group that no round replaces stays.

The prompt that is drawn for group p of a step in round r is a function of (seed, step, r, p): the prompt that group p
would have if the seed were seed + r. So a resumed run draws the same groups on any number of ranks, and no rank waits
for another. With ZeRO-3 they would have to, so that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.group_advantages import group_advantages
from ..model.chunk import RolloutChunk
from ..rewards.base import Example
from ..rewards.ensemble import RewardHandle
from .config import Config
from .data import step_indices
from .distributed import Ranks

Drawn = tuple[RolloutChunk, list[Example], RewardHandle]


class _Chosen(RewardHandle):
    """Scores [S, R] that were chosen from several handles. Its metrics are the sums over all of them."""

    def __init__(self, handles: Sequence[RewardHandle], scores: Tensor) -> None:
        super().__init__(handles[0].names, handles[0].device, [])
        self.handles, self.scores = handles, scores

    def result(self) -> Tensor:
        return self.scores

    @property
    def metrics(self) -> dict[str, float]:
        each = [handle.metrics for handle in self.handles]
        return {name: sum(metrics[name] for metrics in each) for name in each[0]}


def redraw(
    drawn: Drawn,
    draw: Callable[..., Drawn],
    examples: Sequence[Example],
    weights: Tensor,
    config: Config,
    step: int,
    ranks: Ranks,
) -> tuple[Drawn, list[int]]:
    """Replace this rank's groups with equal rewards, in at most `config.dynamic_sampling` rounds.

    Args:
        drawn: the samples of the step's own prompts.
        draw: `rollout.roll_out` with all arguments but the prompts and `first_sample`.
        examples: all prompts of the run.
        weights: [R] weights of the rewards.
        step: the step, counted from 0.

    Returns:
        The samples, and [number of rounds, number of groups that were replaced].
    """
    rollout, planned, handle = drawn
    size, scores, handles, spans = config.num_generations, handle.result().clone(), [handle], rollout.spans
    groups = [rollout[start : start + size] for start in range(0, len(rollout), size)]
    share = len(groups)
    dull = [place for place, one in enumerate(_spread(scores, weights, config)) if not one]
    rounds, was_dull = 0, len(dull)
    while dull and rounds < config.dynamic_sampling:
        rounds += 1
        order = step_indices(len(examples), share * ranks.size, step, config.seed + rounds)
        places = [ranks.rank * share + place for place in dull]
        numbers = [(rounds * share * ranks.size + place) * size for place in places]
        fresh, fresh_planned, handle = draw([examples[order[place]] for place in places], first_sample=numbers)
        found = handle.result()
        handles, spans = [*handles, handle], spans + fresh.spans
        spread = _spread(found, weights, config)
        for i, place in enumerate(dull):
            if spread[i]:
                source, target = slice(i * size, (i + 1) * size), slice(place * size, (place + 1) * size)
                groups[place], scores[target], planned[target] = fresh[source], found[source], fresh_planned[source]
        dull = [place for place, one in zip(dull, spread, strict=True) if not one]
    chosen = replace(RolloutChunk.cat(groups), spans=spans)
    return (chosen, planned, _Chosen(handles, scores)), [rounds, was_dull - len(dull)]


def _spread(scores: Tensor, weights: Tensor, config: Config) -> list[bool]:
    """For each group, whether it has an advantage other than 0."""
    how = {"scale": config.scale_rewards, "combine": config.multi_objective_aggregation}
    groups = scores.split(config.num_generations)
    return [bool(group_advantages(g, config.num_generations, weights, **how).any()) for g in groups]  # type: ignore[arg-type]


def redraw_metrics(counts: list[int], ranks: Ranks) -> dict[str, float]:
    """Metrics from the counts of `redraw`: the most rounds on any rank, and the replaced groups on all ranks."""
    rounds, replaced = ranks.cat(torch.tensor([counts])).unbind(1)
    return {"dynamic_sampling/rounds": float(rounds.max()), "dynamic_sampling/replaced": float(replaced.sum())}
