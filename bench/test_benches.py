"""`pytest bench`: the CPU cases through pytest-benchmark, one entry a provider, for its tables and comparisons.

Not part of plain `pytest`. Select with -k, for example `pytest bench -k "group_advantages and ours"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bicot.bench import bench_rewards, bench_rollout, kernels
from bicot.bench.harness import Case, Outputs, Unavailable
from bicot.bench.report import label

BENCHES = {"rollout": bench_rollout.cases, "rewards": bench_rewards.cases, **kernels.OPS}
CASES = [(bench, case) for bench, cases in BENCHES.items() for case in cases("cpu", False)]


def group(bench: str, case: Case) -> str:
    return f"{bench}: {label(case.labels)}"


@functools.lru_cache(maxsize=1)  # the providers of a case run one after the other
def prepared(case: Case) -> tuple[Any, Callable[[Outputs], float]]:
    inputs = case.inputs()
    return inputs, case.truth(inputs)


@pytest.mark.parametrize(
    ("case", "provider", "name"),
    [pytest.param(c, p, group(b, c), id=f"{group(b, c)} {p}") for b, c in CASES for p in c.providers],
)
def test_speed(case: Case, provider: str, name: str, benchmark: Any) -> None:
    chosen, (inputs, error_of) = case.providers[provider], prepared(case)
    torch.compiler.reset()
    try:
        case.check(chosen, inputs, error_of)
    except (ImportError, Unavailable) as problem:
        pytest.skip(str(problem))
    benchmark.group = name
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.given(inputs),), {}), rounds=5, warmup_rounds=1)
