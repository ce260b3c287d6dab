"""step: whole training steps, ours against the published T2I-R1 algorithm written plainly on transformers.

python -m bicot.bench.bench_step [--device cpu|cuda] [--model Janus-Pro-1B] [--ours-alone] [--output FILE.json]
Both train one policy in turn, with the same optimizer, prompts, seeds, rewards and settings: ours as the trainer does,
the baseline as bench/baseline_t2i_r1.py says (two rows a picture, also without guidance). First the gradient norm of
both on one rollout must agree. On a CPU: the toy with its own settings, and with the published guidance and one prompt
a micro-batch. On a GPU: random weights at true shapes; plans run to their limit, pictures have 576 tokens as published,
their brightness is the reward, activations are recomputed, and of Janus-Pro-7B only the last layers and the text head
train, so that it fits 80 GB. There a step of the baseline is one micro-batch, and the two are compared by the image.
Phases of ours can overlap on a GPU; the baseline's peak is without our KV cache. Each step is written when it has been
measured. With --vary steps of ours grow along one axis, always with the same prompts and seeds, and
seconds ~ value^exponent; under torchrun, steps of ours are shared among the ranks.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..grpo.config import Config
from ..grpo.distributed import Ranks
from ..grpo.profile import short_collections
from ..grpo.step import split
from ..model.chunk import RolloutChunk
from ..rewards.config import RewardConfig
from .baseline_t2i_r1 import Phases, Rollout, baseline_loss, baseline_step, decode, draw, write_plans
from .harness import Unavailable, command_line, finish, quantiles, save, start
from .models import SHAPES, TRAINED, ShapeTrainer, published_config, toy_config
from .power import Energy

PHASES = ("plan", "draw", "decode", "reward", "reference", "train")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the gradient norm
WARM_UP = 4  # tokens of each kind that the baseline draws before it is timed
AXES = ("num_generations", "gradient_accumulation_steps", "rollout_max_rows", "image_tokens")


@dataclass(frozen=True)
class Setting:
    """What both train: a model of `SHAPES`, with pictures of so many tokens, and a run's settings.

    A step of the baseline has `baseline_prompts` prompts. `more` labels: what varies.
    """

    model: str
    config: Config
    image_tokens: int
    baseline_prompts: int
    more: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, int]:
        """Of a step of each provider."""
        prompts = {"ours": self.config.prompts_per_device, "baseline": self.baseline_prompts}
        return {name: count * self.config.num_generations for name, count in prompts.items()}

    @property
    def labels(self) -> dict[str, Any]:
        c = self.config
        batch = f"{c.gradient_accumulation_steps}x{c.per_device_train_batch_size} prompts of {c.num_generations}"
        labels = {"model": self.model, "batch": batch, "guidance": c.cfg_weight, "plan": c.max_completion_length}
        labels |= {"image tokens": self.image_tokens, "dtype": c.dtype}
        return labels | ({"layers trained": TRAINED[self.model]} if self.model in TRAINED else {}) | self.more

    def varied(self, axis: str, value: int) -> Setting:
        if axis == "image_tokens":
            return replace(self, image_tokens=value)
        change: dict[str, Any] = {axis: value}
        more = {"rows": value} if axis == "rollout_max_rows" else {}
        return replace(self, config=replace(self.config, **change), more=more)


class Contest(ShapeTrainer):
    """A trainer, whose steps are ours; the baseline trains its policy too."""

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
        """A step -> mean tokens of a plan."""
        self.step = step
        metrics, _ = self._train_step()
        self.grad_norm = metrics["grad_norm"]
        phases.seconds.update({name: metrics[f"seconds/{name}"] for name in PHASES if f"seconds/{name}" in metrics})
        return metrics["plan_tokens"]

    def baseline(self, step: int, phases: Phases) -> float:
        """A step -> mean tokens of a plan."""
        self.step = step
        examples = self._step_examples()[: self.baseline_prompts]
        rewards = [worker.reward for worker in self.ensemble.workers]
        given = (self.policy, self.reference, self.optimizer, self.encoder, rewards, examples, self.config)
        parts = baseline_step(*given, step, phases)
        return statistics.mean(len(plan) for part in parts for plan in part.plans)

    def warm_up(self, alone: bool) -> None:
        """What is made once: a step of ours, and the baseline's few tokens and pictures; `check` has its training."""
        self.ours(0, Phases(self.ranks.device))
        if alone:
            return
        few = replace(self.config, max_completion_length=min(WARM_UP, self.config.max_completion_length))
        some = self._step_examples()[: few.per_device_train_batch_size]
        each = [self.encoder.plan_ids(e.prompt, few.max_completion_length) for e in some] * few.num_generations
        write_plans(self.policy, each, few)
        draw(self.policy, each, self.encoder, few, WARM_UP)
        tokens = torch.zeros(len(each), self.policy.num_image_tokens, dtype=torch.int64, device=self.policy.device)
        decode(self.policy, tokens)

    def check(self, step: int) -> float:
        """A step of ours -> how far the baseline's gradient norm on its rollout is from ours, relatively.

        Raises:
            AssertionError: beyond the tolerance, or NaN.
        """
        norms: list[float] = []

        def baseline_norm(rollout: RolloutChunk, scores: Tensor) -> None:
            plain = [Rollout.of(part) for part in split(rollout, self.config)]
            total = sum(part.num_tokens for part in plain)
            for part, scored in zip(plain, scores.split(self.config.micro_batch), strict=True):
                baseline_loss(self.policy, self.reference, part, scored, self.config, num_tokens=total).backward()
                self.optimizer.collect()
            grads = [master.grad for master in self.optimizer.masters if master.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            self.optimizer.adamw.zero_grad(set_to_none=True)

        self.inspect = baseline_norm
        self.ours(step, Phases(self.ranks.device))
        self.inspect = None
        error, limit = abs(norms[0] - self.grad_norm) / self.grad_norm, TOLERANCE[self.policy.dtype]
        said = f"{error:.2g}, beyond {limit}: {self.grad_norm:.6g}, baseline {norms[0]:.6g}"
        assert error <= limit, f"gradient norms differ by {said}"
        return error


@dataclass
class Steps:
    """What the steps of one provider took."""

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    plan_tokens: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def take(self, step: Callable[[Phases], float], device: torch.device) -> None:
        """One more."""
        if on_gpu := device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        phases, whole = Phases(device), Phases(device)
        with Energy(device) as energy, whole("step"):
            self.plan_tokens.append(step(phases))
        self.seconds.append(whole.seconds["step"])
        for name in PHASES:
            self.phases[name].append(phases.seconds.get(name, 0.0))
        self.phases["rest"].append(max(0.0, self.seconds[-1] - sum(phases.seconds.values())))
        if on_gpu:
            self.peaks.append(torch.cuda.max_memory_allocated())
        if not energy.missing:
            self.joules.append(energy.joules)

    def row(self, images: int, held: int) -> dict[str, Any]:
        """Of the JSON; `held` bytes of the peak are somebody else's."""
        median = statistics.median(self.seconds)
        return {
            "steps": len(self.seconds),
            "seconds": [round(s, 4) for s in quantiles(self.seconds)],
            "images_per_s": float(f"{images / median:.4g}"),
            "phases": {name: round(statistics.median(values), 5) for name, values in self.phases.items()},
            "plan_tokens": round(statistics.mean(self.plan_tokens), 1),
            "peak_mib": round((max(self.peaks) - held) / 2**20) if self.peaks else None,
            "joules_per_image": float(f"{statistics.median(self.joules) / images:.4g}") if self.joules else None,
            "images": images,
        }


def ratios(ours: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float | None]:
    """How many times longer the baseline takes for an image: the step, and each of its phases (None: ours takes 0)."""
    pairs = {name: (seconds, ours["phases"][name]) for name, seconds in baseline["phases"].items() if name != "rest"}
    pairs = {"step": (baseline["seconds"][1], ours["seconds"][1]), **pairs}
    more = ours["images"] / baseline["images"]
    return {name: float(f"{more * theirs / own:.3g}") if own else None for name, (theirs, own) in pairs.items()}


def measure(
    setting: Setting, ranks: Ranks, repeats: int, until: float, alone: bool, write: Callable[[float, Any], None]
) -> None:
    """Time steps of both in turn, or of ours alone, and give `write` the error of the check and all rows after each.

    No round begins that would end after the time `until`, were it as long as those before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(setting, ranks, folder)
        contest.warm_up(alone)
        error = contest.check(1) if ranks.size == 1 else 0.0
        images = {name: count * ranks.size for name, count in setting.images.items()}
        steps = {"ours": Steps()} | ({} if alone else {"baseline": Steps()})
        pool = contest.engine.pool
        held = {"ours": 0, "baseline": pool.capacity * pool.bytes_per_token}
        part = images["baseline"] < images["ours"]
        note = {"ours": "", "baseline": "one micro-batch and an optimizer step; compared by the image" if part else ""}
        labels = setting.labels | ({"ranks": ranks.size} if ranks.size > 1 else {})
        begin = time.perf_counter()
        with short_collections():
            for step in range(2, 2 + repeats):
                for name, taken in steps.items():
                    taken.take(partial(getattr(contest, name), step), ranks.device)
                    rows = [
                        {"case": labels, "provider": k, **each.row(images[k], held[k]), "note": note[k]}
                        for k, each in steps.items()
                        if each.seconds
                    ]
                    write(error, rows)
                now = time.perf_counter()
                if now + (now - begin) / (step - 1) > until:
                    break


def settings(device: str, tiny: bool, model: str | None = None, image_tokens: int | None = None) -> list[Setting]:
    """The toy twice on a CPU, the true shapes on a GPU; or what is asked for."""
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further step that would outlast them")
    parser.add_argument("--model", choices=[*SHAPES], help="random weights, unless it is the toy")
    parser.add_argument("--ours-alone", action="store_true", help="the baseline is checked against, but not timed")
    parser.add_argument("--vary", nargs="+", metavar="AXIS VALUE", help=f"ours alone, along one of {', '.join(AXES)}")
    begin = time.perf_counter()
    arguments, result = start(parser, __doc__, "bench_step")
    device, tiny, vary = arguments.device, arguments.tiny, arguments.vary or []
    chosen = settings(device, tiny, arguments.model)
    if vary and (vary[0] not in AXES or not all(value.isdecimal() for value in vary[1:])):
        parser.error(f"--vary {' '.join(vary)}: give one of {', '.join(AXES)} and numbers")
    chosen = [chosen[0].varied(vary[0], int(value)) for value in vary[1:]] if vary else chosen
    if any(math.isqrt(setting.image_tokens) ** 2 != setting.image_tokens for setting in chosen):
        parser.error("image tokens: pictures are square")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    repeats = arguments.repeats or (2 if tiny else 3 if device == "cuda" else 7)
    ranks = Ranks.start() if "WORLD_SIZE" in os.environ else Ranks(0, 1, torch.device(device))
    alone, output = bool(arguments.ours_alone or vary or ranks.size > 1), arguments.output if ranks.main else None
    missing = Energy(ranks.device).missing if device == "cuda" else ""
    result |= {"missing": [missing] if missing else [], "rows": [], "ratios": [], "skipped": [], "failed": []}
    try:
        for setting in chosen:
            one_setting(setting, ranks, repeats, begin + arguments.seconds, alone, result, output)
    finally:
        ranks.close()
    if vary and len(result["rows"]) > 1:
        seconds = [row["seconds"][1] for row in result["rows"]]
        logs = [[math.log(float(x)) for x in column] for column in (vary[1 : 1 + len(seconds)], seconds)]
        result["exponent"] = {vary[0]: round(statistics.linear_regression(*logs).slope, 2)}
    return finish(result, output) if ranks.main else 0


def one_setting(
    setting: Setting,
    ranks: Ranks,
    repeats: int,
    until: float,
    alone: bool,
    result: dict[str, Any],
    output: Path | None,
) -> None:
    """Add its rows and their ratio to the result, or why there are none."""
    case, before, rated = setting.labels, result["rows"], result["ratios"]

    def write(error: float, rows: list[dict[str, Any]]) -> None:
        times = ratios(*rows) if len(rows) == 2 else {}
        result["rows"] = before + rows
        result["ratios"] = [*rated, {"case": rows[0]["case"], "times": times, "error": float(f"{error:.1e}")}]
        save(result, output)  # what is measured stays should a later step outlast its time limit

    try:
        measure(setting, ranks, repeats, until, alone, write)
        if alone:
            reason = "only checked against, as was asked for"
            result["skipped"].append({"case": case, "provider": "baseline", "reason": reason})
    except Exception as problem:  # recorded, and the bench ends non-zero unless there was no room
        kind = "skipped" if isinstance(problem, (Unavailable, torch.OutOfMemoryError)) else "failed"
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
        provider = "both" if result["rows"] == before else "baseline"
        result[kind].append({"case": case, "provider": provider, "reason": reason})


if __name__ == "__main__":
    raise SystemExit(main())
