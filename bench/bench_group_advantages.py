"""group_advantages: 128 samples in groups of 8, three rewards.

python -m bicot.bench.bench_group_advantages [--device cpu|cuda] [--output FILE.json]
Two kilobytes move, so no floor is counted. On a CPU ours is plain PyTorch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..kernels.dispatch import Impl
from ..kernels.group_advantages import group_advantages
from .harness import Case, Outputs, against_eager, main

EPS = 1e-4


def inputs(S: int, R: int, device: str) -> Tensor:
    return torch.rand(S, R, generator=torch.Generator(device).manual_seed(0), device=device)


def eager(rewards: Tensor, group_size: int) -> Outputs:
    groups = rewards.sum(1).view(-1, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    return [(centered / (groups.std(1, keepdim=True) + EPS)).flatten()]


def case(S: int, G: int, R: int, device: str) -> Case:
    impl: Impl = "triton" if device == "cuda" else "torch"
    return against_eager(
        {"S": S, "G": G, "R": R},
        torch.float32,
        partial(inputs, S, R, device),
        lambda rewards: [group_advantages(rewards, G, eps=EPS, impl=impl)],
        partial(eager, group_size=G),
        impl,
        notes=("", "no missing rewards, no checks"),
    )


def cases(device: str, tiny: bool) -> list[Case]:
    return [case(16, 4, 3, device) if tiny else case(128, 8, 3, device)]


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
