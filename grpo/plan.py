"""The memory plan of a run: what each phase holds on one GPU, and what to change where it does not fit.

It needs no GPU and no weights: the model is built without storage from its config.json. Plans of full length
(`max_completion_length`) are assumed, and prompts of `PLAN_PROMPT` and `IMAGE_PROMPT` tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, JanusForConditionalGeneration

from ..kernels.kv_pool import FP8
from ..model.decoder import PREFILL_TOKENS
from ..model.kv import SHARE_OF_FREE, KVPool
from ..model.policy import read_config
from ..model.vq import CHUNK_BYTES as PICTURE_BYTES
from .config import Config
from .distributed import Ranks
from .memory import Batch, Shape, Training, kv_tokens, reference_bytes, update_peak
from .zero import read_settings

GIB = 2**30
PLAN_PROMPT, IMAGE_PROMPT = 200, 80  # tokens, the second without the plan
SHORT_PLAN = 80  # tokens, what Janus-Pro writes
ROOM = 0.1  # of a GPU that "auto" leaves: a plan is no measurement, and memory is fragmented
CONTEXT = GIB  # CUDA's context and libraries
# parameters as published, and GiB of activations a picture of a micro-batch
REWARDS = {"hps": (986e6, 0.0), "git": (395e6, 0.0), "grounding": (172e6, 1.0), "orm": (8030e6, 0.0)}
COUNTED = {"scene", "scene_relation", *REWARDS}


@dataclass(frozen=True)
class Plan:
    """Bytes by row of the table: (rollout, reference, update)."""

    rows: dict[str, tuple[int, int, int]]
    uncounted: tuple[str, ...]

    @property
    def peaks(self) -> dict[str, int]:
        return dict(
            zip(("rollout", "reference", "update"), map(sum, zip(*self.rows.values(), strict=True)), strict=True)
        )

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def line(self) -> str:
        phase = max(self.peaks, key=lambda name: self.peaks[name])
        return f"memory: peak {self.peak / GIB:.1f} GiB a GPU, in the {phase} phase, by the plan"

    def table(self) -> str:
        lines = [f"{'GiB a GPU':<26}{'rollout':>10}{'reference':>11}{'update':>9}"]
        for name, values in {**self.rows, "all": tuple(self.peaks.values())}.items():
            lines.append(f"{name:<26}{values[0] / GIB:>10.1f}{values[1] / GIB:>11.1f}{values[2] / GIB:>9.1f}")
        if self.uncounted:
            lines.append(f"not counted: rewards {', '.join(self.uncounted)}")
        return "\n".join(lines)


def load_model(path: str) -> Any:
    """A Janus of that config.json on the meta device.

    Raises:
        FileNotFoundError: neither a folder with a config.json nor a model that the hub gives.
        ValueError: another architecture.
    """
    if (kind := read_config(path).get("model_type")) != "janus":
        raise ValueError(f"the plan reads a config.json of model_type 'janus', {path} is {kind!r}")
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


def settled(config: Config, model: Any, ranks: int, gpu_bytes: int) -> Config:
    """`gradient_checkpointing: auto` becomes the first that leaves `ROOM` of GPUs of so many bytes, or else all."""
    if config.gradient_checkpointing != "auto":
        return config
    choices = [replace(config, gradient_checkpointing=how) for how in (False, "selective", True)]
    fits = (c for c in choices if plan_of(c, model, ranks, gpu_bytes).peak <= (1 - ROOM) * gpu_bytes)
    return next(fits, choices[-1])


def settle(config: Config, ranks: Ranks) -> Config:
    """The same on all ranks, for the smallest of their GPUs; without GPUs nothing is recomputed."""
    if config.gradient_checkpointing != "auto":
        return config
    if ranks.device.type != "cuda":
        return replace(config, gradient_checkpointing=False)
    sizes = torch.tensor([-torch.cuda.get_device_properties(ranks.device).total_memory], device=ranks.device)
    size, model = -int(ranks.max(sizes).item()), load_model(config.model_name_or_path)
    config = settled(config, model, ranks.size, size)
    if ranks.main:
        plan = plan_of(config, model, ranks.size, size)
        print(f"gradient_checkpointing auto is {config.gradient_checkpointing}; {plan.line()}", file=sys.stderr)
    return config


def plan_of(config: Config, model: Any, ranks: int, gpu_bytes: int) -> Plan:
    """The plan of each of `ranks` GPUs."""
    config = settled(config, model, ranks, gpu_bytes)
    text, e = model.config.text_config, getattr(torch, config.dtype).itemsize
    cached = FP8 if config.rollout_kv_dtype == "fp8" else getattr(torch, config.dtype)
    pool = KVPool(text, cached, torch.device("meta"), max_bytes=None)
    shape = Shape(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads * pool.dim,
        pool.heads * pool.dim, text.vocab_size, model.config.vq_config.num_embeddings, e,
    )  # fmt: skip
    trained = {n: p.numel() for n, p in model.named_parameters() if not n.startswith(tuple(config.freeze))}
    weights = e * sum(p.numel() for p in model.parameters())
    head = sum(trained.get(n, 0) for n in ("lm_head.weight", "model.generation_head.vision_head.weight"))
    merged = 0
    if config.lora_r:
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{n}.weight" in trained}
        chosen = {n: m for n, m in linear.items() if n.split(".")[-1] in config.lora_target_modules}
        merged = e * sum(m.weight.numel() for m in chosen.values())  # the engine decodes from merged copies
        trained = {n: config.lora_r * (m.in_features + m.out_features) for n, m in chosen.items()}
        head = 0
    stage = read_settings(config.deepspeed)["zero_optimization"]["stage"] if config.deepspeed else 0
    if config.optim == "adamw_8bit":
        training = Training(masters=0, moments=2, accumulated=0, ranks=ranks)
    else:
        training = Training(*((0, 8, 0) if e >= 4 else (4, 8, 4)), ranks=ranks, stage=stage)
    image, guided, limit = (
        model.config.vision_config.num_image_tokens,
        config.cfg_weight != 1,
        config.max_completion_length,
    )
    batch = Batch.of(
        config.per_device_train_batch_size, config.num_generations, PLAN_PROMPT, IMAGE_PROMPT, limit, image
    )
    update = update_peak(
        shape, batch, list(trained.values()), head, training, config.gradient_accumulation_steps,
        config.gradient_checkpointing,
    )  # fmt: skip
    decoder = sum(p.numel() for n, p in model.model.vqmodel.named_parameters() if not n.startswith("encoder"))
    engine = merged + e * (decoder + shape.codes * shape.hidden) + PICTURE_BYTES
    engine += reference_bytes(shape, Batch(PREFILL_TOKENS, 0, 0, 0))
    reference = weights if config.kl_streams and not config.lora_r else 0
    masters = training.masters * sum(trained.values()) // (ranks if training.stage else 1)
    scorers, pictures = _rewards(config)
    fixed = weights + reference + masters + engine + scorers + CONTEXT
    tokens = kv_tokens(config.prompts_per_device, config.num_generations, PLAN_PROMPT, limit, image, guided)
    asked = tokens * pool.bytes_per_token
    most = SHARE_OF_FREE * max(0, gpu_bytes - fixed) if config.rollout_kv_gib is None else config.rollout_kv_gib * GIB
    cache = min(asked, int(most))
    rows = {
        "weights": (weights,) * 3,
        "reference model": (reference,) * 3,
        "float32 masters": (masters,) * 3,
        "optimizer moments": (training.held(sum(trained.values())) - masters,) * 3,
        "gradients": (0, 0, update.gradients),
        "KV cache": (cache, *(0 if config.rollout_kv_release else cache,) * 2),
        "activations": (0, reference_bytes(shape, batch) if config.kl_streams else 0, update.activations),
        "chunk of logits": (0, 0, update.logits),
        "engine": (engine,) * 3,
        "rewards": (scorers + pictures, scorers + pictures, scorers),
        "CUDA context": (CONTEXT,) * 3,
    }
    return Plan(rows, tuple(name for name in [*config.rewards.names, *config.rewards.monitor] if name not in COUNTED))


def _rewards(config: Config) -> tuple[int, int]:
    """Weights of the known rewards on the GPU, and their activations at work."""
    weights = pictures = 0.0
    for name in [*config.rewards.names, *config.rewards.monitor]:
        options = config.rewards.options.get(name, {})
        if name in REWARDS and options.get("device") != "cpu":
            count, each = REWARDS[name]
            default = "bfloat16" if name == "orm" else "float32"
            itemsize = 4 if name == "grounding" else getattr(torch, options.get("dtype", default)).itemsize
            pictures += each * GIB * options.get("micro_batch", 16)
            if options.get("offload"):
                pictures += count * itemsize
            else:
                weights += count * itemsize
    return int(weights), int(pictures)


def changes(config: Config) -> Iterator[tuple[str, Config]]:
    """What can make a run smaller: the words of the command line, and the settings they mean."""
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing true", replace(config, gradient_checkpointing=True)
    if (prompts := config.per_device_train_batch_size) > 1:
        steps = config.gradient_accumulation_steps * prompts
        words = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {steps}"
        yield words, replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=steps)
    if config.max_completion_length > 128:
        yield "--max_completion_length 128", replace(config, max_completion_length=128)
    if config.rollout_kv_gib is None or config.rollout_kv_gib > 4:
        yield "--rollout_kv_gib 4", replace(config, rollout_kv_gib=4.0)
    if config.optim != "adamw_8bit" and not config.deepspeed:
        yield "--optim adamw_8bit", replace(config, optim="adamw_8bit")
    if not config.lora_r:
        yield "--lora_r 32", replace(config, lora_r=32)


def advice(config: Config, model: Any, ranks: int, gpu_bytes: int) -> str:
    """A line for each change, with its peak, the smallest first."""
    peaks = [(plan_of(other, model, ranks, gpu_bytes).peak, words) for words, other in changes(config)]
    return "\n".join(f"  {words}: {peak / GIB:.1f} GiB" for peak, words in sorted(peaks))


def dry_run(config: Config, ranks: int, gpu_gib: float) -> str:
    """The table, whether it fits GPUs of so many GiB, and what to change if not."""
    if ranks < 1 or gpu_gib <= 0:
        raise ValueError(f"gpus={ranks} and gpu_gib={gpu_gib} must be above 0")
    model, size = load_model(config.model_name_or_path), int(gpu_gib * GIB)
    plan = plan_of(config, model, ranks, size)
    said = f"{plan.table()}\n{plan.line()}; "
    if plan.peak <= size:
        return f"{said}it fits {gpu_gib:g} GiB"
    return f"{said}it does not fit {gpu_gib:g} GiB; one change makes it:\n{advice(config, model, ranks, size)}"


def require_memory(config: Config, force: bool) -> None:
    """On a GPU, print the plan's peak. A checkpoint in another layout has no plan.

    Raises:
        ValueError: it does not fit even with plans of `SHORT_PLAN` tokens, unless `force`.
    """
    if not torch.cuda.is_available():
        return
    try:
        model = load_model(config.model_name_or_path)
    except (OSError, ValueError):
        return  # loading the weights says what is wrong, and reads more layouts
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    size = torch.cuda.get_device_properties(device).total_memory
    plan = plan_of(config, model, ranks, size)
    if int(os.environ.get("RANK", 0)) == 0 and config.gradient_checkpointing != "auto":  # `settle` says it
        print(plan.line(), file=sys.stderr)
    short = replace(config, max_completion_length=min(SHORT_PLAN, config.max_completion_length))
    if not force and (least := plan_of(short, model, ranks, size).peak) > size:
        raise ValueError(
            f"the run needs {least / GIB:.1f} GiB a GPU even with plans of {short.max_completion_length} tokens, and "
            f"this GPU has {size / GIB:.1f}; --dry_run says what to change, --force_memory runs all the same"
        )
