"""A Triton kernel is compiled once, not again when the lengths of sequences change in the middle of a run."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from stepping import FORMAT, PROMPTS, G, config
from tiny import tiny_policy

from bicot.grpo.step import split, token_streams
from bicot.kernels.dispatch import HAS_TRITON, INTERPRETED
from bicot.kernels.grpo_loss import grpo_loss
from bicot.model.engine import RolloutEngine
from bicot.model.settings import Sampling


def constants(kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> dict[str, Hashable]:
    """The constants of a launch. Triton compiles one kernel for each set of them."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    constant = options.keys() | {p.name for p in kernel.params if p.is_constexpr}
    return {name: value for name, value in given.items() if name in constant or value is None}


def specialization(kernel: Any, arguments: Sequence[Any]) -> dict[str, Hashable]:
    """What else decides: types, and which pointers and integers are multiples of 16, where the kernel does not say
    that this does not matter."""

    def of(parameter: Any, value: Any) -> Hashable:
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if isinstance(value, torch.Tensor):
            return value.dtype, free or value.data_ptr() % 16 == 0
        return type(value), free or (value == 1, value % 16 == 0) if isinstance(value, int) else None

    pairs = zip(kernel.params, arguments, strict=False)
    return {p.name: of(p, value) for p, value in pairs if not p.is_constexpr and value is not None}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
def test_training_on_other_lengths_compiles_no_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not run here: what they compute does not decide which are launched."""
    policy, cfg, lengths = tiny_policy(), config(per_device_train_batch_size=1), set[int]()
    found = defaultdict[Hashable, dict[str, set[Hashable]]](lambda: defaultdict(set))
    engine = RolloutEngine(policy, policy.prompt_encoder(FORMAT))
    rollouts = [next(engine.generate(PROMPTS[:2], G, Sampling(max_completion_length=n), seed=n)) for n in range(6, 10)]

    def launch(kernel: Any, grid: object, *arguments: Any, **options: Any) -> None:
        key = (kernel.__module__, kernel.__name__, *constants(kernel, arguments, options).items())
        for name, value in specialization(kernel, arguments).items():
            found[key][name].add(value)

    for module in [module for name, module in sys.modules.items() if name.startswith("bicot.kernels.")]:
        for name, other in (("launch", launch), ("choose", lambda *_, **__: "triton")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, other)
    for rollout in rollouts:
        advantages = torch.zeros(len(rollout)).split(G)
        for part, mine in zip(split(rollout, cfg), advantages, strict=True):
            streams = token_streams(policy, part, engine.encoder, cfg)
            streams = [replace(stream, ref_logprob=stream.stats().logprob.detach()) for stream in streams]
            grpo_loss(streams, mine, group_size=G).loss.backward()
            lengths.add(len(part.plans.values))
    assert len(lengths) > 2 and len({key[:2] for key in found}) > 8
    again = {(*key[:2], name): ways for key, each in found.items() for name, ways in each.items() if len(ways) > 1}
    assert not again, "compiled for each"
