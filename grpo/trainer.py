"""The run: rollout → rewards → advantages → reference → update, step after step, and what it leaves behind."""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import set_seed

from ..kernels.group_advantages import group_advantages
from ..model.adapters import adapter_base, add_lora, load_lora, require_peft
from ..model.attention import resolve
from ..model.chunk import RolloutChunk
from ..model.engine import RolloutEngine
from ..model.policy import Policy, load_policy
from ..model.prompts import PromptFormat
from ..model.settings import RolloutSettings, Sampling
from ..model.weights import gathered
from ..rewards.base import Example
from ..rewards.worker import borrowed, host_copies
from .alarms import Alarms
from .average import mix_into
from .checkpoint import checkpoint_path, find_checkpoint, load_state, save_checkpoint, step_of
from .config import Config
from .data import PromptFile, step_indices
from .distributed import Ranks, resume_command
from .dynamic_sampling import Drawn, redraw, redraw_metrics
from .entropy import EntropyTarget
from .errors import stop_signals
from .evaluate import Heldout, gather_samples, save_best
from .files import whole
from .hub import push, require_hub, write_card
from .metrics import Phases, image_diversity, on_host, plan_metrics, reward_costs, reward_metrics
from .optim import MasterAdamW, adamw_8bit
from .output import METRICS, RUN, SUMMARY, go_back, locked, make_room, read_metrics, require_writable
from .plan import settle
from .report import draw_grid, no_failure, pick_places, write_report
from .rollout import roll_out
from .rollout_files import Replay, SavedRollout, path_of, save_rollout
from .samples import Sample, heldout_metrics, heldout_table, mean_reward, save_samples
from .step import begin, begins_early, micro_batches_of, reference_logprobs, reference_passes, update
from .token_weights import TokenWeights
from .tracking import Log, require_trackers
from .zero import ZeroAdamW, engine_config, require_deepspeed

_SEED_STRIDE = 1 << 32  # room for the steps of one seed; evaluation takes the last of them
_EVAL_STEP = _SEED_STRIDE - 1
_REFERENCE = "reference"  # folder in a checkpoint, of a model that has moved
# settings that say where a run writes, how often, and when it ends for now
_OF_OUTPUT = {"output_dir", "overwrite_output_dir", "move_output_dir", "resume", "save_steps", "save_total_limit"}
_OF_OUTPUT |= {"sample_steps", "profile", "report_to", "stop_after", "save_rollouts", "save_rollout_images", "replay"}
_OF_OUTPUT |= {"push_to_hub", "hub_model_id", "hub_private_repo"}


def rollout_settings(config: Config) -> RolloutSettings:
    """Prompts and sampling of a run."""
    prompts = PromptFormat.from_files(config.chat_template, config.system_prompt, config.reasoning_prompt_path)
    sampling = Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
    return RolloutSettings(prompts, sampling)


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
                need()  # what is not installed is said before anything is loaded
        heldout = None if config.rollout_only else config.eval_file  # the same model before and after
        paths = [path for path in (config.train_file, heldout) if path and not config.replay]
        files = [PromptFile(path, config.skip_bad_prompts) for path in paths]
        self.settings = rollout_settings(config)
        checkpoint, said = ranks.on_main(lambda: find_checkpoint(config.resume, self.output))
        weights = cast(list[float] | None, config.reward_weights)
        self.replay: Replay | None = None
        if config.replay:
            steps = range(step_of(checkpoint) + 1 if checkpoint else 1, (config.stop_after or config.max_steps) + 1)
            samples = config.prompts_per_device * config.num_generations
            self.replay = Replay(Path(config.replay), steps, ranks, samples, weights)
            self.ensemble = self.replay.ensemble
        else:
            self.ensemble = config.rewards.build(weights, device=ranks.device, failures=self.output)
        judges = self.ensemble  # of evaluations
        if heldout and not config.replay:
            judges = config.rewards.build_heldout(self.ensemble, ranks.device, self.output)
        for file, ensemble in zip(files, (self.ensemble, judges), strict=False):
            file.check(ensemble.check)
        self.repo = ranks.on_main(lambda: require_hub(config))
        if config.token_weights:
            TokenWeights(config.token_weights)  # what is wrong with it is said now
        self.attention = resolve(config.attn_implementation, ranks.device, getattr(torch, config.dtype))
        if adapter_base(config.model_name_or_path):
            raise ValueError(
                f"model_name_or_path={config.model_name_or_path!r} is a LoRA adapter; merge it into its model first: "
                f"python -m bicot.model.merge_lora {config.model_name_or_path} OUT"
            )
        self.policy = (
            self._adapted(checkpoint) if config.lora_r else self._load(checkpoint or config.model_name_or_path)
        )
        self.encoder = self.policy.prompt_encoder(self.settings.prompts)
        for file in files:
            file.check(self._fits)
            said += file.said()
        self.examples, examples = ([*(file.examples for file in files), [], []])[:2]
        self.heldout = Heldout(config, judges, examples, config.seed * _SEED_STRIDE + _EVAL_STEP, ranks)
        self.config = config = settle(config, ranks)
        self.policy.recompute(config.gradient_checkpointing)
        self.reference: Policy | None = None
        self.with_reference: Callable[[], AbstractContextManager[None]] = nullcontext
        if config.kl_streams and not config.rollout_only:  # with LoRA the policy itself, its adapters off
            moved = checkpoint / _REFERENCE if checkpoint and (checkpoint / _REFERENCE).is_dir() else None
            self.moves = config.sync_ref_model or moved is not None
            initial = moved or config.model_name_or_path
            self.reference = self.policy if config.lora_r else self._load(initial, reference=True)
            if config.reference_device:
                self.with_reference = partial(borrowed, host_copies(self.reference.model, ranks.device), ranks.device)
        if not config.rollout_only:
            own = self.policy.trainable_parameters()
            self.optimizer = ZeroAdamW(self.policy, config, zero, ranks) if zero else MasterAdamW(own, config)
        if not config.replay:
            self.engine = RolloutEngine(
                self.policy,
                self.encoder,
                max_rows=config.rollout_max_rows,
                kv_dtype=config.rollout_kv_dtype,
                kv_bytes=None if config.rollout_kv_gib is None else int(config.rollout_kv_gib * 2**30),
                kv_release=config.rollout_kv_release,
            )
        self.step, self.seconds, self.saved = 0, 0.0, -1
        self.entropy = EntropyTarget(config)
        if checkpoint:
            parts = (self.optimizer, self._run_settings(), self.entropy.state)
            self.step, self.seconds, changed = load_state(checkpoint, *parts)
            said += changed
            if checkpoint.resolve().parent == self.output.resolve():  # it is there, perhaps with the best's samples
                self.saved = self.step
        ranks.on_main(lambda: self._begin(checkpoint, said))

    def _begin(self, checkpoint: Path | None, said: list[str]) -> None:
        """Prepare the output folder; last, so that nothing is touched before all that can be refused has been."""
        if self.config.save_rollouts:
            require_writable(Path(self.config.save_rollouts), "save_rollouts")
        said += make_room(self.output, self.config) if checkpoint is None else go_back(self.output, self.step)
        (self.output / "samples").mkdir(parents=True, exist_ok=True)
        print("".join(f"{line}\n" for line in said), end="")

    def _run_settings(self) -> dict[str, Any]:
        """What a checkpoint remembers: the settings, but where and when the run writes; and the prompts of a step."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _OF_OUTPUT}
        # however they are divided among micro-batches and ranks
        del settings["micro_batch_tokens"]
        parts = [settings.pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        return settings | {"prompts_per_step": math.prod(parts) * self.ranks.size}

    def _fits(self, example: Example) -> None:
        """Raises ValueError if the context has no room for the longest plan, or for the picture after it."""
        longest = self.config.max_completion_length
        self.encoder.plan_ids(example.prompt, longest)
        self.encoder.image_ids(example.prompt, "", longest + self.policy.num_image_tokens)

    def _load(self, path: str | Path, reference: bool = False) -> Policy:
        policy = load_policy(
            path,
            dtype=getattr(torch, self.config.dtype),
            device=(reference and self.config.reference_device) or self.ranks.device,
            freeze=self.config.freeze,
        )
        policy.attention = self.attention
        return policy.freeze() if reference else policy

    def _adapted(self, checkpoint: Path | None) -> Policy:
        """The initial model with new adapters, the same on all ranks, or those of the checkpoint."""
        config, policy = self.config, self._load(self.config.model_name_or_path)
        if checkpoint is None:
            set_seed(config.seed)
            shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules, config.freeze)
            policy.adapters = add_lora(policy.model, *shape).eval()
        elif adapter_base(checkpoint):
            policy.adapters = load_lora(policy.model, checkpoint).eval()
        else:
            raise ValueError(
                f"{checkpoint} was trained with lora_r 0, which cannot become {config.lora_r} within a run"
            )
        base = Path(config.model_name_or_path)  # whole, so that the adapter finds it from anywhere
        policy.adapters.peft_config["default"].base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
        return policy

    def run(self) -> dict[str, Any]:
        """Train to `max_steps` (or `stop_after`, or a SIGTERM/SIGINT) -> the summary that is also written."""
        config = self.config
        before = self.heldout.keep("before", self._evaluate()) if self.step == 0 else self.heldout.kept("before")
        last = min(config.max_steps, config.stop_after or config.max_steps)
        log = Log(config, self.step) if self.ranks.main else None
        self._look_back()
        samples: list[Sample] = []
        stopped = 0
        with closing(log) if log else nullcontext(), stop_signals() as received:
            while self.step < last and not (stopped := self._agree(received)):
                metrics, grid = self._train_step()
                if self.reference and config.sync_ref_model and self.step % config.ref_model_sync_steps == 0:
                    mix_into(self.reference, self.policy, config.ref_model_mixup_alpha)
                samples = self._evaluate() if self.heldout.is_due(self.step) else []
                metrics |= heldout_metrics(samples)
                if self.ranks.on_main(partial(self._record, log, metrics, grid)) and config.stop_on_alarm:
                    received.append(signal.SIGALRM)
                if self.heldout.is_best(self.step, metrics):
                    self._save(samples)
                elif self.step % config.save_steps == 0 and self.step < last:
                    self._save()
            self._save()
        done = self.step >= config.max_steps
        if done:
            after = self.heldout.keep("after", self.heldout.best_samples() or samples or self._evaluate())
        else:
            after = self.heldout.kept("after")
        summary = self._finish(before, after) if self.ranks.main else {}
        if self.ranks.main and not config.rollout_only:
            model = Path(summary.get("best_model_checkpoint", checkpoint_path(self.output, self.step)))
            with no_failure("no model card"):
                write_card(model, config, self._run_settings(), summary, self.repo)
            if self.repo and done:
                push(model, self.repo, self.step)
        if stopped and self.ranks.main:
            name = "an alarm" if stopped == signal.SIGALRM else signal.Signals(stopped).name
            print(f"stopped by {name} after step {self.step} of {config.max_steps}; go on with: {resume_command()}")
        return summary

    def _record(self, log: Log | None, metrics: dict[str, float], grid: Path | None) -> bool:
        """Write a step's metrics and say its alarms -> whether there are any."""
        assert log
        log.write(self.step, metrics, grid)
        said = self.alarms.look({"step": self.step, **metrics})
        if said:
            self._describe()
        print("".join(f"{line}\n" for line in said), end="")
        return bool(said)

    def _describe(self) -> None:
        """Write what the metrics do not say: settings, alarms, and which rewards the table of evaluations has."""
        about = {"settings": asdict(self.config), "alarms": self.alarms.said, "heldout": self._heldout_names()}
        with whole(self.output / RUN) as part:
            part.write_text(json.dumps(about, indent=2) + "\n")

    def _heldout_names(self) -> list[str]:
        """The rewards of evaluations alone."""
        return self.heldout.judges.names[len(self.ensemble.names) :]

    def _look_back(self) -> None:
        """On the steps before: their alarms have been raised."""
        path, count = self.output / METRICS, len(self.config.rewards.names)
        rows = [row for _, row in read_metrics(path)[0]] if path.is_file() else []
        names = self.ensemble.names
        self.alarms = Alarms(names[:count], names[count:], self.config.num_iterations, rows)
        self.heldout.look_back(rows)
        self.ranks.on_main(self._describe)

    def _agree(self, received: list[int]) -> int:
        """The signal that told a rank to stop, 0 for none: all stop after the same step."""
        return int(self.ranks.max(torch.tensor(max(received, default=0), device=self.ranks.device)).item())

    def _train_step(self) -> tuple[dict[str, float], Path | None]:
        config, ranks = self.config, self.ranks
        start = time.perf_counter()
        rollout, repeated, handle = self._roll_out(self._step_examples())
        clock = Phases(rollout.spans, ranks.device)
        micro_batches = micro_batches_of(self.policy, rollout, self.encoder, config)
        with clock("reference"):
            reference = self._reference_logprobs(rollout, micro_batches) if self.reference else None
        with clock("train"):
            early = begins_early(config) and not config.rollout_only
            ahead = begin(self.policy, micro_batches, self.encoder, config) if early else None
        with clock("reward"):
            scores = handle.result()
        if config.save_rollouts:
            names, count = self.ensemble.names, len(config.rewards.names)
            saved = SavedRollout(rollout, repeated, scores, names[:count], names[count:], ranks.size)
            path = path_of(Path(config.save_rollouts), self.step + 1, ranks.rank)
            save_rollout(path, saved, config.save_rollout_images)
        waits = ranks.meet(self.step + 1)
        everyone = ranks.cat(scores)
        scored = not self.ensemble.total(everyone).isnan().all()
        advantages = group_advantages(
            everyone,
            config.num_generations,
            self.ensemble.weights,
            scale=config.scale_rewards,
            combine=config.multi_objective_aggregation,
        )
        mine = advantages[ranks.rank * len(scores) :][: len(scores)]
        trains = not config.rollout_only
        rate = {"learning_rate": self.optimizer.learning_rate} if trains else {}
        trained: dict[str, torch.Tensor] = {}
        with clock("train"):
            if trains and scored:
                # LoRA's dropout: other draws on each rank, the same in a run that goes on
                torch.manual_seed(config.seed * _SEED_STRIDE + self.step * ranks.size + ranks.rank)
                parts = (micro_batches, mine, reference, self.encoder, self.entropy.applied(config), ranks, ahead)
                trained = update(self.policy, self.optimizer, *parts)
            elif trains:  # the KL alone would train, so the schedule alone goes on
                ahead = None
                self.policy.model.eval()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's warning before the first update
                    self.optimizer.schedule.step()
        self.step += 1
        if trains and not scored and ranks.main:
            print(f"step {self.step}: no reward applies to any sample; the update is skipped")
        grid = None
        tasks = [example.task_type for example in repeated]
        told = ranks.gather(list(zip(tasks, rollout.plans.tolist(), rollout.truncated.tolist(), strict=True)))
        tasks, plans, truncated = map(list, zip(*told, strict=True))
        if config.sample_steps and self.step % config.sample_steps == 0:
            places = [config.num_generations * prompt for prompt in pick_places(tasks[:: config.num_generations])]
            picked = gather_samples(places, rollout, repeated, scores, self.ensemble, ranks)
            path = self.output / "samples" / f"step-{self.step:06d}.png"
            if ranks.main:
                with no_failure(f"step {self.step}: no grid of samples"):
                    save_samples(picked, path)
                    draw_grid({f"step {self.step}": picked}, path)
                    grid = path
        metrics = {
            **reward_metrics(self.ensemble, everyone, config.num_generations, tasks),
            **reward_costs(handle, ranks),
            **on_host(trained | image_diversity(rollout.images, config.num_generations, ranks)),
            "update_skipped": float(not (trains and scored)),
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

    @record_function("data")
    def _step_examples(self) -> list[Example]:
        """This rank's prompts of the step: ranks take consecutive parts of one global batch. None in a replay."""
        if self.replay:
            return []
        share = self.config.prompts_per_device
        batch = step_indices(len(self.examples), share * self.ranks.size, self.step, self.config.seed)
        return [self.examples[i] for i in batch[self.ranks.rank * share :][:share]]

    def _roll_out(self, examples: list[Example]) -> Drawn:
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
                self.reference.freeze()  # joins what came over one by one
            return reference_logprobs(self.reference, micro_batches, self.encoder, self.config, passes)

    def _evaluate(self) -> list[Sample]:
        """Score the held-out prompts, with averaged weights if there are any; no prompts = no samples."""
        if not self.heldout.examples:
            return []
        with self.optimizer.averaged():
            return self.heldout.evaluate(self.engine, self.settings.sampling)

    def _save(self, best: list[Sample] | None = None) -> None:
        """Write a checkpoint; of the best evaluation, with its samples."""
        if self.config.rollout_only or self.saved == self.step:
            return
        state = {**self.optimizer.state_dict(), "entropy": self.entropy.state}
        weights = gathered(self.policy.model, self.ranks.main)  # all ranks together
        parts = (self.policy, weights, self.settings, state, self.seconds, self._run_settings())
        limit = self.config.save_total_limit

        def also(folder: Path) -> None:
            if best:
                save_best(best, folder)
            if self.reference and self.moves:
                self.reference.save_pretrained(folder / _REFERENCE)
            if self.optimizer.average:
                with self.optimizer.averaged():
                    self.policy.save_pretrained(folder / "ema", settings=self.settings)

        self.ranks.on_main(lambda: save_checkpoint(self.output, self.step, *parts, limit, self.heldout.best.step, also))
        self.saved = self.step

    def _finish(self, before: list[Sample], after: list[Sample]) -> dict[str, Any]:
        images = self.step * self.config.prompts_per_device * self.config.num_generations * self.ranks.size
        summary = {
            "heldout_reward_before": mean_reward(before),
            "heldout_reward_after": mean_reward(after),
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "images_per_second": images / self.seconds if self.seconds else None,
            "seed": self.config.seed,
            **self.heldout.summary(),
        }
        with whole(self.output / SUMMARY) as part:
            part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        grids, names = {"before": before, "after": after}, self._heldout_names()
        files = ["metrics"] if self.config.rollout_only else ["checkpoint", "metrics"]
        with no_failure("no report.html"):
            shown = {k: v for k, v in grids.items() if v}
            write_report(self.output, self.config, summary, shown, self.alarms.said, names)
            files.append("report.html")
        print(heldout_table(before, after, names))
        if best := summary.get("best_model_checkpoint"):
            print(f'"after" is the best checkpoint by {self.config.metric_for_best_model}: {best}')
        what = f"{', '.join(files[:-1])} and {files[-1]}"
        print(f"{self.step} steps in {self.seconds:.0f} s; {what} are in {self.output}")
        return summary


def train(config: Config) -> dict[str, Any]:
    """Run a training job in this process (one of several under torchrun) -> its summary, empty off the main rank."""
    ranks = Ranks.start(config.ddp_timeout)
    try:
        with ranks.naming_the_lost(), locked(Path(config.output_dir)) if ranks.main else nullcontext():
            return Trainer(config, ranks).run()
    finally:
        ranks.close()
