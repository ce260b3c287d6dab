"""AdamW on float32 master weights.

An update of lr 1e-6 to a bfloat16 weight of magnitude 1 rounds to nothing (its spacing there is 2^-7). So the optimizer
owns float32 masters, gradients accumulate into them in float32, and the model's weights are the rounded masters.
Weights of 32 bits or more are their own masters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from .config import Config


class MasterAdamW:
    """AdamW with a schedule over parameters of any dtype.

    Args:
        parameters: the trainable weights of the model.
        config: learning rate, betas, epsilon, decay, clipping and schedule.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: Config) -> None:
        self.parameters = list(parameters)
        self.masters = [p if p.element_size() >= 4 else nn.Parameter(p.detach().float()) for p in self.parameters]
        self.max_grad_norm = config.max_grad_norm
        self.options: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        self.adamw = torch.optim.AdamW(self.masters, **self.options, fused=True)
        self.schedule = get_scheduler(config.lr_scheduler_type, self.adamw, config.warmup_steps, config.max_steps)

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def collect(self) -> None:
        """Add the gradients of one backward pass to the masters', in float32."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def step(self, reduce: Callable[[Sequence[Tensor]], None]) -> Tensor:
        """Reduce the gradients over the ranks, clip, update, and round the masters into the model -> gradient norm.

        Raises:
            FloatingPointError: a gradient is not finite; no weight has changed then.
        """
        reduce(self.masters)
        norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient norm is {norm.item()}: the loss diverged; the weights are as before this step. "
                "Lower learning_rate, or resume from the last checkpoint"
            )
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments, the schedule, and the masters that are not the model's own weights."""
        own = [None if m is p else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)]
        return {"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict(), "masters": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, but not its learning rate, betas, epsilon and decay: those of the configuration hold."""
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
        rate = self.options["lr"]
        for group in self.adamw.param_groups:
            before, now = group["initial_lr"], group["lr"]
            if before != rate:  # where the schedule stands, with the new rate
                now = rate * now / before if before else 0.0
            group |= {**self.options, "lr": now, "initial_lr": rate}
        self.schedule.base_lrs = [rate] * len(self.adamw.param_groups)
        self.schedule._last_lr = [group["lr"] for group in self.adamw.param_groups]
        with torch.no_grad():
            for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)
                    parameter.copy_(saved)
