"""step: whole training steps, ours against the published T2I-R1 algorithm written plainly on transformers.

python -m bicot.bench.bench_step [--device cpu|cuda] [--model Janus-Pro-1B] [--ours-alone] [--output FILE.json]
Both train one policy in turn, with the same optimizer, prompts, seeds, rewards and settings: ours through the parts
that the trainer uses, the baseline as bench/baseline_t2i_r1.py says (two rows a picture, also without guidance). First
the gradient norm of both on one rollout must agree. On a CPU: the toy with its own settings, and with the published
guidance and one prompt a micro-batch. On a GPU: random weights at true shapes; plans run to their limit, pictures have
576 tokens as published, their brightness is the reward, activations are recomputed, and of Janus-Pro-7B only the last
layers and the text head train, so that it fits 80 GB. There a step of the baseline is one micro-batch, and the two are
compared by the image. Phases of ours can overlap on a GPU; the baseline's peak is without what ours keeps between steps
(KV cache, graphs). Each step is written when it has been measured.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE
from transformers.utils import logging

from ..grpo.config import Config
from ..grpo.data import load_examples, step_indices
from ..grpo.distributed import Ranks
from ..grpo.optim import MasterAdamW
from ..grpo.rollout import roll_out
from ..grpo.step import reference_logprobs, split, update
from ..grpo.trainer import rollout_settings
from ..kernels.group_advantages import group_advantages
from ..model.engine import RolloutChunk, RolloutEngine
from ..model.policy import Policy
from ..rewards.base import Example
from ..rewards.config import RewardConfig
from .baseline_t2i_r1 import Phases, Rollout, baseline_loss, baseline_step, decode, write_plans
from .baseline_t2i_r1 import draw as draw_pictures
from .harness import Unavailable, finish, hardware, label, quantiles, save, short_collections
from .models import SHAPES, TOKENIZER, policy_of, toy_config
from .power import Sampler
from .step_profile import stacked

COMMAND = "python -m bicot.bench.bench_step"
PHASES = ("plan", "draw", "decode", "reward", "reference", "train")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the gradient norm
TRAINED = {"Janus-Pro-7B": 2}  # last layers that train, where not all do
WARM_UP = 4  # tokens of each kind that the baseline draws before it is timed
Inspect = Callable[[list[RolloutChunk], Tensor], None]
PROMPTS = [f"a photo of a w{i} beside a w{i + 1} and, above both of them, a w{i + 2}" for i in range(64)]


class Words:
    """Stands in for the tokenizer of a random model: every word is a token, and every token a word."""

    bos_token_id, eos_token_id = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    pad_token_id, boi_token_id = TOKENIZER.pad_token_id, TOKENIZER.boi_token_id
    special, unk_token_id = 4, None
    all_special_tokens: Sequence[str] = ()

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id] * add_special_tokens + [*map(self._id, text.split())]}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self.vocab)}

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(f"t{i}" for i in ids if i >= self.special)

    def _id(self, word: str) -> int:
        if re.fullmatch(r"t\d+", word):
            return int(word[1:])
        return self.special + zlib.crc32(word.encode()) % (self.vocab - self.special)


def brightness(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """A reward that costs next to nothing: the mean of the pixels."""
    return images.mean((1, 2, 3))


@dataclass(frozen=True)
class Setting:
    """What both train: a model of `SHAPES`, with pictures of so many tokens, and a run's settings.

    A step of the baseline has `baseline_prompts` prompts.
    """

    model: str
    config: Config
    image_tokens: int
    baseline_prompts: int

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
        return labels | ({"layers trained": TRAINED[self.model]} if self.model in TRAINED else {})

    def policy(self, device: str) -> Policy:
        """Its trainable parameters are those of the settings."""
        policy = policy_of(self.model, getattr(torch, self.config.dtype), device, self.image_tokens)
        policy_of.cache_clear()  # it will be trained
        if self.model == "toy":
            return policy
        shape, freeze = SHAPES[self.model], list(self.config.freeze)
        if self.model in TRAINED:
            first = shape.layers - TRAINED[self.model]
            freeze += [
                f"model.language_model.{part}." for part in ("embed_tokens", *(f"layers.{i}" for i in range(first)))
            ]
        if self.model != "tiny":  # whose pictures are of its own size
            vq = policy.config.vq_config = JanusVQVAEConfig(num_patches=math.isqrt(self.image_tokens))
            with torch.device(device):
                pictures: Any = JanusVQVAE(vq)
            policy.model.model.vqmodel = pictures.to(policy.dtype).eval()
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(freeze)))
        return Policy(policy.model, Words(shape.vocab))


class Contest:
    """The policy, which both train in turn, and what they need for it."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.baseline_prompts = setting.baseline_prompts
        self.config = config = setting.config
        self.policy = setting.policy(device)
        self.reference = Policy(copy.deepcopy(self.policy.model), self.policy.tokenizer).freeze()
        if config.gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ranks = Ranks(0, 1, self.policy.device)
        self.optimizer = MasterAdamW(self.policy.trainable_parameters(), config)
        settings = rollout_settings(config)
        self.encoder, self.sampling = self.policy.prompt_encoder(settings.prompts), settings.sampling
        self.ensemble = config.rewards.build(device=device)
        own = setting.model == "toy"
        drawn = [Example(prompt, "object") for prompt in PROMPTS]
        self.examples = load_examples(config.train_file, config.skip_bad_prompts) if own else drawn
        self.engine: RolloutEngine | None = None

    def batch(self, step: int) -> list[Example]:
        indices = step_indices(len(self.examples), self.config.prompts_per_device, step, self.config.seed)
        return [self.examples[i] for i in indices]

    def warm_up(self, alone: bool = False) -> None:
        """What is made once: a step of ours, and the baseline's few tokens and pictures; `check` has its training."""
        self.ours(0, Phases(self.ranks.device))
        if alone:
            return
        few = replace(self.config, max_completion_length=min(WARM_UP, self.config.max_completion_length))
        prompts = [self.encoder.plan_ids(e.prompt, few.max_completion_length) for e in self.batch(0)]
        each = prompts[: few.per_device_train_batch_size] * few.num_generations
        write_plans(self.policy, each, few)
        draw_pictures(self.policy, each, self.encoder, few, WARM_UP)
        tokens = torch.zeros(len(each), self.policy.num_image_tokens, dtype=torch.int64, device=self.policy.device)
        decode(self.policy, tokens)

    def held(self) -> int:
        """Bytes on a GPU that ours keeps between steps: all but models, masters and moments."""
        states = [tensor for state in self.optimizer.adamw.state.values() for tensor in state.values()]
        models = [tensor for policy in (self.policy, self.reference) for tensor in policy.model.state_dict().values()]
        shared = {tensor.data_ptr(): tensor.nbytes for tensor in [*models, *self.optimizer.masters, *states]}
        return max(0, torch.cuda.memory_allocated() - sum(shared.values())) if self.policy.device.type == "cuda" else 0

    def baseline(self, step: int, phases: Phases) -> float:
        """A step -> mean tokens of a plan."""
        rewards = [worker.reward for worker in self.ensemble.workers]
        examples = self.batch(step)[: self.baseline_prompts]
        given = (self.policy, self.reference, self.optimizer, self.encoder, rewards, examples, self.config)
        parts = baseline_step(*given, step, phases)
        return statistics.mean(len(plan) for part in parts for plan in part.plans)

    def ours(self, step: int, phases: Phases, inspect: Inspect | None = None) -> float:
        """A step as the trainer takes it -> mean tokens of a plan. `inspect` sees micro-batches and scores."""
        config = self.config
        self.engine = self.engine or RolloutEngine(self.policy, self.encoder, max_rows=config.rollout_max_rows)
        given = (self.batch(step), config.num_generations, self.sampling, step)
        rollout, _, handle = roll_out(self.engine, self.ensemble, *given)
        phases.seconds.update(rollout.seconds)
        parts = split(rollout, config)
        with phases("reference"):
            reference = reference_logprobs(self.reference, parts, self.encoder, config) if config.kl_streams else None
        with phases("reward"):
            scores = handle.result()
        if inspect:
            inspect(parts, scores)
        with phases("train"):
            advantages = group_advantages(scores, config.num_generations, self.ensemble.weights).to(self.ranks.device)
            trained = (self.policy, self.optimizer, parts, advantages, reference)
            self.grad_norm = update(*trained, self.encoder, config, self.ranks)["grad_norm"]
        return rollout.plans.lengths.double().mean().item()

    def check(self, step: int) -> float:
        """A step of ours -> how far the baseline's gradient norm on its rollout is from ours, relatively.

        Raises:
            AssertionError: beyond the tolerance, or NaN.
        """
        norms = []

        def baseline_norm(parts: list[RolloutChunk], scores: Tensor) -> None:
            plain = [Rollout.of(part) for part in parts]
            total = sum(part.num_tokens for part in plain)
            for part, scored in zip(plain, scores.split(self.config.micro_batch), strict=True):
                baseline_loss(self.policy, self.reference, part, scored, self.config, num_tokens=total).backward()
                self.optimizer.collect()
            grads = [master.grad for master in self.optimizer.masters if master.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads))
            self.optimizer.adamw.zero_grad(set_to_none=True)

        self.ours(step, Phases(self.ranks.device), baseline_norm)
        theirs, ours = norms[0].item(), self.grad_norm.item()
        error, limit = abs(theirs - ours) / ours, TOLERANCE[self.policy.dtype]
        assert error <= limit, (
            f"gradient norms differ by {error:.2g}, beyond {limit}: {ours:.6g}, baseline {theirs:.6g}"
        )
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
        with Sampler(device) as sampler, whole("step"):
            self.plan_tokens.append(step(phases))
        self.seconds.append(whole.seconds["step"])
        for name in PHASES:
            self.phases[name].append(phases.seconds.get(name, 0.0))
        self.phases["rest"].append(max(0.0, self.seconds[-1] - sum(phases.seconds.values())))
        if on_gpu:
            self.peaks.append(torch.cuda.max_memory_allocated())
        if not sampler.missing:
            self.joules.append(sampler.joules)

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


def measure(setting: Setting, device: str, repeats: int, until: float, alone: bool, write: Callable[..., None]) -> None:
    """Time steps of both in turn, or of ours alone, and give `write` the error of the check and all rows after each.

    No round begins that would end after the time `until`, were it as long as those before it.
    """
    contest = Contest(setting, device)
    where, images = contest.ranks.device, setting.images
    contest.warm_up(alone)
    error = contest.check(1)
    held, steps = contest.held(), {"ours": Steps()} | ({} if alone else {"baseline": Steps()})
    part = images["baseline"] < images["ours"]
    note = {"baseline": "one micro-batch and an optimizer step; compared by the image"} if part else {}
    begin = time.perf_counter()
    with short_collections():
        for step in range(2, 2 + repeats):
            for name, taken in steps.items():
                taken.take(partial(getattr(contest, name), step), where)
                write(
                    error,
                    [
                        {"case": setting.labels, "provider": provider}
                        | each.row(images[provider], held if provider == "baseline" else 0)
                        | {"note": note.get(provider, "")}
                        for provider, each in steps.items()
                        if each.seconds
                    ],
                )
            now = time.perf_counter()
            if now + (now - begin) / (step - 1) > until:
                break


def settings(
    device: str, tiny: bool, model: str | None = None, image_tokens: int | None = None, images: int | None = None
) -> list[Setting]:
    """The toy twice on a CPU, the true shapes on a GPU; or what is asked for.

    Raises:
        ValueError: a step of so many images has no whole micro-batches.
    """
    toy = toy_config(rewards=RewardConfig(["scene"]))
    published = replace(toy, cfg_weight=5.0, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    real = Config(
        gradient_checkpointing=True,
        max_completion_length=80,
        rewards=RewardConfig(["bicot.bench.bench_step:brightness"]),
    )
    if tiny:
        few: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2}
        published, real = replace(published, **few), replace(real, dtype="float32", **few)
    names = ["toy", "tiny"] if tiny else ["toy"] if device == "cpu" else ["Janus-Pro-1B", "Janus-Pro-7B"]
    found = []
    for name in [model] if model else names:
        for config in ([published] if tiny else [toy, published]) if name == "toy" else [real]:
            if images:
                count, rest = divmod(images, config.micro_batch)
                if rest or not count:
                    raise ValueError(f"{images} images are no multiple of {config.micro_batch}, a micro-batch")
                config = replace(config, gradient_accumulation_steps=count)
            tokens = 64 if name == "toy" else image_tokens or (16 if name == "tiny" else 576)
            prompts = config.prompts_per_device if name == "toy" else config.per_device_train_batch_size
            found.append(Setting(name, config, tokens, prompts))
    return found


def section(result: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    from .report import machine, number, table

    header = ["case", "provider", "steps × images", "seconds a step", "images/s", "peak MiB", "J/image", "plan tokens"]
    rows = []
    for entry in result["ratios"]:
        for row in (row for row in result["rows"] if row["case"] == entry["case"]):
            p20, p50, p80 = map(number, row["seconds"])
            ours, times = row["provider"] == "ours", entry["times"].get("step")
            rows.append(
                [
                    label(row["case"]) if ours else "",
                    row["provider"],
                    f"{row.get('steps') or result['repeats']} × {row['images']}",
                    f"{p50} [{p20} to {p80}]",
                    number(row["images_per_s"]),
                    "" if row["peak_mib"] is None else str(row["peak_mib"]),
                    "" if row["joules_per_image"] is None else number(row["joules_per_image"]),
                    f"{row['plan_tokens']:.1f}",
                    "" if ours else f"{number(times)}×",
                ]
            )
    header.append("ours is")
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return f"""## step on {result.get("gpu", "the CPU")}

`{result["command"]}` on {machine(result)}.
{result["about"]} Medians [p20 to p80] of steps taken in turn.

{table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])}

Milliseconds an image of each phase, ours / the baseline's, and how many times longer that is:

{phase_table(result)}
{remarks(result)}"""


def phases_of_an_image(row: dict[str, Any]) -> dict[str, float]:
    """In seconds."""
    return {name: seconds / row["images"] for name, seconds in row["phases"].items()}


def draw(result: dict[str, Any], path: Path) -> None:
    """The phases of both, a case below the other."""
    bars = {f"{label(row['case'])}: {row['provider']}": phases_of_an_image(row) for row in result["rows"]}
    if bars:
        stacked(bars, "seconds an image", path)


def phase_table(result: dict[str, Any]) -> str:
    """Cases down, phases across; `rest` is what no phase covers."""
    from .report import number, table

    rows = []
    for entry in result["ratios"]:
        each = [phases_of_an_image(row) for row in result["rows"] if row["case"] == entry["case"]]
        cells = []
        for name in (*PHASES, "rest"):
            ratio = entry["times"].get(name)
            pair = " / ".join(number(1e3 * phases[name]) for phases in each)
            cells.append(f"{pair} ({number(ratio)}×)" if ratio else pair)
        rows.append([label(entry["case"]), *cells])
    return table(["case", *PHASES, "rest"], rows)


def remarks(result: dict[str, Any]) -> str:
    """Notes, and what was not measured, a line each."""
    lines = list(dict.fromkeys(f"{row['provider']}: {row['note']}" for row in result["rows"] if row.get("note")))
    for kind in ("skipped", "failed"):
        lines += [f"{label(e['case'])}, {e['provider']}: {kind}: {e['reason']}" for e in result[kind]]
    return "".join(f"\n- {line}" for line in [*lines, *result["missing"]]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, help="timed steps of each (7 on a CPU, 3 on a GPU)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further step that would outlast them")
    parser.add_argument("--model", choices=[*SHAPES], help="random weights, unless it is the toy")
    parser.add_argument("--images", type=int, help="of a step of ours, in whole micro-batches")
    parser.add_argument("--image-tokens", type=int, help="of a picture, a square; of the toy's always 64")
    parser.add_argument("--ours-alone", action="store_true", help="the baseline is checked against, but not timed")
    parser.add_argument("--tiny", action="store_true", help="two small cases: walks the code, measures nothing")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    begin, arguments = time.perf_counter(), parser.parse_args()
    device, tiny, alone = arguments.device, arguments.tiny, arguments.ours_alone
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if (tokens := arguments.image_tokens) and math.isqrt(tokens) ** 2 != tokens:
        parser.error("--image-tokens: pictures are square")
    try:
        chosen = settings(device, tiny, arguments.model, tokens, arguments.images)
    except ValueError as error:
        parser.error(f"--images: {error}")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    repeats = arguments.repeats or (2 if tiny else 3 if device == "cuda" else 7)
    what, _, _, *how = (__doc__ or "").strip().splitlines()
    what = what.removeprefix("step: ")
    given = {"model": arguments.model, "images": arguments.images, "image-tokens": tokens}
    options = [f"--{name} {value}" for name, value in given.items() if value] + ["--ours-alone"] * alone
    result: dict[str, Any] = {
        "bench": "step",
        "about": " ".join([what[0].upper() + what[1:], *how]),
        "command": " ".join([f"{COMMAND} --device {device}", *options]),
        **hardware(device),
        "device": device,
        "missing": [missing] if device == "cuda" and (missing := Sampler(torch.device(device)).missing) else [],
        "rows": [],
        "ratios": [],
        "skipped": [],
        "failed": [],
    }
    for setting in chosen:
        case, before, rated = setting.labels, result["rows"], result["ratios"]

        def write(
            error: float, rows: list[dict[str, Any]], case: Any = case, before: Any = before, rated: Any = rated
        ) -> None:
            times = ratios(*rows) if len(rows) == 2 else {}
            result["rows"] = before + rows
            result["ratios"] = [*rated, {"case": case, "times": times, "error": float(f"{error:.1e}")}]
            save(result, arguments.output)  # what is measured stays should a later step outlast its time limit

        try:
            measure(setting, device, repeats, begin + arguments.seconds, alone, write)
            if alone:
                reason = "only checked against, as was asked for"
                result["skipped"].append({"case": case, "provider": "baseline", "reason": reason})
        except Exception as problem:  # recorded, and the bench ends non-zero unless there was no room
            kind = "skipped" if isinstance(problem, (Unavailable, torch.OutOfMemoryError)) else "failed"
            reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
            provider = "both" if result["rows"] == before else "baseline"
            result[kind].append({"case": case, "provider": provider, "reason": reason})
    print(section(result))
    finish(result, arguments.output)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
