"""bicot: a Janus model plans a picture in words and draws it token by token; GRPO trains both.

    from bicot import Policy

    pictures = Policy.from_pretrained("deepseek-ai/Janus-Pro-1B").generate("a red circle left of a blue square", n=4)

Each name is imported when it is first used, so that `import bicot` imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.grpo_loss import TokenStream, grpo_loss
    from .model.engine import RolloutEngine
    from .model.generation import Policy
    from .model.policy import load_policy

__version__ = "0.1.0"
__all__ = ["Policy", "RolloutEngine", "TokenStream", "grpo_loss", "load_policy"]
_MODULES = {
    "Policy": "model.generation",
    "RolloutEngine": "model.engine",
    "TokenStream": "kernels.grpo_loss",
    "grpo_loss": "kernels.grpo_loss",
    "load_policy": "model.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
