"""Says whether a run fits the memory of its GPUs, and what to change if it does not (`train.py --dry_run`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .config import Config
from .files import ROOT
from .plan import AUTO, GIB, SHORT_PLAN, auto_text, load_model, plan_of, settled

_OTHER_TRAINING = ("--lora_r", "--max_completion_length")  # changes after which the run trains differently


def changes(config: Config, ranks: int = 1) -> Iterator[tuple[str, Config]]:
    """Changes that make a run need less memory: options of the command line, and the settings with them."""
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
        if ranks > 1 and not isinstance(config.micro_batch_tokens, int):
            file = "configs/zero2.json"
            yield f"--deepspeed {file}", replace(config, deepspeed=str(ROOT / file))
        yield "--optim adamw_8bit", replace(config, optim="adamw_8bit")
    if config.max_completion_length > 128:
        yield "--max_completion_length 128", replace(config, max_completion_length=128)
    if not config.lora_r:
        yield "--lora_r 32", replace(config, lora_r=32, reference_device=None)


def advice(config: Config, model: Any, ranks: int, gpu_bytes: int) -> str:
    """A line for each change with its peak, the smallest first; then the changes that together make the run fit."""
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
    """The memory plan as text: the table, whether it fits GPUs of `gpu_gib` GiB, and what to change if not."""
    if ranks < 1 or gpu_gib <= 0:
        raise ValueError(f"gpus={ranks} and gpu_gib={gpu_gib} must be above 0")
    model, size = load_model(config.model_name_or_path), int(gpu_gib * GIB)
    chosen = settled(config, model, ranks, size)
    plan = plan_of(chosen, model, ranks, size)
    said = f"{plan.table()}\n{auto_text(config, chosen)}{plan.line()}; "
    if plan.peak <= size:
        return f"{said}it fits {gpu_gib:g} GiB"
    return f"{said}it does not fit {gpu_gib:g} GiB. The peak after one change:\n{advice(config, model, ranks, size)}"


def require_memory(config: Config, force: bool) -> None:
    """Refuse a run that does not fit the memory of the GPU, or of the host without one. On a GPU, print the peak.

    Raises:
        ValueError: the run does not fit even if plans have `SHORT_PLAN` tokens, and `force` is false.
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
    auto = any(getattr(config, name) == "auto" for name in AUTO)
    if int(os.environ.get("RANK", 0)) == 0 and gpu and not auto:  # with auto, `settle` prints it
        print(plan.line(), file=sys.stderr)
    short = replace(config, max_completion_length=min(SHORT_PLAN, config.max_completion_length))
    if not force and (least := plan_of(short, model, ranks, size).peak) > size:
        where = "this GPU" if gpu else "this machine, which has no GPU,"
        raise ValueError(
            f"the run needs {least / GIB:.1f} GiB per GPU even with plans of {short.max_completion_length} tokens, and "
            f"{where} has {size / GIB:.1f}; --dry_run says what to change, --force_memory runs all the same"
        )
