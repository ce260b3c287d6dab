"""The memory plan of a run: what each phase holds on one GPU, and what to change where it does not fit.

It needs no GPU and no weights: the model is built without storage from its config.json. Plans of full length
(`max_completion_length`) are assumed, and prompts of `PLAN_PROMPT` and `IMAGE_PROMPT` tokens.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, JanusForConditionalGeneration

from ..kernels.kv_pool import FP8
from ..model.adapters import adapter_base
from ..model.convert import ORIGINAL, original_config
from ..model.decoder import PREFILL_TOKENS
from ..model.kv import SHARE_OF_FREE, KVPool
from ..model.policy import read_config
from ..model.vq import PICTURE_BYTES
from .config import Config
from .distributed import Ranks
from .files import ROOT
from .memory import (
    Batch,
    Shape,
    Training,
    Update,
    forward_bytes,
    kv_tokens,
    reference_bytes,
    reference_tokens,
    update_peak,
)
from .step import begins_early
from .zero import bucket_size, read_settings

GIB = 2**30
PLAN_PROMPT, IMAGE_PROMPT = 200, 80  # tokens, the second without the plan
SHORT_PLAN = 80  # tokens, what Janus-Pro writes
ROOM = 0.1  # of a GPU that "auto" leaves: a plan is no measurement, and memory is fragmented
CONTEXT = GIB  # CUDA's context and libraries
# parameters as published, and GiB of activations a picture of a micro-batch
REWARDS = {"hps": (986e6, 0.0), "git": (395e6, 0.0), "grounding": (172e6, 1.0), "orm": (8030e6, 0.0)}
_NO_TOKENIZER = SimpleNamespace(  # of which the sizes of a model do not depend
    bos_token_id=0, eos_token_id=1, pad_token_id=2, convert_tokens_to_ids=lambda _: 3
)
_AUTO: dict[str, Any] = {"gradient_checkpointing": False, "micro_batch_tokens": None}  # what "auto" is without a GPU
_OTHER_TRAINING = ("--lora_r", "--max_completion_length")
COUNTED = {"scene", "scene_relation", *REWARDS}


@dataclass(frozen=True)
class Plan:
    """Bytes by row of the table: (rollout, reference, update); and of `ranks`, what each has in host memory."""

    rows: dict[str, tuple[int, int, int]]
    uncounted: tuple[str, ...]
    host: dict[str, int]
    ranks: int

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
        if self.host:
            size = sum(self.host.values()) / GIB
            several = f"{size * self.ranks:.1f} GiB for {self.ranks} GPUs of one machine, {size:.1f} each"
            lines.append(f"host memory: {several if self.ranks > 1 else f'{size:.1f} GiB'} ({', '.join(self.host)})")
        if self.uncounted:
            lines.append(f"not counted: rewards {', '.join(self.uncounted)}")
        return "\n".join(lines)


def load_model(path: str) -> Any:
    """A Janus of that config.json, in either layout, on the meta device; of a LoRA adapter the model that it names.

    Raises:
        FileNotFoundError: neither a folder with a config.json nor a model that the hub gives.
        ValueError: another architecture.
    """
    path = adapter_base(path) or path
    raw = read_config(path)
    if (kind := raw.get("model_type")) == ORIGINAL:
        config = original_config(path, raw, _NO_TOKENIZER)
    elif kind == "janus":
        config = AutoConfig.from_pretrained(path)
    else:
        raise ValueError(f"the plan reads a config.json of model_type 'janus' or {ORIGINAL!r}, {path} is {kind!r}")
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


def settled(config: Config, model: Any, ranks: int, gpu_bytes: int) -> Config:
    """`auto` becomes what leaves `ROOM` of GPUs of so many bytes, or else takes least.

    `gradient_checkpointing` becomes the first that does, then `micro_batch_tokens` the largest: a larger micro-batch
    saves less than what is not recomputed.
    """
    most = (1 - ROOM) * gpu_bytes

    def fits(**changed: Any) -> bool:
        return plan_of(replace(config, **changed), model, ranks, gpu_bytes).peak <= most

    if config.gradient_checkpointing == "auto":
        tokens = None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
        choices = (False, "selective", True)
        how = next((how for how in choices if fits(gradient_checkpointing=how, micro_batch_tokens=tokens)), True)
        config = replace(config, gradient_checkpointing=how)  # type: ignore[arg-type]
    if config.micro_batch_tokens == "auto":
        whole = _cut(config, model, config.max_completion_length)[0].tokens
        sizes = range(100, whole, 100)
        if fits(micro_batch_tokens=whole):  # one micro-batch has no gradients of others beside it
            return replace(config, micro_batch_tokens=whole)
        count = bisect_right(sizes, 0, key=lambda tokens: not fits(micro_batch_tokens=tokens))
        config = replace(config, micro_batch_tokens=100 * max(1, count))
    return config


def settle(config: Config, ranks: Ranks) -> Config:
    """The same on all ranks, for the smallest of their GPUs; without GPUs nothing is recomputed or cut by tokens."""
    if not (auto := [name for name in _AUTO if getattr(config, name) == "auto"]):
        return config
    if ranks.device.type != "cuda":
        return replace(config, **{name: _AUTO[name] for name in auto})
    sizes = torch.tensor([-torch.cuda.get_device_properties(ranks.device).total_memory], device=ranks.device)
    size, model = -int(ranks.max(sizes).item()), load_model(config.model_name_or_path)
    chosen = settled(config, model, ranks.size, size)
    if ranks.main:
        print(_auto(config, chosen) + plan_of(chosen, model, ranks.size, size).line(), file=sys.stderr)
    return chosen


def _auto(config: Config, chosen: Config) -> str:
    names = [name for name in _AUTO if getattr(config, name) == "auto"]
    said = ", ".join(f"{name} auto: {str(getattr(chosen, name)).lower()}" for name in names)
    return f"{said}; " if said else ""


def _cut(config: Config, model: Any, plan: int) -> tuple[Batch, Batch, int]:
    """The samples of a step on one GPU, a micro-batch of them, and how many there are, with plans of so many tokens."""
    image = model.config.vision_config.num_image_tokens
    guided = config.cfg_weight != 1 and config.policy_logits == "guided"

    def batch(prompts: int, group: int) -> Batch:
        return Batch.of(prompts, group, PLAN_PROMPT, IMAGE_PROMPT, plan, image, guided)

    whole = batch(config.prompts_per_device, config.num_generations)
    if not isinstance(config.micro_batch_tokens, int):
        part = batch(config.per_device_train_batch_size, config.num_generations)
        return whole, part, config.gradient_accumulation_steps
    tokens = min(whole.tokens, max(config.micro_batch_tokens, batch(1, 1).tokens))
    return whole, whole.part(tokens), -(-whole.tokens // tokens)


def plan_of(config: Config, model: Any, ranks: int, gpu_bytes: int) -> Plan:
    """The plan of each of `ranks` GPUs."""
    config = settled(config, model, ranks, gpu_bytes)
    e = getattr(torch, config.dtype).itemsize
    cached = FP8 if config.rollout_kv_dtype == "fp8" else getattr(torch, config.dtype)
    pool = KVPool(model.config.text_config, cached, torch.device("meta"), max_bytes=None)
    shape = Shape.of(model.config, e)
    trained, head, embedding, merged = _trained(config, model)
    zero = read_settings(config.deepspeed)["zero_optimization"] if config.deepspeed else {}
    training, count = _training(config, zero, trained, e, ranks), sum(trained)
    sizes = _sizes(model)
    whole = e * sum(sizes.values())
    weights, gathered = whole + (e * count if config.lora_r else 0), 0
    if training.stage == 3:
        live = zero.get("stage3_max_live_parameters", "auto")
        gathered = min(weights, e * int(1e9 if live == "auto" else live))
        # rollouts have a copy of what the ranks share
        decoded = ("model.vision_model", "model.aligner", "model.vqmodel")
        merged = e * sum(size for name, size in sizes.items() if not name.startswith(decoded))
        weights //= ranks
    limit, image = config.max_completion_length, model.config.vision_config.num_image_tokens
    doubled, recompute = config.cfg_weight != 1, config.gradient_checkpointing
    # of as many tokens, short plans leave more to pictures and padding
    cuts = [_cut(config, model, plan) for plan in (limit, min(SHORT_PLAN, limit))]
    peaks = [update_peak(shape, b, trained, head, training, n, recompute, embedding) for _, b, n in cuts]
    update, (_, batch, _) = max(zip(peaks, cuts, strict=True), key=lambda pair: pair[0].total)
    everyone, passing, _ = cuts[0]  # the second through the reference at a time
    if config.micro_batch_tokens is not None:
        passing = everyone.part(min(everyone.tokens, reference_tokens(shape, passing.tokens, recompute)))
    scorers, pictures, offloaded = _rewards(config)
    ahead, beside = sum(forward_bytes(shape, batch, recompute)), 0
    if begins_early(config) and ahead + pictures > update.total:  # rewards are at work beside the first forward pass
        update, beside = Update(0, ahead, 0), pictures
    decoder = sum(size for n, size in sizes.items() if n.startswith("model.vqmodel.") and ".encoder." not in n)
    engine = merged + e * (decoder + shape.codes * shape.hidden) + PICTURE_BYTES
    engine += reference_bytes(shape, Batch(PREFILL_TOKENS, 0, 0, 0))
    reference = whole if config.kl_streams and not config.lora_r else 0
    lent = 0 if config.reference_device else reference  # while it is not at work
    held, average = training.held(count), 0 if config.ema_decay is None else 4 * count
    masters = held * training.masters // (training.masters + training.moments)
    # what is there when the cache first grows: no moments yet, unless it is given back and grows again
    fixed = weights + gathered + lent + average + engine + scorers + CONTEXT
    fixed += held if config.rollout_kv_release else masters
    asked = kv_tokens(config.prompts_per_device, config.num_generations, PLAN_PROMPT, limit, image, doubled)
    most = SHARE_OF_FREE * max(0, gpu_bytes - fixed) if config.rollout_kv_gib is None else config.rollout_kv_gib * GIB
    cache = min(asked * pool.bytes_per_token, int(most))
    kept = 0 if config.rollout_kv_release else cache
    rows = {
        "weights": (weights,) * 3,
        "gathered weights": (gathered,) * 3,
        "reference model": (lent, reference, lent),
        "float32 masters": (masters,) * 3,
        "optimizer moments": (held - masters,) * 3,
        "average (ema_decay)": (average,) * 3,
        "gradients": (0, 0, update.gradients),
        "KV cache": (cache, kept, kept),
        "activations": (0, reference_bytes(shape, passing) if config.kl_streams else 0, update.activations),
        "chunk of logits": (0, 0, update.logits),
        "engine": (engine,) * 3,
        "rewards": (scorers + pictures, scorers + pictures, scorers + beside),
        "CUDA context": (CONTEXT,) * 3,
    }
    host = {
        "masters, moments and gradients": training.share(count) + 4 * count // ranks if training.offloaded else 0,
        "reference model, up to": sum(pinned(e * size) for size in sizes.values()) if lent < reference else 0,
        "rewards": offloaded,
    }
    host = {name: size for name, size in host.items() if size}
    optional = ("gathered weights", "average (ema_decay)")
    others = tuple(name for name in config.rewards.all if name not in COUNTED)
    return Plan({n: row for n, row in rows.items() if any(row) or n not in optional}, others, host, ranks)


def pinned(size: int) -> int:
    """What PyTorch takes of page-locked memory for so many bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


@cache
def _sizes(model: Any) -> dict[str, int]:
    """Weights of each parameter; asked again and again for "auto"."""
    return {name: p.numel() for name, p in model.named_parameters()}


def _trained(config: Config, model: Any) -> tuple[list[int], int, int, int]:
    """Weights of each parameter that trains, those of heads and of the text's embedding, and the bytes of merged copies
    for rollouts."""
    trained = {n: size for n, size in _sizes(model).items() if not n.startswith(tuple(config.freeze))}
    if not config.lora_r:
        heads = ("lm_head.weight", "model.generation_head.vision_head.weight")
        embedding = trained.get("model.language_model.embed_tokens.weight", 0)
        return list(trained.values()), sum(trained.get(n, 0) for n in heads), embedding, 0
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{n}.weight" in trained}
    chosen = [m for n, m in linear.items() if n.split(".")[-1] in config.lora_target_modules]
    pairs = [config.lora_r * size for m in chosen for size in (m.in_features, m.out_features)]
    return pairs, 0, 0, getattr(torch, config.dtype).itemsize * sum(m.weight.numel() for m in chosen)


def _training(config: Config, zero: dict[str, Any], trained: list[int], e: int, ranks: int) -> Training:
    """What the optimizer holds; `zero`: DeepSpeed's section of that name, empty without it."""
    if config.optim == "adamw_8bit":
        return Training(masters=0, moments=2, accumulated=0, ranks=ranks)
    kinds = (0, 8, 0) if e >= 4 and not zero else (4, 8, 4)
    if not zero:
        return Training(*kinds, ranks=ranks)
    stage = zero["stage"]
    overlap = zero.get("overlap_comm", "auto")
    buffers = 1 + (stage == 3 if overlap in ("auto", None) else bool(overlap))
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Training(*kinds, ranks, stage, bucket_size(zero, max(trained)), buffers, offloaded)


def _rewards(config: Config) -> tuple[int, int, int]:
    """Weights of the known rewards on the GPU, their activations (and weights) at work, and weights on the host."""
    weights = pictures = host = 0.0
    for name in config.rewards.all:
        options = config.rewards.options.get(name, {})
        if name in REWARDS and options.get("device") != "cpu":
            count, each = REWARDS[name]
            default = "bfloat16" if name == "orm" else "float32"
            itemsize = 4 if name == "grounding" else getattr(torch, options.get("dtype", default)).itemsize
            pictures += each * GIB * options.get("micro_batch", 16)
            if options.get("offload"):
                pictures += count * itemsize
                host += count * itemsize
            else:
                weights += count * itemsize
    return int(weights), int(pictures), int(host)


def changes(config: Config, ranks: int = 1) -> Iterator[tuple[str, Config]]:
    """What can make a run smaller: the words of the command line, and the settings they mean."""
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing selective", replace(config, gradient_checkpointing="selective")
    if config.gradient_checkpointing in (False, "selective"):
        yield "--gradient_checkpointing true", replace(config, gradient_checkpointing=True)
    if (prompts := config.per_device_train_batch_size) > 1 and config.micro_batch_tokens is None:
        steps = config.gradient_accumulation_steps * prompts
        words = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {steps}"
        yield words, replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=steps)
    if config.micro_batch_tokens != "auto" and not config.needs_equal_micro_batches:
        yield "--micro_batch_tokens auto", replace(config, micro_batch_tokens="auto")
    if not config.rollout_kv_release:
        yield "--rollout_kv_release true", replace(config, rollout_kv_release=True)
    if config.rollout_kv_gib is None or config.rollout_kv_gib > 4:
        yield "--rollout_kv_gib 4", replace(config, rollout_kv_gib=4.0)
    if config.kl_streams and not config.lora_r and not config.reference_device:
        yield "--reference_device cpu", replace(config, reference_device="cpu")
    if config.optim != "adamw_8bit" and not config.deepspeed:
        if ranks > 1 and config.micro_batch_tokens is None:
            file = "configs/zero2.json"
            yield f"--deepspeed {file}", replace(config, deepspeed=str(ROOT / file))
        yield "--optim adamw_8bit", replace(config, optim="adamw_8bit")
    if config.max_completion_length > 128:
        yield "--max_completion_length 128", replace(config, max_completion_length=128)
    if not config.lora_r:
        yield "--lora_r 32", replace(config, lora_r=32, reference_device=None)


def advice(config: Config, model: Any, ranks: int, gpu_bytes: int) -> str:
    """A line for each change, with its peak, the smallest first; then those that fit together and train the same."""
    lines, words, other = [], list[str](), config
    least = plan_of(config, model, ranks, gpu_bytes).peak
    while least > gpu_bytes:
        each = [(plan_of(c, model, ranks, gpu_bytes).peak, said, c) for said, c in changes(other, ranks)]
        each.sort(key=lambda change: change[0])
        if not words:
            lines = [f"  {said}: {peak / GIB:.1f} GiB" for peak, said, _ in each]
        peak, said, other = next((c for c in each if not c[1].startswith(_OTHER_TRAINING)), (least, "", other))
        if peak >= least:
            break
        least, words = peak, [*words, said]
    else:
        lines += [f"together: {' '.join(words)}: {least / GIB:.1f} GiB"] * (len(words) > 1)
    return "\n".join(lines)


def dry_run(config: Config, ranks: int, gpu_gib: float) -> str:
    """The table, whether it fits GPUs of so many GiB, and what to change if not."""
    if ranks < 1 or gpu_gib <= 0:
        raise ValueError(f"gpus={ranks} and gpu_gib={gpu_gib} must be above 0")
    model, size = load_model(config.model_name_or_path), int(gpu_gib * GIB)
    chosen = settled(config, model, ranks, size)
    plan = plan_of(chosen, model, ranks, size)
    said = f"{plan.table()}\n{_auto(config, chosen)}{plan.line()}; "
    if plan.peak <= size:
        return f"{said}it fits {gpu_gib:g} GiB"
    return f"{said}it does not fit {gpu_gib:g} GiB; one change makes it:\n{advice(config, model, ranks, size)}"


def require_memory(config: Config, force: bool) -> None:
    """On a GPU, print the plan's peak; without one, the host's memory is the limit.

    Raises:
        ValueError: it does not fit even with plans of `SHORT_PLAN` tokens, unless `force`.
    """
    gpu = torch.cuda.is_available()
    try:
        model = load_model(config.model_name_or_path)
    except (OSError, ValueError):
        return  # loading the weights says what is wrong, and reads more layouts
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if gpu:
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    plan = plan_of(config, model, ranks, size)
    auto = any(getattr(config, name) == "auto" for name in _AUTO)
    if int(os.environ.get("RANK", 0)) == 0 and gpu and not auto:  # `settle` says it
        print(plan.line(), file=sys.stderr)
    short = replace(config, max_completion_length=min(SHORT_PLAN, config.max_completion_length))
    if not force and (least := plan_of(short, model, ranks, size).peak) > size:
        where = "this GPU" if gpu else "this machine, which has no GPU,"
        raise ValueError(
            f"the run needs {least / GIB:.1f} GiB a GPU even with plans of {short.max_completion_length} tokens, and "
            f"{where} has {size / GIB:.1f}; --dry_run says what to change, --force_memory runs all the same"
        )
