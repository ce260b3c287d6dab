"""Slow copies of the weights: their moving average, for evaluation and export, and a reference model that follows.

`ema_decay` d: after each optimizer update, average ← d·average + (1 - d)·weight, in float32, since a thousandth
of a difference rounds to nothing in bfloat16. It follows the float32 masters where there are some.

`sync_ref_model`, as in TRL: every `ref_model_sync_steps` steps, reference ← α·policy + (1 - α)·reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.policy import Policy
from ..model.weights import unsharded


class WeightAverage:
    """The moving average of what trains.

    Args:
        parameters: the trainable weights of the model.
        masters: what is averaged, one for each.
        decay: d.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.masters, self.decay = parameters, masters, decay
        self.averages = [master.detach().to(torch.float32, copy=True) for master in masters]

    def update(self) -> None:
        """After an optimizer update."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.lerp_(master.detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the averages."""
        weights = [parameter.detach() for parameter in self.parameters]
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def load(self, averages: list[Tensor] | None) -> None:
        """Copy saved averages; without them, begin anew at the masters."""
        torch._foreach_copy_(self.averages, averages or [master.detach() for master in self.masters])


@torch.no_grad()
def mix_into(reference: Policy, policy: Policy, alpha: float) -> None:
    """reference ← alpha · policy + (1 - alpha) · reference, of what trains; all ranks call this together."""
    for old, new in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
        if new.requires_grad:
            with unsharded([new]):
                old.lerp_(new.detach().to(old.device), alpha)
