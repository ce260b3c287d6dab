"""Loads the models of a run: the policy, with or without adapters, and the reference model of the KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import set_seed

from ..model.adapters import adapter_base, add_lora, load_lora
from ..model.policy import Policy
from .config import Config

REFERENCE = "reference"  # folder in a checkpoint with the reference model, if that follows the policy
Load = Callable[..., Policy]  # a path -> a policy; with reference=True -> a frozen one on the reference device


def build_policy(config: Config, checkpoint: Path | None, load: Load) -> Policy:
    """The policy of the checkpoint, or else the initial model, with LoRA adapters if the settings ask for them.

    Raises:
        ValueError: the initial model is an adapter, or the checkpoint was trained without adapters.
    """
    if adapter_base(config.model_name_or_path):
        raise ValueError(
            f"model_name_or_path={config.model_name_or_path!r} is a LoRA adapter; merge it into its model first: "
            f"python -m bicot.model.merge_lora {config.model_name_or_path} OUT"
        )
    if not config.lora_r:
        return load(checkpoint or config.model_name_or_path)
    policy = load(config.model_name_or_path)
    if checkpoint is None:
        set_seed(config.seed)  # the adapters start with the same random weights on all ranks
        shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules, config.freeze)
        policy.adapters = add_lora(policy.model, *shape).eval()
    elif adapter_base(checkpoint):
        policy.adapters = load_lora(policy.model, checkpoint).eval()
    else:
        raise ValueError(f"{checkpoint} was trained with lora_r 0, which cannot become {config.lora_r} within a run")
    base = Path(config.model_name_or_path)  # an absolute path, so that the adapter finds it from any directory
    policy.adapters.peft_config["default"].base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
    return policy


def build_reference(config: Config, checkpoint: Path | None, policy: Policy, load: Load) -> tuple[Policy | None, bool]:
    """The reference model, and whether it follows the policy, so that checkpoints must hold it.

    There is none without a KL. With LoRA it is the policy, whose adapters are switched off for the reference pass.
    """
    if not config.kl_streams or config.rollout_only:
        return None, False
    if config.lora_r:
        return policy, False
    moved = checkpoint / REFERENCE if checkpoint and (checkpoint / REFERENCE).is_dir() else None
    follows = config.sync_ref_model or moved is not None
    return load(moved or config.model_name_or_path, reference=True), follows
