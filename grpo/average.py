"""Copies of the weights that change slowly: their moving average, and a reference model that follows the policy.

With `ema_decay` d, average ← d·average + (1 - d)·weight after each optimizer update. The average is float32, since in
bfloat16 a thousandth of a difference would round to nothing. It averages the float32 masters if there are any.

With `sync_ref_model`, as in TRL, reference ← α·policy + (1 - α)·reference every `ref_model_sync_steps` steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.policy import Policy
from ..model.weights import unsharded


class WeightAverage:
    """The moving average of the trained weights.

    Args:
        parameters: the trained weights of the model.
        masters: the float32 weights that are averaged, one for each parameter.
        decay: d above.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.masters, self.decay = parameters, masters, decay
        self.averages = [master.detach().to(torch.float32, copy=True) for master in masters]

    def update(self) -> None:
        """Call this after each optimizer update."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master.detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context, the model has the averages as its weights."""
        weights = [parameter.detach() for parameter in self.parameters]
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def load(self, averages: list[Tensor] | None) -> None:
        """Copy saved averages. If there are none, begin again with the masters."""
        torch._foreach_copy_(self.averages, averages or [master.detach() for master in self.masters])


@torch.no_grad()
def mix_into(reference: Policy, policy: Policy, alpha: float) -> None:
    """reference ← alpha · policy + (1 - alpha) · reference, for all trained weights. All ranks call this together."""
    for old, new in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
        if new.requires_grad:
            with unsharded([new]):
                old.lerp_(new.detach().to(old.device), alpha)
