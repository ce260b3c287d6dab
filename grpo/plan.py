"""The memory plan of a run: how much memory each phase needs on one GPU, and what to change if it does not fit.

It needs no GPU and no weights, since the model is built from its config.json on the meta device. It assumes that plans
have their full length (`max_completion_length`), and that prompts have `PLAN_PROMPT` and `IMAGE_PROMPT` tokens.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
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
from ..rewards.worker import PICTURES
from .config import Config, RewardConfig
from .distributed import Ranks
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
PLAN_PROMPT, IMAGE_PROMPT = 200, 80  # tokens of the two chat prompts; the plan is not counted
SHORT_PLAN = 80  # tokens of a plan as Janus-Pro writes it
ROOM = 0.1  # share of a GPU that "auto" leaves free: the plan is an estimate, and memory gets fragmented
CONTEXT = GIB  # CUDA's context and libraries
# number of published parameters, and GiB of activations for each picture of a micro-batch
REWARDS = {"hps": (986e6, 0.0), "git": (395e6, 0.0), "grounding": (172e6, 0.4), "orm": (8030e6, 0.0)}
_NO_TOKENIZER = SimpleNamespace(  # the sizes of a model do not depend on its tokenizer
    bos_token_id=0, eos_token_id=1, pad_token_id=2, convert_tokens_to_ids=lambda _: 3
)
# what "auto" is without a GPU
AUTO: dict[str, Any] = {"gradient_checkpointing": False, "micro_batch_tokens": None}
COUNTED = {"scene", "scene_relation", *REWARDS}  # rewards whose memory is known


@dataclass(frozen=True)
class Plan:
    """How much memory each of `ranks` GPUs needs, and each rank on its host.

    Args:
        rows: rows of the table: bytes in rollout, reference pass and update.
        uncounted: rewards of which nothing is known.
        host: bytes of host memory.
        ranks: number of GPUs.
    """

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
        return f"memory plan: peak {self.peak / GIB:.1f} GiB per GPU, in the {phase} phase"

    def table(self) -> str:
        lines = [f"{'GiB per GPU':<26}{'rollout':>10}{'reference':>11}{'update':>9}"]
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
    """Build a Janus model on the meta device from a config.json in either layout. A LoRA adapter names its model.

    Raises:
        FileNotFoundError: `path` is neither a folder with a config.json nor a model on the hub.
        ValueError: the model has another architecture.
    """
    path = adapter_base(path) or path
    raw = read_config(path)
    if (kind := raw.get("model_type")) == ORIGINAL:
        config = original_config(path, raw, _NO_TOKENIZER)
    elif kind == "janus":
        config = AutoConfig.from_pretrained(path)
    else:
        raise ValueError(f"the memory plan needs model_type 'janus' or {ORIGINAL!r}; {path} is {kind!r}")
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


def settled(config: Config, model: Any, ranks: int, gpu_bytes: int) -> Config:
    """The settings with each `auto` replaced by a value.

    `gradient_checkpointing` becomes the first of false, selective and true with which the plan leaves `ROOM` of the GPU
    free, or else true. Then rewards get as many pictures at a time as fit, or as do not raise the peak, which may be in
    a phase without rewards. Then `micro_batch_tokens` becomes the largest number that fits, or null if another setting
    excludes it. This order is faster, since recomputing costs more time than smaller micro-batches.
    """
    most = (1 - ROOM) * gpu_bytes
    if config.micro_batch_tokens == "auto" and config.needs_equal_micro_batches:
        config = replace(config, micro_batch_tokens=None)
    tokens = None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    rewards = auto_rewards(config)

    def peak(**changed: Any) -> int:
        return plan_of(replace(config, **changed), model, ranks, gpu_bytes).peak

    def fits(**changed: Any) -> bool:
        return peak(**changed) <= most

    def with_pictures(count: int) -> RewardConfig:
        options = {
            name: {**own, "micro_batch": count} for name, own in config.rewards.options.items() if name in rewards
        }
        return replace(config.rewards, options=config.rewards.options | options)

    if config.gradient_checkpointing == "auto":
        fewest = {"rewards": with_pictures(1), "micro_batch_tokens": tokens}
        how = next((how for how in (False, "selective", True) if fits(gradient_checkpointing=how, **fewest)), True)
        config = replace(config, gradient_checkpointing=how)  # type: ignore[arg-type]
    if rewards:
        counts = [PICTURES >> i for i in range(PICTURES.bit_length())]
        allowed = max(most, peak(rewards=with_pictures(1), micro_batch_tokens=tokens))
        each = map(with_pictures, counts)
        chosen = next(x for x in each if peak(rewards=x, micro_batch_tokens=tokens) <= allowed)
        config = replace(config, rewards=chosen)
    if config.micro_batch_tokens == "auto":
        whole = _cut(config, model, config.max_completion_length)[0].tokens
        sizes = range(100, whole, 100)
        if fits(micro_batch_tokens=whole):  # a single micro-batch needs no memory for accumulated gradients
            return replace(config, micro_batch_tokens=whole)
        count = bisect_right(sizes, 0, key=lambda tokens: not fits(micro_batch_tokens=tokens))
        config = replace(config, micro_batch_tokens=100 * max(1, count))
    return config


def recomputing(config: Config, model: Any, ranks: int, gpu_bytes: int, longest: int) -> bool | str:
    """`gradient_checkpointing` for a step with plans of up to `longest` tokens.

    The plans of a step are usually much shorter than `max_completion_length`, for which `config` is settled. So this is
    the first of false, selective and the setting itself with which the memory plan leaves `ROOM` of the GPU free.
    """
    kept_cache = plan_of(config, model, ranks, gpu_bytes).rows["KV cache"][2]
    for how in (False, "selective"):
        shorter = replace(config, max_completion_length=longest, gradient_checkpointing=how)  # type: ignore[arg-type]
        plan = plan_of(shorter, model, ranks, gpu_bytes)
        update = plan.peaks["update"] - plan.rows["KV cache"][2] + kept_cache
        if how == config.gradient_checkpointing or update <= (1 - ROOM) * gpu_bytes:
            return how
    return config.gradient_checkpointing


def settle(
    config: Config, ranks: Ranks, load: Callable[[str], Any] = load_model
) -> tuple[Config, Callable[[int], bool | str]]:
    """`settled` for the smallest GPU of all ranks. Without GPUs, nothing is recomputed or cut by tokens.

    Args:
        load: builds the model of `model_name_or_path` on the meta device.

    Returns:
        The settings, and a function that takes the number of tokens of a step's longest plan on this rank, and returns
        `gradient_checkpointing` for this step. It is the setting itself unless that was `auto`, and with ZeRO-3, where
        ranks that recompute also gather weights together.
    """
    auto = [name for name in AUTO if getattr(config, name) == "auto"]
    chosen = config
    if ranks.device.type != "cuda":
        chosen = replace(config, **{name: AUTO[name] for name in auto})
    elif auto or auto_rewards(config):
        sizes = torch.tensor([-torch.cuda.get_device_properties(ranks.device).total_memory], device=ranks.device)
        given = load(config.model_name_or_path), ranks.size, -int(ranks.max(sizes).item())
        chosen = settled(config, *given)
        if ranks.main:
            print(auto_text(config, chosen) + plan_of(chosen, *given).line(), file=sys.stderr)
        sharded = config.deepspeed and read_settings(config.deepspeed)["zero_optimization"]["stage"] == 3
        if config.gradient_checkpointing == "auto" and not sharded:
            at = cache(partial(recomputing, chosen, *given))
            return chosen, lambda longest: at(min(32 * max(1, -(-longest // 32)), chosen.max_completion_length))
    return chosen, lambda _: chosen.gradient_checkpointing


def auto_text(config: Config, chosen: Config) -> str:
    """What became of the settings that are `auto`, as the beginning of a line; empty if there are none."""
    found = {name: getattr(chosen, name) for name in AUTO if getattr(config, name) == "auto"}
    found |= {f"{name}'s micro_batch": chosen.rewards.options[name]["micro_batch"] for name in auto_rewards(config)}
    said = ", ".join(f"{name} auto: {yaml_text(value)}" for name, value in found.items())
    return f"{said}; " if said else ""


def auto_rewards(config: Config) -> list[str]:
    """The rewards whose `micro_batch` is auto."""
    return [name for name, options in config.rewards.options.items() if options.get("micro_batch") == "auto"]


def yaml_text(value: Any) -> str:
    """A value as a configuration file has it."""
    return "null" if value is None else str(value).lower()


def _cut(config: Config, model: Any, plan: int) -> tuple[Batch, Batch, int]:
    """A step's samples on one GPU, one of its micro-batches, and how many there are, with plans of `plan` tokens."""
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
    """The memory plan of a run on `ranks` GPUs of `gpu_bytes` each."""
    config = settled(config, model, ranks, gpu_bytes)
    e = getattr(torch, config.dtype).itemsize
    shape, sizes = Shape.of(model.config, e), _sizes(model)
    zero = read_settings(config.deepspeed)["zero_optimization"] if config.deepspeed else {}
    trained, heads = _trained(config, model)
    training, count = _training(config, zero, trained, e, ranks), sum(trained)
    weights, gathered, copied = _weights(config, model, zero, training, count)
    scorers, pictures, offloaded = _rewards(config)
    update, beside, reference_pass = _update(config, model, shape, trained, heads, training, pictures)
    decoder = sum(size for n, size in sizes.items() if n.startswith("model.vqmodel.") and ".encoder." not in n)
    engine = copied + e * (decoder + shape.codes * shape.hidden) + PICTURE_BYTES
    engine += reference_bytes(shape, Batch(PREFILL_TOKENS, 0, 0, 0))
    reference = e * sum(sizes.values()) if config.kl_streams and not config.lora_r else 0
    kept_reference = 0 if config.reference_device else reference  # outside of its own forward pass
    held, average = training.held(count), 0 if config.ema_decay is None else 4 * count
    masters = held * training.masters // (training.masters + training.moments)
    # what is allocated when the cache first grows: no moments yet, unless the cache is freed and grows in each step
    fixed = weights + gathered + kept_reference + average + engine + scorers + CONTEXT
    fixed += held if config.rollout_kv_release else masters
    cache = _cache(config, model, gpu_bytes - fixed)
    kept_cache = 0 if config.rollout_kv_release else cache
    rows = {
        "weights": (weights,) * 3,
        "gathered weights": (gathered,) * 3,
        "reference model": (kept_reference, reference, kept_reference),
        "float32 masters": (masters,) * 3,
        "optimizer moments": (held - masters,) * 3,
        "average (ema_decay)": (average,) * 3,
        "gradients": (0, 0, update.gradients),
        "KV cache": (cache, kept_cache, kept_cache),
        "activations": (0, reference_pass, update.activations),
        "slice of logits": (0, 0, update.logits),
        "engine": (engine,) * 3,
        "rewards": (scorers + pictures, scorers + pictures, scorers + beside),
        "CUDA context": (CONTEXT,) * 3,
    }
    host = {
        "masters, moments and gradients": training.share(count) + 4 * count // ranks if training.offloaded else 0,
        "reference model, up to": sum(pinned(e * size) for size in sizes.values()) if kept_reference < reference else 0,
        "rewards": offloaded,
    }
    host = {name: size for name, size in host.items() if size}
    optional = ("gathered weights", "average (ema_decay)")
    others = tuple(name for name in config.rewards.all if name not in COUNTED)
    return Plan({n: row for n, row in rows.items() if any(row) or n not in optional}, others, host, ranks)


def _weights(
    config: Config, model: Any, zero: dict[str, Any], training: Training, trained: int
) -> tuple[int, int, int]:
    """Bytes of the weights on each GPU, of those that ZeRO-3 gathers at a time, and of copies for rollouts."""
    sizes, e = _sizes(model), getattr(torch, config.dtype).itemsize
    weights = e * (sum(sizes.values()) + (trained if config.lora_r else 0))
    if training.stage != 3:
        return weights, 0, _merged(config, model)
    live = zero.get("stage3_max_live_parameters", "auto")
    gathered = min(weights, e * int(1e9 if live == "auto" else live))
    # rollouts have a full copy of the weights that ZeRO-3 divides among the ranks
    not_decoded = ("model.vision_model", "model.aligner", "model.vqmodel")
    copied = e * sum(size for name, size in sizes.items() if not name.startswith(not_decoded))
    return weights // training.ranks, gathered, copied


def _update(
    config: Config,
    model: Any,
    shape: Shape,
    trained: list[int],
    heads: tuple[int, int],
    training: Training,
    pictures: int,
) -> tuple[Update, int, int]:
    """The peak of the update, the bytes of rewards that work at the same time, and the peak of a reference pass."""
    limit, recompute, (head, embedding) = config.max_completion_length, config.gradient_checkpointing, heads
    # short plans can be worse: with the same number of tokens there are more pictures and more padding
    cuts = [_cut(config, model, plan) for plan in (limit, min(SHORT_PLAN, limit))]
    peaks = [update_peak(shape, b, trained, head, training, n, recompute, embedding) for _, b, n in cuts]
    update, (_, batch, _) = max(zip(peaks, cuts, strict=True), key=lambda pair: pair[0].total)
    ahead, beside = sum(forward_bytes(shape, batch, recompute)), 0
    if begins_early(config) and ahead + pictures > update.total:  # rewards work during the first forward pass
        update, beside = Update(0, ahead, 0), pictures
    if not config.kl_streams:
        return update, beside, 0
    whole, part, _ = cuts[0]
    if config.micro_batch_tokens is not None:  # without gradients, larger parts fit
        part = whole.part(min(whole.tokens, reference_tokens(shape, part.tokens, recompute)))
    return update, beside, reference_bytes(shape, part)


def _cache(config: Config, model: Any, free: int) -> int:
    """Bytes of the KV cache: as many as the rollout asks for, up to its limit."""
    cached = FP8 if config.rollout_kv_dtype == "fp8" else getattr(torch, config.dtype)
    pool = KVPool(model.config.text_config, cached, torch.device("meta"), max_bytes=None)
    asked = kv_tokens(
        config.prompts_per_device,
        config.num_generations,
        PLAN_PROMPT,
        config.max_completion_length,
        model.config.vision_config.num_image_tokens,
        config.cfg_weight != 1,
    )
    most = SHARE_OF_FREE * max(0, free) if config.rollout_kv_gib is None else config.rollout_kv_gib * GIB
    return min(asked * pool.bytes_per_token, int(most))


def pinned(size: int) -> int:
    """Bytes of page-locked memory that PyTorch allocates for `size` bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


@cache
def _sizes(model: Any) -> dict[str, int]:
    """Number of weights of each parameter. It is cached, since `auto` makes many plans."""
    return {name: p.numel() for name, p in model.named_parameters()}


def _trained(config: Config, model: Any) -> tuple[list[int], tuple[int, int]]:
    """Number of weights of each trained parameter; and of these, of both heads and of the text embedding."""
    if config.lora_r:
        layers = _adapted(config, model)
        return [config.lora_r * size for m in layers for size in (m.in_features, m.out_features)], (0, 0)
    trained = _not_frozen(config, model)
    heads = ("lm_head.weight", "model.generation_head.vision_head.weight")
    embedding = trained.get("model.language_model.embed_tokens.weight", 0)
    return list(trained.values()), (sum(trained.get(n, 0) for n in heads), embedding)


def _not_frozen(config: Config, model: Any) -> dict[str, int]:
    """Number of weights of each parameter that `freeze` does not cover."""
    return {name: size for name, size in _sizes(model).items() if not name.startswith(tuple(config.freeze))}


def _adapted(config: Config, model: Any) -> list[torch.nn.Linear]:
    """The layers that get LoRA adapters."""
    names = _not_frozen(config, model)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{n}.weight" in names}
    return [m for n, m in linear.items() if n.split(".")[-1] in config.lora_target_modules]


def _merged(config: Config, model: Any) -> int:
    """Bytes of the weights that rollouts decode with merged adapters, which they copy."""
    layers = _adapted(config, model) if config.lora_r else []
    return getattr(torch, config.dtype).itemsize * sum(m.weight.numel() for m in layers)


def _training(config: Config, zero: dict[str, Any], trained: list[int], e: int, ranks: int) -> Training:
    """What the optimizer holds. `zero` is DeepSpeed's section "zero_optimization", empty without DeepSpeed."""
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
    """Bytes of the known rewards: weights that stay on the GPU, what is added at work, and weights in host memory."""
    weights = pictures = host = 0.0
    for name in config.rewards.all:
        options = config.rewards.options.get(name, {})
        if name in REWARDS and options.get("device") != "cpu":
            count, each = REWARDS[name]
            default = "bfloat16" if name == "orm" else "float32"
            given = options.get("dtype", default)
            dtype = getattr(torch, str(given), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"rewards.options.{name}: dtype={given!r} must be float16, bfloat16 or float32")
            itemsize = 4 if name == "grounding" else dtype.itemsize
            pictures += each * GIB * options.get("micro_batch", PICTURES)
            if options.get("offload"):
                pictures += count * itemsize
                host += count * itemsize
            else:
                weights += count * itemsize
    return int(weights), int(pictures), int(host)
