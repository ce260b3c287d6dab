"""Evaluates a policy on held-out prompts, each time with the same random draws, and finds the best evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.chunk import RolloutChunk
from ..model.engine import RolloutEngine, Sampling
from ..model.generation import to_pixels
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble
from .checkpoint import checkpoint_path
from .config import Config
from .distributed import Ranks
from .rollout import roll_out
from .samples import Sample, load_samples, save_samples

_SAMPLES = "heldout"  # name of the best evaluation's samples in its checkpoint


def samples_of(
    rollout: RolloutChunk,
    examples: Sequence[Example],
    scores: Tensor,
    ensemble: RewardEnsemble,
    places: Sequence[int] | None = None,
) -> list[Sample]:
    """All samples of a scored rollout as records, or those with the indices `places`. `examples` has one per sample."""
    places, totals = range(len(examples)) if places is None else places, ensemble.total(scores).tolist()
    return [
        Sample(
            examples[s].prompt,
            examples[s].task_type,
            rollout.plan_texts[s],
            totals[s],
            dict(zip(ensemble.names, scores[s].tolist(), strict=True)),
            pixels,
        )
        for s, pixels in zip(places, to_pixels(rollout.images[list(places)]), strict=True)
    ]


def gather_samples(
    places: Sequence[int],
    rollout: RolloutChunk,
    examples: Sequence[Example],
    scores: Tensor,
    ensemble: RewardEnsemble,
    ranks: Ranks,
) -> list[Sample]:
    """The samples with the indices `places` in the joined rollouts of all ranks, in this order, on every rank.

    All ranks have the same number of samples. Only these samples are sent between ranks.
    """
    first = ranks.rank * len(examples)
    own = [place - first for place in places if first <= place < first + len(examples)]
    samples = samples_of(rollout, examples, scores, ensemble, own)
    found = dict(ranks.gather([(first + place, sample) for place, sample in zip(own, samples, strict=True)]))
    return [found[place] for place in places]


def evaluate(
    engine: RolloutEngine,
    ensemble: RewardEnsemble,
    examples: Sequence[Example],
    num_generations: int,
    sampling: Sampling,
    seed: int,
    ranks: Ranks,
) -> list[Sample]:
    """Draw and score `num_generations` samples of every prompt -> all samples in order, on every rank."""
    share = -(-len(examples) // ranks.size)
    start = ranks.rank * share
    mine = examples[start : start + share]
    samples: list[Sample] = []
    if mine:
        first = start * num_generations
        rollout, each, handle = roll_out(engine, ensemble, mine, num_generations, sampling, seed, first)
        samples = samples_of(rollout, each, handle.result(), ensemble)
    else:  # with ZeRO-3, the other ranks need this rank's shards of the weights
        engine.weights.refresh()
    return ranks.gather(samples)


class Best:
    """The best evaluation so far, or the first of several equal ones.

    Args:
        metric: name of the metric of `heldout_metrics` to compare.
        greater_is_better: whether a higher value is better.
    """

    def __init__(self, metric: str, greater_is_better: bool) -> None:
        self.metric, self.greater_is_better = metric, greater_is_better
        self.step: int | None = None
        self.value = math.nan

    def require(self, examples: Sequence[Example], names: Sequence[str]) -> None:
        """Raises ValueError if evaluations with these prompts and rewards do not have the metric."""
        tasks = sorted({example.task_type for example in examples})
        known = ["heldout/reward", *(f"heldout/reward_by_task/{task}" for task in tasks)]
        known += [f"heldout/rewards/{name}/mean" for name in names]
        if self.metric not in known:
            raise ValueError(f"metric_for_best_model={self.metric!r} is none of {', '.join(known)}")

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Look at the metrics of a step -> whether it was evaluated, and is better than all steps before."""
        value = metrics.get(self.metric, math.nan)
        better = value > self.value if self.greater_is_better else value < self.value
        if found := better or (math.isnan(self.value) and not math.isnan(value)):
            self.step, self.value = step, value
        return found


class Heldout:
    """The evaluations of a run: when they are due, which samples are kept, and which one is the best.

    Args:
        config: every setting.
        judges: the rewards that score held-out samples.
        examples: the held-out prompts. Without any, an evaluation has no samples.
        seed: random seed, the same in each evaluation.
        ranks: this process among the others.

    Raises:
        ValueError: evaluations with these prompts and judges do not have the metric `metric_for_best_model`.
    """

    def __init__(
        self, config: Config, judges: RewardEnsemble, examples: Sequence[Example], seed: int, ranks: Ranks
    ) -> None:
        self.config, self.judges, self.examples, self.seed, self.ranks = config, judges, examples, seed, ranks
        self.output = Path(config.output_dir)
        self.best = Best(config.metric_for_best_model, config.greater_is_better)
        if config.load_best_model_at_end:
            self.best.require(examples, judges.names)

    def evaluate(self, engine: RolloutEngine, sampling: Sampling) -> list[Sample]:
        """Draw and score samples of the held-out prompts, with `eval_cfg_weight` if that is set."""
        if not self.examples:
            return []
        number, guidance = self.config.num_eval_generations, self.config.eval_cfg_weight
        sampling = sampling if guidance is None else replace(sampling, cfg_weight=guidance)
        return evaluate(engine, self.judges, self.examples, number, sampling, self.seed, self.ranks)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        every = self.config.eval_steps
        return every is not None and (step % every == 0 or step == self.config.max_steps)

    def keep(self, tag: str, samples: list[Sample]) -> list[Sample]:
        """Write the samples, if there are any, and return them."""
        if samples:
            self.ranks.on_main(lambda: save_samples(samples, self.output / "samples" / f"heldout-{tag}"))
        return samples

    def kept(self, tag: str) -> list[Sample]:
        """Read what `keep` wrote."""
        return load_samples(self.output / "samples" / f"heldout-{tag}")

    def look_back(self, rows: Iterable[Mapping[str, float]]) -> None:
        """In a resumed run, consider the evaluations of the steps before whose checkpoints still exist."""
        for row in rows if self.config.load_best_model_at_end else ():
            step = int(row["step"])
            if (checkpoint_path(self.output, step) / f"{_SAMPLES}.jsonl").is_file():
                self.is_best(step, row)

    def is_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the checkpoint of this step is to be kept as the best one."""
        return self.config.load_best_model_at_end and self.best.look(step, metrics)

    @property
    def best_checkpoint(self) -> Path | None:
        return None if self.best.step is None else checkpoint_path(self.output, self.best.step)

    def best_samples(self) -> list[Sample]:
        """The samples of the best evaluation, if there is one, which `save_best` wrote into its checkpoint."""
        return load_samples(self.best_checkpoint / _SAMPLES) if self.best_checkpoint else []

    def summary(self) -> dict[str, Any]:
        """The best evaluation by the names that transformers uses: its model and its metric. Empty if there is none."""
        if not (folder := self.best_checkpoint):
            return {}
        scored = folder if self.config.ema_decay is None else folder / "ema"
        return {"best_model_checkpoint": str(scored), "best_metric": self.best.value}


def save_best(samples: Sequence[Sample], checkpoint: Path) -> None:
    """Write the samples of the best evaluation into its checkpoint."""
    save_samples(samples, checkpoint / _SAMPLES)
