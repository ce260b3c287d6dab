"""LoRA adapters: adding, loading, and merging them into the weights that they adapt.

PEFT's modules compute W·x + scaling·B·A·x. Decoding and the loss read weights instead of calling modules, so they need
W + scaling·B·A, and the biases of the adapters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter around the module."""
    return hasattr(module, "get_base_layer")


def unmerged(module: nn.Module, attribute: str) -> Any:
    """The weight or bias that the module uses, without LoRA."""
    if attribute == "bias" and hasattr(module, "token_adapter"):  # PEFT's wrapper for single tokens has no `bias`
        module = module.original_module  # type: ignore[assignment]
    return getattr(module, attribute)


def merged(module: nn.Module, name: str) -> Any:
    """Merge the active adapters into a parameter of `module` or of a submodule. Gradients flow into the adapters.

    Returns:
        The sum in the parameter's dtype, computed in float32 or wider. None for a bias that neither the module nor an
        adapter has. (An adapter has a bias with `lora_bias`.)

    Raises:
        ValueError: adapters that are not plain LoRA.
    """
    owner, _, attribute = name.rpartition(".")
    module = module.get_submodule(owner)
    value: Tensor | None = unmerged(module, attribute)
    if not is_adapted(module):
        return value
    adapted: Any = module
    if adapted.merged and adapted.disable_adapters:
        adapted.unmerge()  # as PEFT's own forward does
    if adapted.merged or adapted.disable_adapters:
        return value
    names = [name for name in adapted.active_adapters if name in getattr(adapted, "scaling", ())]
    if not hasattr(adapted, "lora_A") or any(name in adapted.lora_variant for name in names):
        raise ValueError(f"{type(module)}: bicot merges plain LoRA adapters, and no other kind (such as DoRA)")
    if attribute == "weight":
        deltas = [adapted.get_delta_weight(name) for name in names]
    else:
        deltas = [adapted.lora_B[name].bias * adapted.scaling[name] for name in names if adapted.lora_bias[name]]
    terms = deltas if value is None else [value, *deltas]
    dtype = adapted.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    return sum(term.to(wide) for term in terms).to(dtype) if terms else None  # type: ignore[union-attr]


def adapter_base(path: str | Path) -> str | None:
    """The base model that the config of a PEFT adapter folder names; None if `path` is no adapter folder."""
    file = Path(path) / "adapter_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} names no base_model_name_or_path, copy it again: {error}") from error


def add_lora(model: Any, r: int, alpha: int, dropout: float, targets: Sequence[str], freeze: Sequence[str]) -> Any:
    """Add new LoRA adapters to the model -> PEFT's model around it. Only the adapters train from now on.

    Args:
        targets: last parts of the names of the linear layers to adapt.
        freeze: prefixes of the names of layers that get no adapter.

    Raises:
        ValueError: a target that matches no layer outside `freeze`.
    """
    peft = require_peft()
    free = [name for name, _ in model.named_modules() if not name.startswith(tuple(freeze))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in free):
            raise ValueError(f"lora_target_modules: no layer outside freeze is named {target!r}")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        exclude_modules="|".join(re.escape(prefix) + ".*" for prefix in freeze) or None,
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def load_lora(model: Any, folder: str | Path) -> Any:
    """Load the adapters in a folder of PEFT's format -> PEFT's model around `model`. Only the adapters train."""
    return require_peft().PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)


def require_peft() -> ModuleType:
    """Import peft. Raises an ImportError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need peft: pip install 'bicot[peft]'") from error
    return peft
