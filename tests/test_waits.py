"""How often a training step waits for its GPU, and where: at the places named here alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import gpu, host_sync_allowed, no_host_sync
from torch import Tensor
from training import SMALL, words
from waits import Waits

from bicot.grpo import step
from bicot.grpo.cli import parse_config
from bicot.grpo.distributed import Ranks
from bicot.grpo.optim import MasterAdamW
from bicot.grpo.trainer import Trainer
from bicot.kernels.grpo_loss import TokenStream
from bicot.rewards.worker import Worker

LIMIT = 12  # tokens of a plan
# 16 samples in two chunks of pictures, and everything that a micro-batch can carry
MUCH = ("--rollout_max_rows", "16", "--policy_logits", "guided", "--importance_sampling_correction", "true")
MUCH += ("--num_iterations", "2", "--gradient_checkpointing", "true", "--top_p", "0.9", "--image_top_k", "5")
MUCH += ("--importance_sampling_mode", "sequence_mask", "--off_policy_mask_threshold", "0.1")
MUCH += ("--mask_truncated_completions", "true")


def trainer_of(job: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Trainer:
    monkeypatch.syspath_prepend(job)
    serial = ("--rewards.schedule", "serial", "--max_completion_length", str(LIMIT))
    return Trainer(parse_config(words(job, output, *SMALL, *serial, *more)), Ranks.start())


@pytest.mark.parametrize(
    ("chunks", "updates", "settings"),
    [
        (1, 1, ()),
        (1, 1, ("--dtype", "float32", "--beta", "0", "--loss_type", "bnpo", "--cfg_weight", "1")),
        (2, 2, MUCH),
        (1, 1, ("--token_weights", "evenly:even")),
        pytest.param(1, 1, ("--lora_r", "2"), marks=pytest.mark.skipif(not find_spec("peft"), reason="needs PEFT")),
    ],
)
def test_a_step_waits_at_the_named_places_alone(
    chunks: int, updates: int, settings: tuple[str, ...], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evenly.py").write_text("def even(tokens):\n    return tokens.entropies * 0 + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Waits() as waits:
        trainer = trainer_of(job, tmp_path / "run", monkeypatch, *settings)
        trainer._train_step()
        waits.counts.clear()
        trainer._train_step()
    # kernels look at values on a CPU alone: test_smoke.py
    counts = {place: count for place, count in waits.counts.items() if not place.startswith("kernels.")}
    # which plans have ended: on a GPU by an event of eight steps ago
    assert 0 < counts.pop("model.stages:_Look.next") <= LIMIT
    if "--token_weights" in settings:  # whether those of two streams are finite, in two micro-batches
        assert counts.pop("grpo.token_weights:TokenWeights.__call__") == 4
    assert counts == {
        "model.stages:PlanStage.run": 1,
        "model.chunk:RolloutChunk.ids": 1,
        "rewards.worker:Worker._run": chunks,
        "grpo.optim:MasterAdamW._require_finite": updates,
        "grpo.metrics:on_host": 1,
    }


LATE = """
import threading

gone_on = threading.Event()

def late(images, examples):
    assert gone_on.wait(60)  # would fail if the policy's first forward pass waited for the scores
    return images.mean((1, 2, 3))
"""


def test_rewards_work_beside_the_first_forward_pass(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    threads = ("--rewards.names", "late:late", "--rewards.schedule", "threads")
    trainer = trainer_of(job, tmp_path / "run", monkeypatch, *threads)
    forward = step.token_streams

    def watched(*args: Any) -> list[TokenStream]:
        streams = forward(*args)
        if torch.is_grad_enabled():
            sys.modules["late"].gone_on.set()
        return streams

    monkeypatch.setattr(step, "token_streams", watched)
    metrics, _ = trainer._train_step()
    assert metrics["rewards/late/milliseconds_hidden"] > 0 and metrics["grad_norm"] > 0


DEVICE = torch.device("cpu")  # as it is written for a device; the host is "cpu"


@pytest.mark.parametrize(
    ("counted", "wait"),
    [
        (1, lambda here, there: here[0].item()),
        (1, lambda here, there: here.tolist()),
        (1, lambda here, there: bool(here.isfinite().all())),
        (1, lambda here, there: here.cpu()),
        (1, lambda here, there: here.to("cpu")),
        (1, lambda here, there: here.nonzero()),
        (1, lambda here, there: here[here > 0]),
        (1, lambda here, there: here[[0, 1]]),
        (1, lambda here, there: there.to(here)),
        (1, lambda here, there: there.to(DEVICE)),
        (1, lambda here, there: torch.tensor([1.0], device=DEVICE)),
        (1, lambda here, there: here.new_tensor([1.0])),
        (1, lambda here, there: here.copy_(there)),
        (1, lambda here, there: here + there),
        (0, lambda here, there: there[there > 0].tolist()),
        (0, lambda here, there: there.to(DEVICE, non_blocking=True) + here),
        (0, lambda here, there: here + torch.zeros(2, device=DEVICE)),
        (0, lambda here, there: here + torch.tensor(1.0)),
        (1, lambda here, there: here.cpu().tolist()),
    ],
)
def test_what_counts_as_a_wait(counted: int, wait: Callable[[Tensor, Tensor], object]) -> None:
    there = torch.ones(2)
    with Waits(__name__) as waits:
        wait(there.to(DEVICE, non_blocking=True), there)
    assert sum(waits.counts.values()) == counted


@gpu
def test_a_step_on_a_gpu_waits_nowhere_else(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, read, tolist = trainer_of(job, tmp_path, monkeypatch, *MUCH), list[tuple[int, ...]](), Tensor.tolist
    trainer._train_step()  # compiles and captures

    def allow(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def allowed(*args: Any, **kwargs: Any) -> Any:
            with host_sync_allowed():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, allowed)

    def named(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            read.append(tuple(tensor.shape))
        with host_sync_allowed():
            return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", named)
    allow(Worker, "_run")
    allow(MasterAdamW, "_require_finite")
    with no_host_sync():
        trainer._train_step()
    plans, tokens, metrics = read
    assert plans == (16, LIMIT) and tokens == (16, 16) and len(metrics) == 1
