"""group_advantages: 128 samples in groups of 8, three rewards.

python -m bicot.bench.bench_group_advantages [--device cpu|cuda] [--output FILE.json]
Two kilobytes move, so no floor is counted. On a CPU ours is plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.dispatch import Impl
from ..kernels.group_advantages import group_advantages
from .harness import Case, Outputs, Provider, compiled, expect, main

EPS = 1e-4


def inputs(S: int, R: int, device: str) -> Tensor:
    return torch.rand(S, R, generator=torch.Generator(device).manual_seed(0), device=device)


def eager(rewards: Tensor, group_size: int) -> Outputs:
    groups = rewards.sum(1).view(-1, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    return [(centered / (groups.std(1, keepdim=True) + EPS)).flatten()]


def truth(rewards: Tensor, *, group_size: int) -> Callable[[Outputs], float]:
    return expect(eager(rewards.double(), group_size))


def case(S: int, G: int, R: int, device: str) -> Case:
    impl: Impl = "triton" if device == "cuda" else "torch"
    return Case(
        {"S": S, "G": G, "R": R},
        torch.float32,
        partial(inputs, S, R, device),
        partial(truth, group_size=G),
        {
            "ours": Provider(lambda x: [group_advantages(x, G, eps=EPS, impl=impl)], f'impl="{impl}"'),
            "eager": Provider(partial(eager, group_size=G), "no missing rewards, no checks"),
            "torch.compile": Provider(partial(compiled(eager), group_size=G), "of eager"),
        },
    )


def cases(device: str, tiny: bool) -> list[Case]:
    return [case(16, 4, 3, device) if tiny else case(128, 8, 3, device)]


if __name__ == "__main__":
    raise SystemExit(main("group_advantages", __doc__, cases))
