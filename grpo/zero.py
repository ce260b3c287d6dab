"""Trains with DeepSpeed's ZeRO instead of MasterAdamW. It divides masters, gradients and moments among the ranks.

A DeepSpeed JSON file says how. If bicot has a setting too, the file must agree with it or say "auto". Checkpoints have
the same full state that MasterAdamW writes, so a run can continue with another stage, another number of ranks, or
without DeepSpeed.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import get_scheduler

from ..model.policy import Policy
from .config import Config
from .distributed import Ranks
from .optim import MOMENTS, MasterAdamW, Result

_BUCKET = 1 << 26  # number of gradients in a message, 256 MiB in float32; DeepSpeed's default of 5e8 takes 4 GB


def read_settings(file: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, which must have a ZeRO stage of 1, 2 or 3.

    Raises:
        ValueError: the file is no such JSON.
    """
    try:
        settings = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed={file!r} is not a JSON file: {error}") from None
    sections = ("zero_optimization", "bf16", "fp16", "optimizer", "data_types")
    if not isinstance(settings, dict) or any(not isinstance(settings.get(name, {}), dict) for name in sections):
        raise ValueError(f"{file} is not for DeepSpeed: it must be an object, and so must its {', '.join(sections)}")
    if settings.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise ValueError(f"{file}: zero_optimization.stage must be 1, 2 or 3; --distributed ddp is what 0 would be")
    return settings


def engine_config(config: Config, ranks: Ranks) -> dict[str, Any] | None:
    """The DeepSpeed file completed with the other settings, for `deepspeed.initialize`; None without DeepSpeed.

    Raises:
        ValueError: the file cannot be read, or contradicts a setting. Both are named.
    """
    if config.deepspeed is None:
        return None
    file = config.deepspeed
    settings = read_settings(file)
    sharded = settings["zero_optimization"]["stage"] == 3
    # the reference pass reads the heads outside of the engine, where ZeRO-3 has only shards of them
    if config.lora_r and sharded:
        raise ValueError(f"lora_r={config.lora_r} does not go with {file}: ZeRO-3; take configs/zero2.json")
    # for each rollout all ranks gather the weights together, and these rollouts are not drawn by all
    if config.dynamic_sampling and sharded:
        raise ValueError(f"dynamic_sampling does not go with {file}: ZeRO-3; take configs/zero2.json")
    if "scheduler" in settings:
        raise ValueError(f"{file} has a scheduler, and so does bicot, in lr_scheduler_type: remove it from {file}")
    batch, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    ours = {
        "train_micro_batch_size_per_gpu": (batch, config.per_device_train_batch_size),
        "gradient_accumulation_steps": (steps, config.gradient_accumulation_steps),
        "train_batch_size": (f"{batch} × {steps} × ranks", config.prompts_per_device * ranks.size),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "bf16.enabled": ("dtype bfloat16", config.dtype == "bfloat16"),
        "fp16.enabled": ("dtype float16", False),
        "optimizer.type": ("bicot's optimizer", "AdamW"),
        "optimizer.params.torch_adam": ("bicot's use of PyTorch's AdamW", True),  # DeepSpeed's own must be compiled
        "optimizer.params.lr": ("learning_rate", config.learning_rate),
        "optimizer.params.betas": ("[adam_beta1, adam_beta2]", [config.adam_beta1, config.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", config.adam_epsilon),
        "optimizer.params.weight_decay": ("weight_decay", config.weight_decay),
    }
    for key, (name, value) in ours.items():
        section, last = _section(settings, key)
        theirs = section.get(last, "auto")
        if theirs not in ("auto", value):
            raise ValueError(f'{file}: {key} is {theirs!r}, but {name} is {value!r}; make them equal or write "auto"')
        section[last] = value
    defaults = {
        "optimizer.params.fused": True,
        "bf16.check_grad_overflow": True,  # skip the update if a gradient is not finite
        "data_types.grad_accum_dtype": "fp32",
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 31,
    }
    for key, value in defaults.items():
        section, last = _section(settings, key)
        section.setdefault(last, value)
    return _without_auto(settings)


def _section(settings: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a dotted key, which is created if needed, and the last part of the key."""
    *names, last = key.split(".")
    for name in names:
        settings = settings.setdefault(name, {})
    return settings, last


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the values that are still "auto", so that DeepSpeed's defaults hold."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def bucket_size(zero: dict[str, Any], largest: int) -> int:
    """How many gradients are sent at a time: as the JSON says, or `_BUCKET`, but at most the largest parameter."""
    size = zero.get("reduce_bucket_size", "auto")
    return min(_BUCKET, largest) if size == "auto" else int(size)


def require_deepspeed() -> ModuleType:
    """The package, or an ImportError that says how to get it."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(f"--deepspeed needs DeepSpeed: pip install 'bicot[deepspeed]' ({error})") from error
    return deepspeed


class ZeroAdamW(MasterAdamW):
    """MasterAdamW on a DeepSpeed engine. All ranks must call each method together.

    Args:
        policy: the engine takes over its trained parameters; ZeRO-3 shards all parameters.
        config: every setting.
        engine_settings: what `engine_config` returned.
        ranks: this process among the others.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(self, policy: Policy, config: Config, engine_settings: dict[str, Any], ranks: Ranks) -> None:
        deepspeed = require_deepspeed()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls deprecated functions in each step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if ranks.device.type == "cpu":  # DeepSpeed would compile collectives of its own first
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # in a single process
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        groups = deepspeed.utils.groups
        if groups._WORLD_GROUP is None:  # DeepSpeed's own clone of the group would have PyTorch's default timeout
            groups._WORLD_GROUP = dist.new_group(range(ranks.size), timedelta(seconds=ranks.timeout))
        self.ranks = ranks
        self.parameters = policy.trainable_parameters()
        self.options = {name: engine_settings["optimizer"]["params"][name] for name in ("lr", "eps", "weight_decay")}
        self.options["betas"] = (config.adam_beta1, config.adam_beta2)
        zero = engine_settings["zero_optimization"]
        zero["reduce_bucket_size"] = bucket_size(zero, max(p.numel() for p in self.parameters))
        self.engine, *_ = deepspeed.initialize(
            model=_Call(policy.model), model_parameters=self.parameters, config=engine_settings
        )
        self.adamw = self.engine.basic_optimizer
        self.schedule = get_scheduler(config.lr_scheduler_type, self.adamw, config.warmup_steps, config.max_steps)

    def backward(self, compute: Callable[[], tuple[Tensor, Result]], ranks: Ranks, last: bool) -> tuple[Tensor, Result]:
        results: list[Result] = []

        def loss_alone() -> Tensor:  # return one tensor: DeepSpeed's hooks rebuild what a forward pass returns
            loss, result = compute()
            results.append(result)
            return loss

        loss = self.engine(loss_alone)
        # the engine averages over the ranks, but bicot's loss must be summed
        with record_function("backward"):
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch
        return loss.detach(), results[0]

    @record_function("optimizer")
    def step(self, ranks: Ranks) -> Tensor:
        """Clip the gradients and update the weights -> gradient norm. The engine reduces the gradients itself."""
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.ranks.device)
        self._require_finite(norm if self.engine.was_step_applied() else norm.new_tensor(torch.inf))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state of MasterAdamW in host memory. Only rank 0 gets its tensors."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def keep(full: Tensor) -> Tensor | None:
            return full.cpu() if self.ranks.main else None

        steps = self.adamw.state.get(self._shares()[0], {}).get("step")  # None before the first step
        narrow = [p.dtype.itemsize < 4 for p in self.parameters]
        masters = [
            keep(safe_get_full_fp32_param(p)) if rounded else None
            for p, rounded in zip(self.parameters, narrow, strict=True)
        ]
        states = {
            i: {
                "step": steps.cpu().clone(),
                **{name: keep(safe_get_full_optimizer_state(p, name)) for name in MOMENTS},
            }
            for i, p in enumerate([] if steps is None else self.parameters)
        }
        group = {**self.adamw.param_groups[0], "params": list(range(len(self.parameters)))}
        return {
            "adamw": {"state": states, "param_groups": [group]},
            "schedule": self.schedule.state_dict(),
            "masters": masters,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (saved,) = state["adamw"]["param_groups"]
        self.adamw.param_groups[0].update({name: saved[name] for name in ("lr", "initial_lr")})
        self._load_schedule(state["schedule"])
        moments = state["adamw"]["state"]
        if moments:
            for share in self._shares():
                empty = {name: torch.zeros_like(share) for name in MOMENTS}
                self.adamw.state[share] = {"step": moments[0]["step"].clone(), **empty}
            if self.engine.zero_optimization_stage() < 3:  # before the first step, parameters have no moments
                self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for i, (parameter, master) in enumerate(zip(self.parameters, state["masters"], strict=True)):
            if master is not None:
                self._set(parameter, master)
            for name in MOMENTS if moments else ():
                self._set(parameter, moments[i][name], name)

    def _shares(self) -> list[Tensor]:
        """The flat float32 masters of this rank, which are the keys of AdamW's moments."""
        # ZeRO-3 has a list of its own, since it gives AdamW one share at a time
        sharded = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        return sharded or [share for group in self.adamw.param_groups for share in group["params"]]

    def _set(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Write this rank's share of a master, or of one of its moments."""
        from deepspeed import utils

        extra = () if moment is None else (moment,)
        what = "fp32_param" if moment is None else "optimizer_state"
        if not hasattr(parameter, "ds_id"):
            getattr(utils, f"safe_set_full_{what}")(parameter, value.to(self.ranks.device), *extra)
            return
        share = parameter.ds_tensor.numel()  # the last rank's share is padded
        padded = F.pad(value.flatten(), (0, share * self.ranks.size - value.numel()))
        own = padded[share * self.ranks.rank :][:share].to(self.ranks.device)
        getattr(utils, f"safe_set_local_{what}")(parameter, own, *extra)


class _Call(nn.Module):
    """A module whose forward pass calls a function. Inside, ZeRO-3 gathers the weights that it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()
