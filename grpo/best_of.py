"""Best of N: draw N pictures of each prompt, score them, and sort them, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..model.generation import Generation, Policy, first_samples, pictures_of, plans_of
from ..model.settings import Sampling
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble
from .rollout import roll_out


@dataclass(frozen=True)
class Ranked:
    """A picture, the weighted sum of its rewards, and each reward by name. NaN = the reward does not apply."""

    picture: Generation
    score: float
    scores: dict[str, float]


def require_scores(ensemble: RewardEnsemble, examples: Sequence[Example]) -> None:
    """Raises ValueError for a prompt that the rewards cannot score.

    If a prompt has annotations, some of the rewards may not apply, as in training. If it has none, all must apply.
    """
    for example in examples:
        ensemble.check(example)
        silent = ensemble.silent(example)
        bare = not (example.nouns or example.attr_nouns or example.spatial_info or example.numeracy_info)
        if silent and (bare or not ensemble.applies(example)):
            raise ValueError(
                f"reward {silent[0]!r} cannot score the prompt {example.prompt[:120]!r}: a JSONL --prompt_file must "
                "give the annotations that the reward reads (nouns, attr_nouns, spatial_info or numeracy_info)"
            )


def best_of(
    policy: Policy,
    ensemble: RewardEnsemble,
    examples: Sequence[Example],
    n: int,
    seed: int,
    plan: str | Sequence[str],
    sampling: Sampling,
) -> Iterator[list[Ranked]]:
    """Yield for each prompt its `n` pictures, best first. `Policy.generate` draws the same ones.

    Raises:
        ValueError: no picture of a prompt has a score. `require_scores` finds most of these prompts earlier.
        RewardError: a reward failed.
    """
    prompts = [example.prompt for example in examples]
    first, plans = first_samples(prompts, n, seed), plans_of(plan, prompts)
    step = max(1, policy.engine.max_rows // (2 * n))  # number of prompts whose pictures are drawn together
    for start in range(0, len(examples), step):
        part = slice(start, start + step)
        given = plans[part] if plans else None
        rollout, _, handle = roll_out(policy.engine, ensemble, examples[part], n, sampling, 0, first[part], given)
        scores = handle.result()
        columns = (pictures_of(rollout, prompts[part], n, seed), ensemble.total(scores).tolist(), scores.tolist())
        scored = [
            Ranked(picture, total, dict(zip(ensemble.names, row, strict=True)))
            for picture, total, row in zip(*columns, strict=True)
        ]
        for group in (scored[i : i + n] for i in range(0, len(scored), n)):
            if all(math.isnan(one.score) for one in group):
                raise ValueError(f"no reward applies to any picture of the prompt {group[0].picture.prompt[:120]!r}")
            yield sorted(group, key=lambda one: -math.inf if math.isnan(one.score) else one.score, reverse=True)
