"""The training loop: rollout → rewards → advantages → update, step after step, with evaluations and checkpoints."""

from __future__ import annotations

import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import set_seed

from ..kernels.group_advantages import group_advantages
from ..model.adapters import require_peft
from ..model.attention import resolve
from ..model.chunk import RolloutChunk
from ..model.engine import RolloutEngine
from ..model.policy import Policy, load_policy
from ..model.prompts import PromptFormat
from ..model.settings import RolloutSettings, Sampling
from ..model.weights import gathered
from ..rewards.base import Example
from ..rewards.ensemble import RewardEnsemble
from ..rewards.worker import RewardError, borrowed, host_copies
from .average import mix_into
from .checkpoint import checkpoint_path, find_checkpoint, load_state, run_settings, save_checkpoint, step_of
from .config import Config
from .data import PromptFile, step_indices
from .distributed import RankLost, Ranks, resume_command
from .dynamic_sampling import Drawn, redraw, redraw_metrics
from .entropy import EntropyTarget
from .errors import stop_signals
from .evaluate import Heldout, gather_samples, save_best
from .hub import require_hub
from .metrics import Phases, image_diversity, on_host, plan_metrics, reward_costs, reward_metrics
from .optim import MasterAdamW, adamw_8bit
from .output import go_back, locked, make_room
from .plan import settle
from .policies import REFERENCE, build_policy, build_reference
from .report import draw_grid, no_failure, pick_places
from .results import Results
from .rollout import build_engine, roll_out
from .rollout_files import Replay, SavedRollout, path_of, require_room, save_rollout
from .samples import Sample, heldout_metrics, remove_samples, save_samples
from .step import Ahead, begin, begins_early, micro_batches_of, reference_logprobs, reference_passes, update
from .token_weights import TokenWeights
from .tracking import Log, require_trackers
from .zero import ZeroAdamW, engine_config, require_deepspeed

_SEED_STRIDE = 1 << 32  # number of random seeds of a run: one for each step, and the last one for evaluations
_EVAL_STEP = _SEED_STRIDE - 1


def rollout_settings(config: Config) -> RolloutSettings:
    """The settings of prompts and sampling."""
    prompts = PromptFormat.from_files(config.chat_template, config.system_prompt, config.reasoning_prompt_path)
    sampling = Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
    return RolloutSettings(prompts, sampling)


@contextmanager
def short_collections() -> Iterator[None]:
    """Keep garbage collections short. A full one scans all imported objects, which takes 0.2 s or more, in which every
    other rank waits too."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trainer:
    """Holds the parts of a run; `run()` trains.

    Args:
        config: every setting.
        ranks: this process among the others.
    """

    optimizer: MasterAdamW  # not with rollout_only
    engine: RolloutEngine  # not with replay

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.output = Path(config.output_dir)
        set_seed(config.seed)
        zero = engine_config(config, ranks)
        require_trackers(config.report_to)
        eight_bits = config.optim == "adamw_8bit"
        for wanted, need in ((config.lora_r, require_peft), (zero, require_deepspeed), (eight_bits, adamw_8bit)):
            if wanted:
                need()  # raises if a package is not installed, before anything is loaded
        heldout = None if config.rollout_only else config.eval_file  # rollout_only leaves the model as it is
        paths = [path for path in (config.train_file, heldout) if path and not config.replay]
        files = [PromptFile(path, config.skip_bad_prompts) for path in paths]
        self.settings = rollout_settings(config)
        checkpoint, said = ranks.on_main(lambda: find_checkpoint(config.resume, self.output))
        self.config, self.recomputing = self._settle(config)
        config = self.config
        judges = self._build_rewards(checkpoint, bool(heldout))
        for file, ensemble in zip(files, (self.ensemble, judges), strict=False):
            file.check(ensemble.check)
        self.repo = ranks.on_main(lambda: require_hub(config))
        if config.token_weights:
            TokenWeights(config.token_weights)  # raises if the function is not there
        self.attention = resolve(config.attn_implementation, ranks.device, getattr(torch, config.dtype))
        self.policy = build_policy(config, checkpoint, self._load)
        self.encoder = self.policy.prompt_encoder(self.settings.prompts)
        for file in files:
            file.check(self._fits)
            said += file.said()
        if files and not config.rollout_only:
            said += files[0].unscored(self.ensemble.applies)
        self.examples, examples = ([*(file.examples for file in files), [], []])[:2]
        self.heldout = Heldout(config, judges, examples, config.seed * _SEED_STRIDE + _EVAL_STEP, ranks)
        self.reference, self.reference_moves = build_reference(config, checkpoint, self.policy, self._load)
        self.with_reference: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.reference and config.reference_device:
            self.with_reference = partial(borrowed, host_copies(self.reference.model, ranks.device), ranks.device)
        if not config.rollout_only:
            own = self.policy.trainable_parameters()
            self.optimizer = ZeroAdamW(self.policy, config, zero, ranks) if zero else MasterAdamW(own, config)
        if not config.replay:
            self.engine = build_engine(self.policy, self.encoder, config)
        self.step, self.seconds, self.saved = 0, 0.0, -1
        self.entropy = EntropyTarget(config)
        if checkpoint:
            parts = (self.optimizer, run_settings(config, ranks.size), self.entropy.state)
            self.step, self.seconds, changed = load_state(checkpoint, *parts)
            said += changed
            if checkpoint.resolve().parent == self.output.resolve():  # do not write it again: it may hold best samples
                self.saved = self.step
        ranks.on_main(lambda: self._begin(checkpoint, said))

    def _build_rewards(self, checkpoint: Path | None, heldout: bool) -> RewardEnsemble:
        """Build the rewards, or read them from the rollouts to replay -> the rewards that score held-out samples."""
        config, ranks = self.config, self.ranks
        weights = cast(list[float] | None, config.reward_weights)
        self.replay: Replay | None = None
        if config.replay:
            steps = range(step_of(checkpoint) + 1 if checkpoint else 1, self._last_step + 1)
            samples = config.prompts_per_device * config.num_generations
            self.replay = Replay(Path(config.replay), steps, ranks, samples, weights)
            self.ensemble = self.replay.ensemble
            return self.ensemble
        self.ensemble = config.rewards.build(weights, device=ranks.device, failures=self.output)
        return config.rewards.build_heldout(self.ensemble, ranks.device, self.output) if heldout else self.ensemble

    def _begin(self, checkpoint: Path | None, said: list[str]) -> None:
        """Prepare the output folder. This comes last, so that a run that is refused changes nothing."""
        if self.config.save_rollouts:
            require_room(Path(self.config.save_rollouts), resumes=self.config.resume is not None)
        own = checkpoint and self.output.resolve() in checkpoint.resolve().parents  # not of another run
        said += go_back(self.output, self.step) if own else make_room(self.output, self.config)
        (self.output / "samples").mkdir(parents=True, exist_ok=True)
        if self.step < self._last_step:
            remove_samples(self.output / "samples" / "heldout-after")  # of a run that this one goes on from
        print("".join(f"{line}\n" for line in said), end="")

    def _fits(self, example: Example) -> None:
        """Raises ValueError if the context has no room for the longest plan, or for the picture after it."""
        longest = self.config.max_completion_length
        self.encoder.plan_ids(example.prompt, longest)
        self.encoder.image_ids(example.prompt, "", longest + self.policy.num_image_tokens)

    def _settle(self, config: Config) -> tuple[Config, Callable[[int], bool | str]]:
        return settle(config, self.ranks)

    def _load(self, path: str | Path, reference: bool = False) -> Policy:
        policy = load_policy(
            path,
            dtype=getattr(torch, self.config.dtype),
            device=(reference and self.config.reference_device) or self.ranks.device,
            freeze=self.config.freeze,
        )
        policy.attention = self.attention
        return policy.freeze() if reference else policy

    def run(self) -> dict[str, Any]:
        """Train to `max_steps`, unless `stop_after`, a signal or an alarm ends the run before -> the summary.

        Ranks other than the main one return an empty summary.
        """
        config = self.config
        before = self.heldout.keep("before", self._evaluate()) if self.step == 0 else self.heldout.kept("before")
        self.results = Results(config, self.ensemble.names, self.heldout.judges.names)
        self.heldout.look_back(self.results.rows)
        if self.step < self._last_step:
            self.ranks.on_main(self.results.describe)
        elif self.ranks.main:
            print(f"no step is left: the checkpoint has {self.step}, and this run ends after {self._last_step}")
        samples, stopped = self._train()
        done = self.step >= config.max_steps
        if done:
            after = self.heldout.keep("after", self.heldout.best_samples() or samples or self._evaluate())
        else:
            after = self.heldout.kept("after")
        self._agree([])  # rank 0 may host the store, so it must not end before the others have read from it
        if not self.ranks.main:
            return {}
        images = self.step * config.prompts_per_device * config.num_generations * self.ranks.size
        summary = self.results.finish(self.step, self.seconds, images, before, after, self.heldout.summary())
        if not config.rollout_only:
            self.results.publish(summary, run_settings(config, self.ranks.size), self.repo, done)
        if stopped:
            name = "an alarm" if stopped == signal.SIGALRM else signal.Signals(stopped).name
            go_on = "" if config.rollout_only else f"; continue with: {resume_command()}"
            print(f"stopped by {name} after step {self.step} of {config.max_steps}{go_on}")
        return summary

    def _train(self) -> tuple[list[Sample], int]:
        """Take steps until the run ends -> samples of the last step, if evaluated, and the signal that ended it."""
        config, last = self.config, self._last_step
        log = Log(config, self.step) if self.ranks.main else None
        samples: list[Sample] = []
        stopped = 0
        with (
            closing(log) if log else nullcontext(),
            short_collections(),
            stop_signals() as received,
            self._no_step_lost(),  # inside, so that torchrun's SIGTERM does not interrupt it
        ):
            while self.step < last and not (stopped := self._agree(received)):
                metrics, grid = self._train_step()
                if self.reference and config.sync_ref_model and self.step % config.ref_model_sync_steps == 0:
                    mix_into(self.reference, self.policy, config.ref_model_mixup_alpha)
                samples = self._evaluate() if self.heldout.is_due(self.step) else []
                metrics |= heldout_metrics(samples)
                record = partial(self.results.record, cast(Log, log), self.step, metrics, grid)
                if self.ranks.on_main(record) and config.stop_on_alarm:
                    received.append(signal.SIGALRM)
                if self.heldout.is_best(self.step, metrics):
                    self._save(samples)
                elif self.step % config.save_steps == 0 and self.step < last:
                    self._save()
            self._save()
        return samples, stopped

    @contextmanager
    def _no_step_lost(self) -> Iterator[None]:
        """If a reward or another rank fails inside, write a checkpoint, unless that takes the ranks that are gone.

        A reward fails before the update of a step, or after it in an evaluation, and rank 0 misses another rank before
        the update. So the weights are those of a step.
        """
        try:
            yield
        except (RewardError, RankLost):
            trained = self.step and not self.config.rollout_only
            if trained and (self.ranks.size == 1 or (self.ranks.main and not isinstance(self.optimizer, ZeroAdamW))):
                self._save()
                newest = checkpoint_path(self.output, self.step)
                print(f"the newest checkpoint is {newest}; continue with: {resume_command()}")
            raise

    @property
    def _last_step(self) -> int:
        return min(self.config.max_steps, self.config.stop_after or self.config.max_steps)

    def _agree(self, received: list[int]) -> int:
        """The signal that any rank received, 0 for none. All ranks get the same answer and stop after the same step."""
        return int(self.ranks.max(torch.tensor(max(received, default=0), device=self.ranks.device)).item())

    def _train_step(self) -> tuple[dict[str, float], Path | None]:
        """Rollout → rewards → advantages → update -> the step's metrics, and the grid of samples if it drew one."""
        config, ranks = self.config, self.ranks
        start = time.perf_counter()
        rollout, examples, handle = self._roll_out(self._step_examples())
        clock = Phases(rollout.spans, ranks.device)
        micro_batches = micro_batches_of(self.policy, rollout, self.encoder, config)
        with clock("reference"):
            reference = self._reference_logprobs(rollout, micro_batches) if self.reference else None
        self.policy.recompute(self.recomputing(int(rollout.plans.lengths.max())))
        with clock("train"):
            early = begins_early(config) and not config.rollout_only
            ahead = begin(self.policy, micro_batches, self.encoder, config) if early else None
        with clock("reward"):
            scores = handle.result()
        self._save_rollout(rollout, examples, scores)
        waits = ranks.meet(self.step + 1)
        everyone = ranks.cat(scores)
        trains = not config.rollout_only and not self.ensemble.total(everyone).isnan().all()
        advantages = group_advantages(
            everyone,
            config.num_generations,
            self.ensemble.weights,
            scale=config.scale_rewards,
            combine=config.multi_objective_aggregation,
        )
        mine = advantages[ranks.rank * len(scores) :][: len(scores)]
        rate = {} if config.rollout_only else {"learning_rate": self.optimizer.learning_rate}
        with clock("train"):
            trained = self._update(micro_batches, mine, reference, ahead) if trains else self._skip_update(ahead)
        self.step += 1
        if not (trains or config.rollout_only) and ranks.main:
            print(f"step {self.step}: no reward applies to any sample; the update is skipped")
        told = [(example.task_type for example in examples), rollout.plans.tolist(), rollout.truncated.tolist()]
        tasks, plans, truncated = map(list, zip(*ranks.gather(list(zip(*told, strict=True))), strict=True))
        grid = self._draw_grid(rollout, examples, scores, tasks)
        metrics = {
            **reward_metrics(self.ensemble, everyone, config.num_generations, tasks),
            **reward_costs(handle, ranks),
            **on_host(trained | image_diversity(rollout.images, config.num_generations, ranks)),
            "update_skipped": float(not trains),
            **plan_metrics(plans, truncated, config.num_generations),
            **(redraw_metrics(self.redrawn, ranks) if config.dynamic_sampling and not self.replay else {}),
        }
        metrics |= self.entropy.look(metrics)
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        return {
            **metrics,
            **rate,
            "images_per_second": len(everyone) / elapsed,
            **{f"seconds/{name}": value for name, value in clock.seconds.items()},
            **waits,
            "seconds/step": elapsed,
        }, grid

    def _update(
        self,
        micro_batches: list[RolloutChunk],
        advantages: Tensor,
        reference: list[dict[str, Tensor]] | None,
        ahead: Ahead | None,
    ) -> dict[str, Tensor]:
        # LoRA's dropout mask differs between ranks, and is the same in a resumed run
        torch.manual_seed(self.config.seed * _SEED_STRIDE + self.step * self.ranks.size + self.ranks.rank)
        config = self.entropy.applied(self.config)
        parts = (micro_batches, advantages, reference, self.encoder, config, self.ranks, ahead)
        return update(self.policy, self.optimizer, *parts)

    def _skip_update(self, ahead: Ahead | None) -> dict[str, Tensor]:
        """Advance the learning rate only. Without any score the KL alone would be trained."""
        if not self.config.rollout_only:
            if ahead:
                ahead.clear()  # frees the activations
            self.policy.model.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns if the schedule moves before the first update
                self.optimizer.schedule.step()
        return {}

    def _save_rollout(self, rollout: RolloutChunk, examples: list[Example], scores: Tensor) -> None:
        if self.config.save_rollouts:
            names, count = self.ensemble.names, len(self.config.rewards.names)
            saved = SavedRollout(rollout, examples, scores, names[:count], names[count:], self.ranks.size)
            path = path_of(Path(self.config.save_rollouts), self.step + 1, self.ranks.rank)
            save_rollout(path, saved, self.config.save_rollout_images)

    def _draw_grid(
        self, rollout: RolloutChunk, examples: list[Example], scores: Tensor, tasks: list[str]
    ) -> Path | None:
        """Write samples of this step, if it is due -> the path of their grid. `tasks` are those of all ranks."""
        size = self.config.num_generations
        if not self.config.sample_steps or self.step % self.config.sample_steps:
            return None
        places = [size * prompt for prompt in pick_places(tasks[::size])]
        picked = gather_samples(places, rollout, examples, scores, self.ensemble, self.ranks)
        path = self.output / "samples" / f"step-{self.step:06d}.png"
        if self.ranks.main:
            with no_failure(f"step {self.step}: no grid of samples"):
                save_samples(picked, path)
                draw_grid({f"step {self.step}": picked}, path)
                return path
        return None

    @record_function("data")
    def _step_examples(self) -> list[Example]:
        """This rank's prompts of the step. Ranks take consecutive parts of one batch. A replay needs no prompts."""
        if self.replay:
            return []
        share = self.config.prompts_per_device
        batch = step_indices(len(self.examples), share * self.ranks.size, self.step, self.config.seed)
        return [self.examples[i] for i in batch[self.ranks.rank * share :][:share]]

    def _roll_out(self, examples: list[Example]) -> Drawn:
        """Draw the samples of a step, or read them from the files of a replay."""
        if self.replay:
            return self.replay.roll_out(self.step + 1)
        group = self.config.num_generations
        seed = self.config.seed * _SEED_STRIDE + self.step
        first = self.ranks.rank * len(examples) * group
        how = {"group_size": group, "sampling": self.settings.sampling, "seed": seed}
        draw: Callable[..., Drawn] = partial(roll_out, self.engine, self.ensemble, **how)  # type: ignore[arg-type]
        drawn = draw(examples, first_sample=first)
        if self.config.dynamic_sampling:
            given = (self.examples, self.ensemble.weights, self.config, self.step, self.ranks)
            drawn, self.redrawn = redraw(drawn, draw, *given)
        return drawn

    def _reference_logprobs(self, rollout: RolloutChunk, micro_batches: list[RolloutChunk]) -> list[dict[str, Tensor]]:
        assert self.reference
        passes = reference_passes(self.reference, rollout, self.encoder, self.config)
        with self.with_reference():
            if self.config.reference_device:
                self.reference.freeze()  # joins the weights again, which were copied one by one
            return reference_logprobs(self.reference, micro_batches, self.encoder, self.config, passes)

    def _evaluate(self) -> list[Sample]:
        """Draw and score samples of the held-out prompts, with the averaged weights if there are any."""
        if not self.heldout.examples:
            return []
        with self.optimizer.averaged():
            return self.heldout.evaluate(self.engine, self.settings.sampling)

    def _save(self, best: list[Sample] | None = None) -> None:
        """Write a checkpoint. `best` are the held-out samples of the best evaluation, if this is its step."""
        if self.config.rollout_only or self.saved == self.step:
            return
        state = {**self.optimizer.state_dict(), "entropy": self.entropy.state}
        weights = gathered(self.policy.model, self.ranks.main)  # a collective: all ranks take part
        run = run_settings(self.config, self.ranks.size)
        parts = (self.policy, weights, self.settings, state, self.seconds, run)
        limit = self.config.save_total_limit

        def also(folder: Path) -> None:
            if best:
                save_best(best, folder)
            if self.reference and self.reference_moves:
                self.reference.save_pretrained(folder / REFERENCE)
            if self.optimizer.average:
                with self.optimizer.averaged():
                    self.policy.save_pretrained(folder / "ema", settings=self.settings)

        self.ranks.on_main(lambda: save_checkpoint(self.output, self.step, *parts, limit, self.heldout.best.step, also))
        self.saved = self.step


def train(config: Config) -> dict[str, Any]:
    """Run a training job in this process, which may be one of several -> its summary, empty on other ranks than 0."""
    ranks = Ranks.start(config.ddp_timeout)
    try:
        with ranks.naming_the_lost(), locked(Path(config.output_dir)) if ranks.main else nullcontext():
            return Trainer(config, ranks).run()
    finally:
        ranks.close()
