"""Score a policy on held-out prompts, the same draws every time it is asked, and know which evaluation was the best."""

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

_SAMPLES = "heldout"  # of the best evaluation, in its checkpoint


def samples_of(
    rollout: RolloutChunk,
    examples: Sequence[Example],
    scores: Tensor,
    ensemble: RewardEnsemble,
    places: Sequence[int] | None = None,
) -> list[Sample]:
    """The samples of a scored rollout, or those at `places`, as plain records; examples [S] as they were scored."""
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
    """The samples at `places` among those of all ranks, which have as many each -> these, in this order, on every rank.

    Only they go from rank to rank.
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
    """Sample every prompt `num_generations` times and score it -> all samples, on every rank, in order."""
    share = -(-len(examples) // ranks.size)
    start = ranks.rank * share
    mine = examples[start : start + share]
    samples: list[Sample] = []
    if mine:
        first = start * num_generations
        rollout, each, handle = roll_out(engine, ensemble, mine, num_generations, sampling, seed, first)
        samples = samples_of(rollout, each, handle.result(), ensemble)
    else:  # under ZeRO-3, the others wait for this rank's shards
        engine.weights.refresh()
    return ranks.gather(samples)


class Best:
    """The best evaluation so far; of equal ones the first.

    Args:
        metric: of `heldout_metrics`.
        greater_is_better: whether more of it is better.
    """

    def __init__(self, metric: str, greater_is_better: bool) -> None:
        self.metric, self.greater_is_better = metric, greater_is_better
        self.step: int | None = None
        self.value = math.nan

    def require(self, examples: Sequence[Example], names: Sequence[str]) -> None:
        """Raises ValueError if evaluations of these prompts and rewards have no such metric."""
        tasks = sorted({example.task_type for example in examples})
        known = ["heldout/reward", *(f"heldout/reward_by_task/{task}" for task in tasks)]
        known += [f"heldout/rewards/{name}/mean" for name in names]
        if self.metric not in known:
            raise ValueError(f"metric_for_best_model={self.metric!r} is none of {', '.join(known)}")

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether this step has an evaluation that is better than all before."""
        value = metrics.get(self.metric, math.nan)
        better = value > self.value if self.greater_is_better else value < self.value
        if found := better or (math.isnan(self.value) and not math.isnan(value)):
            self.step, self.value = step, value
        return found


class Heldout:
    """The evaluations of a run: when they are, what is kept of them, and which was the best.

    Args:
        config: of the run.
        judges: what scores them.
        examples: the held-out prompts; without any, an evaluation has no samples.
        seed: of the draws, the same in each evaluation.
        ranks: this process among the others.

    Raises:
        ValueError: `metric_for_best_model` is no metric of these prompts and judges.
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
        """Draw and score the held-out prompts, with the guidance of evaluations if they have their own."""
        if not self.examples:
            return []
        number, guidance = self.config.num_eval_generations, self.config.eval_cfg_weight
        sampling = sampling if guidance is None else replace(sampling, cfg_weight=guidance)
        return evaluate(engine, self.judges, self.examples, number, sampling, self.seed, self.ranks)

    def is_due(self, step: int) -> bool:
        """After a step of the run."""
        every = self.config.eval_steps
        return every is not None and (step % every == 0 or step == self.config.max_steps)

    def keep(self, tag: str, samples: list[Sample]) -> list[Sample]:
        """The samples, which are written if there are any."""
        if samples:
            self.ranks.on_main(lambda: save_samples(samples, self.output / "samples" / f"heldout-{tag}"))
        return samples

    def kept(self, tag: str) -> list[Sample]:
        """What `keep` wrote."""
        return load_samples(self.output / "samples" / f"heldout-{tag}")

    def look_back(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Those of the steps before a run that goes on count if their checkpoints are there."""
        for row in rows if self.config.load_best_model_at_end else ():
            step = int(row["step"])
            if (checkpoint_path(self.output, step) / f"{_SAMPLES}.jsonl").is_file():
                self.is_best(step, row)

    def is_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the run keeps the checkpoint of this step as the best."""
        return self.config.load_best_model_at_end and self.best.look(step, metrics)

    @property
    def best_checkpoint(self) -> Path | None:
        return None if self.best.step is None else checkpoint_path(self.output, self.best.step)

    def best_samples(self) -> list[Sample]:
        """Of the best evaluation, if there is one: `save_best` wrote them into its checkpoint."""
        return load_samples(self.best_checkpoint / _SAMPLES) if self.best_checkpoint else []

    def summary(self) -> dict[str, Any]:
        """The best evaluation, as transformers names it, with the model that it scored; nothing without one."""
        if not (folder := self.best_checkpoint):
            return {}
        scored = folder if self.config.ema_decay is None else folder / "ema"
        return {"best_model_checkpoint": str(scored), "best_metric": self.best.value}


def save_best(samples: Sequence[Sample], checkpoint: Path) -> None:
    """Put the samples of the best evaluation into its checkpoint."""
    save_samples(samples, checkpoint / _SAMPLES)


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of a histogram: of all plans' tokens, it falls when the plans become alike."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())
