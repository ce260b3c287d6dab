"""step: whole training steps, ours against the published T2I-R1 algorithm written plainly on transformers.

python -m bicot.bench.bench_step [--device cpu|cuda] [--model Janus-Pro-1B] [--ours-alone] [--output FILE.json]
Both train one policy in turn, with the same optimizer, prompts, seeds, rewards and settings: ours as the trainer does,
the baseline as bench/baseline_t2i_r1.py says (it draws two sequences per picture, also without guidance). First the
gradient norms of both on one rollout must agree. On a CPU: the toy with its own settings, and with the published
guidance and one prompt a micro-batch. On a GPU: random weights at true shapes. There plans run to their limit, pictures
have 576 tokens as published, and the reward is the brightness of a picture. gradient_checkpointing and
micro_batch_tokens are `auto`; the note gives their values on this GPU. Of Janus-Pro-7B only the last layers and the
text head train, so that it fits into 80 GB. On a GPU a step of the baseline is one micro-batch, and the two are
compared by the image. Phases of ours can overlap on a GPU. The peak memory of the baseline is counted without our KV
cache. Under torchrun, the ranks share the steps of ours. `--vary num_generations 4 8` times ours alone, with each value
of a setting.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.metrics import Phases
from ..grpo.step import split
from ..grpo.trainer import short_collections
from ..model.chunk import RolloutChunk, Span
from ..rewards.config import RewardConfig
from .baseline_t2i_r1 import Rollout, baseline_loss, baseline_step, decode, draw, transformers_norms, write_plans
from .harness import Unavailable, command_line, finish, joules, left_out, quantiles, save, start
from .models import SHAPES, TRAINED, ShapeTrainer, published_config, toy_config

PHASES = ("plan", "draw", "decode", "reward", "reference", "train")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the gradient norm
WARM_UP = 4  # tokens of each kind that the baseline draws before it is timed


@dataclass(frozen=True)
class Setting:
    """What both train: a model of `SHAPES` with a run's settings. A step of the baseline has `baseline_prompts`."""

    model: str
    config: Config
    image_tokens: int
    baseline_prompts: int
    varied: tuple[str, int] | None = None

    def vary(self, name: str, value: int) -> Setting:
        if name == "image_tokens":
            return replace(self, image_tokens=value)
        changed: dict[str, Any] = {name: value}
        return replace(self, config=replace(self.config, **changed), varied=(name, value))

    @property
    def images(self) -> dict[str, int]:
        """The number of pictures in a step of each provider."""
        prompts = {"ours": self.config.prompts_per_device, "baseline": self.baseline_prompts}
        return {name: count * self.config.num_generations for name, count in prompts.items()}

    @property
    def labels(self) -> dict[str, Any]:
        c = self.config
        batch = f"{c.gradient_accumulation_steps}x{c.per_device_train_batch_size} prompts of {c.num_generations}"
        labels = {"model": self.model, "batch": batch, "guidance": c.cfg_weight, "plan": c.max_completion_length}
        labels |= {"image tokens": self.image_tokens, "dtype": c.dtype} | dict([self.varied] if self.varied else [])
        return labels | ({"layers trained": TRAINED[self.model]} if self.model in TRAINED else {})


class Contest(ShapeTrainer):
    """A trainer whose own steps are ours. The baseline trains the same policy."""

    def __init__(self, setting: Setting, ranks: Ranks, folder: str) -> None:
        self.baseline_prompts = setting.baseline_prompts
        self.inspect: Callable[[RolloutChunk, Tensor], None] | None = None
        super().__init__(setting.model, setting.image_tokens, replace(setting.config, output_dir=folder), ranks)

    def _roll_out(self, examples: Any) -> Any:
        drawn = super()._roll_out(examples)
        if self.inspect:
            self.inspect(drawn[0], drawn[2].result())
        return drawn

    def ours(self, step: int, phases: Phases) -> float:
        """Take a step -> mean tokens of a plan."""
        self.step = step
        metrics, _ = self._train_step()
        self.grad_norm = metrics["grad_norm"]
        phases.spans += [Span(x, 0.0, metrics[f"seconds/{x}"]) for x in PHASES if f"seconds/{x}" in metrics]
        return metrics["plan_tokens"]

    def baseline(self, step: int, phases: Phases) -> float:
        """Take a step -> mean tokens of a plan."""
        self.step = step
        examples = self._step_examples()[: self.baseline_prompts]
        rewards = [worker.reward for worker in self.ensemble.workers]
        given = (self.policy, self.reference, self.optimizer, self.encoder, rewards, examples, self.config)
        with transformers_norms(self.policy, self.reference):
            parts = baseline_step(*given, step, phases)
        return statistics.mean(len(plan) for part in parts for plan in part.plans)

    def warm_up(self, alone: bool) -> None:
        """Take a step of ours, and draw some tokens and pictures by the baseline. `check` warms up its training."""
        self.ours(0, Phases([], self.ranks.device))
        if alone:
            return
        few = replace(self.config, max_completion_length=min(WARM_UP, self.config.max_completion_length))
        some = self._step_examples()[: few.per_device_train_batch_size]
        each = [self.encoder.plan_ids(e.prompt, few.max_completion_length) for e in some] * few.num_generations
        with transformers_norms(self.policy):
            write_plans(self.policy, each, few)
            draw(self.policy, each, self.encoder, few, WARM_UP)
        tokens = torch.zeros(len(each), self.policy.num_image_tokens, dtype=torch.int64, device=self.policy.device)
        decode(self.policy, tokens)

    def check(self, step: int) -> float:
        """Take a step of ours -> relative difference to the baseline's gradient norm on the same rollout.

        Raises:
            AssertionError: beyond the tolerance, or NaN.
        """
        norms: list[float] = []

        def baseline_norm(rollout: RolloutChunk, scores: Tensor) -> None:
            plain = [Rollout.of(part) for part in split(rollout, self.config)]
            total = sum(part.num_tokens for part in plain)
            for part, scored in zip(plain, scores.split(self.config.micro_batch), strict=True):
                with transformers_norms(self.policy, self.reference):
                    loss = baseline_loss(self.policy, self.reference, part, scored, self.config, num_tokens=total)
                loss.backward()
                self.optimizer.collect()
            grads = [master.grad for master in self.optimizer.masters if master.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            self.optimizer.adamw.zero_grad(set_to_none=True)

        self.inspect = baseline_norm
        self.ours(step, Phases([], self.ranks.device))
        self.inspect = None
        error, limit = abs(norms[0] - self.grad_norm) / self.grad_norm, TOLERANCE[self.policy.dtype]
        said = f"{error:.2g}, beyond {limit}: {self.grad_norm:.6g}, baseline {norms[0]:.6g}"
        assert error <= limit, f"gradient norms differ by {said}"
        return error


def timed(step: Callable[[Phases], float], device: torch.device) -> dict[str, float]:
    """Take a step -> seconds of its phases and of the whole, mean tokens of a plan, peak bytes and joules if known."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    phases, whole, before = Phases([], device), Phases([], device), joules() if on_gpu else None
    with whole("step"):
        plan_tokens = step(phases)
    seconds = phases.seconds
    found = {name: seconds.get(name, 0.0) for name in PHASES}
    found["rest"] = max(0.0, whole.seconds["step"] - sum(found.values()))
    found |= {"seconds": whole.seconds["step"], "plan_tokens": plan_tokens}
    if on_gpu:
        found["peak"] = torch.cuda.max_memory_allocated()
    if before is not None:
        found["joules"] = (joules() or 0.0) - before
    return found


def row(steps: Sequence[dict[str, float]], images: int, held: int) -> dict[str, Any]:
    """Sum up the steps of a provider for the JSON. `held` bytes of the peak belong to the other one."""
    each = {key: [step[key] for step in steps] for key in steps[0]}
    median = {key: statistics.median(values) for key, values in each.items()}
    return {
        "steps": len(steps),
        "images": images,
        "seconds": [round(s, 4) for s in quantiles(each["seconds"])],
        "images_per_s": float(f"{images / median['seconds']:.4g}"),
        "phases": {name: round(median[name], 5) for name in (*PHASES, "rest")},
        "plan_tokens": round(statistics.mean(each["plan_tokens"]), 1),
        "peak_mib": round((max(each["peak"]) - held) / 2**20) if "peak" in each else None,
        "joules_per_image": round(median["joules"] / images, 2) if "joules" in each else None,
    }


def measure(
    setting: Setting, ranks: Ranks, repeats: int, alone: bool, result: dict[str, Any], output: Path | None
) -> None:
    """Time steps of both in turn, or of ours alone; add their rows to the result, and save it after each step."""
    rows = result["rows"]
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(setting, ranks, folder)
        contest.warm_up(alone)
        error = float(f"{contest.check(1) if ranks.size == 1 else 0:.1e}")
        shared = {"case": setting.labels | ({"ranks": ranks.size} if ranks.size > 1 else {}), "error": error}
        images = {name: count * ranks.size for name, count in setting.images.items()}
        part = images["baseline"] < images["ours"]
        pool = contest.engine.pool
        held = {"ours": 0, "baseline": pool.capacity * pool.bytes_per_token}
        memory = contest.memory_settings if ranks.device.type == "cuda" else ""
        note = {
            "ours": memory,
            "baseline": "one micro-batch and an optimizer step; compared by the image" if part else "",
        }
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in (["ours"] if alone else ["ours", "baseline"])}
        with short_collections():
            for step in range(2, 2 + repeats):
                for name, steps in taken.items():
                    steps.append(timed(partial(getattr(contest, name), step), ranks.device))
                    result["rows"] = rows + [
                        shared | {"provider": k, "note": note[k]} | row(each, images[k], held[k])
                        for k, each in taken.items()
                        if each
                    ]
                    save(result, output)  # now, in case this process is ended before its last step


def settings(device: str, tiny: bool, model: str | None = None, image_tokens: int | None = None) -> list[Setting]:
    """The settings of the bench: the toy twice on a CPU, the true shapes on a GPU, or the model that is asked for."""
    toy = toy_config(rewards=RewardConfig(["scene"]), eval_file=None, sample_steps=0)
    published = replace(toy, cfg_weight=5.0, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    real = published_config()
    if tiny:
        few: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2}
        published, real = replace(published, **few), replace(real, dtype="float32", **few)
    names = ["toy", "tiny"] if tiny else ["toy"] if device == "cpu" else ["Janus-Pro-1B", "Janus-Pro-7B"]
    found = []
    for name in [model] if model else names:
        for config in ([published] if tiny else [toy, published]) if name == "toy" else [real]:
            tokens = 64 if name == "toy" else image_tokens or (16 if name == "tiny" else 576)
            prompts = config.prompts_per_device if name == "toy" else config.per_device_train_batch_size
            found.append(Setting(name, config, tokens, prompts))
    return found


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, help="timed steps of each (7 on a CPU, 3 on a GPU)")
    parser.add_argument("--model", choices=[*SHAPES], help="random weights, except for the toy")
    parser.add_argument("--ours-alone", action="store_true", help="the baseline is checked against, but not timed")
    parser.add_argument("--vary", nargs="+", metavar="SETTING VALUE", help="time ours with these values of a setting")
    arguments, result = start(parser, __doc__)
    device, tiny, vary = arguments.device, arguments.tiny, arguments.vary or []
    chosen = settings(device, tiny, arguments.model)
    try:
        chosen = [chosen[0].vary(vary[0], int(value)) for value in vary[1:]] or chosen
    except (TypeError, ValueError) as error:
        parser.error(f"--vary {' '.join(vary)}: {error}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    repeats = arguments.repeats or (2 if tiny else 3 if device == "cuda" else 7)
    ranks = Ranks.start() if "WORLD_SIZE" in os.environ else Ranks(0, 1, torch.device(device))
    alone, output = arguments.ours_alone or bool(vary) or ranks.size > 1, arguments.output if ranks.main else None
    result |= {"rows": [], "skipped": [], "failed": []}
    try:
        for setting in chosen:
            rows = result["rows"]
            try:
                measure(setting, ranks, repeats, alone, result, output)
                if alone:
                    left_out(result, "skipped", setting.labels, "baseline", "checked against, but not timed, as asked")
            except Exception as problem:  # the exit status will be 1, unless there was no room
                kind = "skipped" if isinstance(problem, (Unavailable, torch.OutOfMemoryError)) else "failed"
                left_out(result, kind, setting.labels, "both" if result["rows"] == rows else "baseline", problem)
    finally:
        ranks.close()
    return finish(result, output) if ranks.main else 0


if __name__ == "__main__":
    raise SystemExit(main())
