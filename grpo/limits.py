"""Which values the settings may have, and which settings need or exclude each other.

Every check raises a ValueError that names the setting. `Config` runs them when it is created.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeAlias

Config: TypeAlias = Any  # the class of config.py, which imports this file
TRACKERS = ("tensorboard", "trackio", "wandb")
# the schedules of transformers that need nothing but warmup_steps and max_steps
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
STREAMS = ("text", "image")
PER_STREAM = ("beta", "epsilon", "epsilon_high", "entropy_coef")  # take one number, or one for each stream

# (what a value must be, the test, names of settings); null passes if the text says so
_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("0 or more", lambda x: x >= 0, "lora_r learning_rate weight_decay warmup_steps top_k image_top_k sample_steps"),
    ("at least 1", lambda x: x >= 1, "per_device_train_batch_size gradient_accumulation_steps max_steps save_steps"),
    ("at least 1", lambda x: x >= 1, "num_iterations max_completion_length num_eval_generations ref_model_sync_steps"),
    ("at least 1", lambda x: x >= 1, "rollout_max_rows"),
    ("at least 1, or null", lambda x: x >= 1, "stop_after save_total_limit eval_steps"),
    ("at least 1, auto, or null", lambda x: x == "auto" or int(x) >= 1, "micro_batch_tokens"),
    ("at least 2: a single sample has no advantage", lambda x: x >= 2, "num_generations"),
    ("above 0", lambda x: x > 0, "lora_alpha ddp_timeout max_grad_norm adam_epsilon entropy_coef_delta"),
    ("above 0", lambda x: x > 0, "importance_sampling_clip_max"),
    ("above 0, or null", lambda x: x > 0, "rollout_kv_gib off_policy_mask_threshold delta"),
    ("above 0: greedy samples are all alike", lambda x: x > 0, "temperature image_temperature"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "lora_dropout adam_beta1 adam_beta2"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "top_p image_top_p ref_model_mixup_alpha"),
    ("in (0, 1), or null", lambda x: 0 < x < 1, "ema_decay"),
    ("0 to 1000", lambda x: 0 <= x <= 1000, "dynamic_sampling"),
    ("in [0, 2^31)", lambda x: 0 <= x < 2**31, "seed"),
    ("at least one name", bool, "lora_target_modules"),
    (f"one of {', '.join(SCHEDULES)}", lambda x: x in SCHEDULES, "lr_scheduler_type"),
    ("a .json file to write, or null", lambda x: x.endswith(".json"), "profile"),
    (f"any of {', '.join(TRACKERS)}", lambda x: set(x) <= set(TRACKERS), "report_to"),
)


def require_values(config: Config) -> None:
    """Raises ValueError if a single setting has a value that it may not have."""
    for text, allowed, names in _LIMITS:
        for name in names.split():
            value = getattr(config, name)
            _require((value is None and text.endswith("null")) or allowed(value), name, value, text)
    least, most = config.entropy_coef_min, config.entropy_coef_max
    _require(0 <= least <= most, "entropy_coef_min", least, f"0 or more, and not above entropy_coef_max={most}")
    for item in fields(config):
        value = getattr(config, item.name)
        _require(not isinstance(value, float) or math.isfinite(value), item.name, value, "finite")
    for name in (*PER_STREAM, "entropy_target"):
        _require_per_stream(name, getattr(config, name))


def require_combinations(config: Config) -> None:
    """Raises ValueError if settings do not go together."""
    for conflicts in (_of_devices, _of_loss_and_reference, _of_rollouts, _of_results):
        for conflict in conflicts(config):
            raise ValueError(conflict)


def _require(ok: bool, name: str, value: object, what: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {what}")


def _require_per_stream(name: str, value: Any) -> None:
    one_each = not isinstance(value, dict) or set(value) == set(STREAMS)
    _require(one_each, name, value, f"one number, or one for each of {' and '.join(STREAMS)}")
    numbers = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    for label, number in numbers.items():  # label: the name on the command line
        _require(number is None or math.isfinite(number), label, number, "finite")
        if name in ("beta", "entropy_coef"):
            _require(number >= 0, label, number, "0 or more")
        else:
            optional = ", or null" if name in ("epsilon_high", "entropy_target") else ""
            _require(number is None or number > 0, label, number, f"above 0{optional}")


def _of_devices(config: Config) -> Iterator[str]:
    """Conflicts of the settings that say how ranks, memory and kernels are used."""
    if config.distributed not in ("auto", "deepspeed" if config.deepspeed else "ddp"):
        needs = "a file, such as configs/zero2.json" if config.deepspeed is None else "null"
        yield f"distributed={config.distributed} needs deepspeed={needs}"
    if config.attn_implementation not in ("sdpa", "auto") and config.dtype != "bfloat16":
        yield f"attn_implementation={config.attn_implementation} needs dtype=bfloat16, not {config.dtype}"
    if config.deepspeed and config.optim != "adamw_torch_fused":
        yield f"optim={config.optim} does not go with deepspeed: it trains with adamw_torch_fused"
    if isinstance(config.micro_batch_tokens, int) and (why := config.needs_equal_micro_batches):
        yield f"micro_batch_tokens does not go with {why}: leave one out"
    if config.ema_decay is not None and config.deepspeed:
        yield "ema_decay does not go with deepspeed, which divides the weights among ranks: leave one out"


def _of_loss_and_reference(config: Config) -> Iterator[str]:
    """Conflicts of the settings of the loss and of the reference model."""
    if config.sync_ref_model and (config.lora_r or not config.kl_streams):
        adapters, none = "with lora_r it is the policy without adapters", "with beta=0 there is none"
        yield f"sync_ref_model needs a reference model of its own: {adapters if config.lora_r else none}"
    if config.reference_device and config.lora_r:
        yield "reference_device=cpu does not go with lora_r: the reference is the policy without adapters"
    if config.detach_uncond and config.policy_logits != "guided":
        yield "detach_uncond needs policy_logits=guided: otherwise no unconditional sequence is trained"
    if config.importance_sampling_mode != "token_truncate" and not config.importance_sampling_correction:
        yield f"importance_sampling_mode={config.importance_sampling_mode} needs importance_sampling_correction=true"
    if config.loss_type == "cispo" and config.epsilon_high is None:
        yield "loss_type=cispo clips its weights at epsilon_high: set it (5.0 is recommended)"


def _of_rollouts(config: Config) -> Iterator[str]:
    """Conflicts of the settings that write rollouts to files or read them."""
    if config.rollout_only and (config.save_rollouts is None or config.replay or config.resume):
        yield "rollout_only needs save_rollouts, and neither replay nor resume"
    if config.save_rollout_images and not config.save_rollouts:
        yield "save_rollout_images needs save_rollouts, the folder to write to"
    if config.replay and config.save_rollouts:
        yield "replay reads rollouts, and save_rollouts would write the same again: leave one out"


def _of_results(config: Config) -> Iterator[str]:
    """Conflicts of the settings of evaluations and of the upload."""
    if config.eval_steps and not config.eval_file:
        yield f"eval_steps={config.eval_steps} needs eval_file, the prompts to score"
    if config.rewards.heldout and not config.eval_file:
        yield f"rewards.heldout={config.rewards.heldout} needs eval_file, the prompts to score"
    if config.load_best_model_at_end and (not config.eval_steps or config.replay or config.rollout_only):
        yield "load_best_model_at_end needs eval_steps, and neither replay nor rollout_only"
    if config.hub_model_id and not config.push_to_hub:
        yield f"hub_model_id={config.hub_model_id!r} needs push_to_hub=true"
    if config.push_to_hub and config.rollout_only:
        yield "push_to_hub needs a model that trains, not rollout_only"
