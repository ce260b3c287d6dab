"""CUDA graphs draw what eager steps draw, and where a rollout waits for the GPU. Most of it runs without CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forced import PROMPTS, assert_same, draw, engine_of, rollout
from oracle import gpu, host_sync_allowed, no_host_sync
from tiny import tiny_policy
from torch import Tensor

from bicot.kernels import dispatch
from bicot.model import decoder, stages
from bicot.model.chunk import RolloutChunk
from bicot.model.graphs import StepGraphs, use_graphs
from bicot.model.policy import Policy
from bicot.model.settings import Sampling


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What surrounds CUDA graphs, without CUDA: what was captured, and what replayed."""
    captured: list[Any] = []
    replayed: list[Any] = []

    def record(self: StepGraphs, step: Callable[[], None]) -> Any:
        captured.append(step)
        return SimpleNamespace(replay=lambda: (replayed.append(step), step()))

    monkeypatch.setattr(StepGraphs, "_record", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return captured, replayed


def test_warming_up_and_replaying_change_nothing(
    policy: Policy, replays: tuple[list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs the step that was captured first under its key."""
    captured, replayed = replays
    monkeypatch.setattr(stages, "_BUCKETS", list(range(1, 41)))  # each row that leaves means another graph
    engine = engine_of(policy, max_rows=40)
    engine.graphs.stream = SimpleNamespace(device=engine.device)  # type: ignore[assignment]
    for limit in (*range(2, 16), 40, 40):  # rows leave in the last steps too
        sampling = Sampling(max_completion_length=limit, cfg_weight=2.0 if limit % 3 else 1.0)
        chunk = draw(engine, PROMPTS, 8, sampling)
        assert_same(chunk, rollout(policy, PROMPTS, 8, sampling))
    before = len(captured)
    assert before > 40
    replayed.clear()
    list(engine.generate(PROMPTS, 8, sampling, seed=11))
    assert len(captured) == before, "nothing is captured twice"
    assert len(replayed) <= 3 + 40 / 8 + 2 * 16 / 8, "prefills of plans and of two chunks, and eight steps each time"


def test_a_graph_captured_between_two_passes_changes_nothing(
    policy: Policy, replays: tuple[list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 48)
    monkeypatch.setattr(decoder, "_BUCKET", 2)
    engine, sampling = engine_of(policy), Sampling(max_completion_length=8)
    engine.graphs.stream = SimpleNamespace(device=engine.device)  # type: ignore[assignment]
    list(engine.generate(PROMPTS, 4, sampling, seed=11))
    once = decoder.Decoder._prefill
    monkeypatch.setattr(decoder.Decoder, "_prefill", lambda self, *a: (engine.graphs.clear(), once(self, *a)))
    other = PROMPTS[::-1]
    chunk = draw(engine, other, 4, sampling)
    monkeypatch.undo()
    assert_same(chunk, rollout(policy, other, 4, sampling))


def test_settings_of_one_stage_are_no_new_graphs_of_the_other(policy: Policy) -> None:
    """An evaluation with another guidance captures no graphs of plans again."""
    engine = engine_of(policy)
    for guided in (Sampling(), Sampling(cfg_weight=1.0), Sampling()):
        draw(engine, PROMPTS[:1], 2, replace(guided, max_completion_length=2))
    plan, (two, one) = engine.plan_stage, engine.image_stages.values()
    assert plan and (two.sequences_per_sample, one.sequences_per_sample) == (2, 1)
    usual = Sampling()
    pictures = replace(usual, cfg_weight=1.0, image_temperature=0.5, image_top_k=3)
    assert (
        plan._graph(8, 1, usual)[0] == plan._graph(8, 1, pictures)[0] != plan._graph(8, 1, replace(usual, top_k=1))[0]
    )
    assert two._graph(8, usual)[0] == two._graph(8, replace(usual, top_k=1))[0] != two._graph(8, pictures)[0]


def test_cuda_graphs_need_a_gpu(policy: Policy) -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs a policy on a GPU"):
        engine_of(policy, cuda_graphs=True)
    assert not engine_of(policy).graphs.enabled


def test_cuda_graphs_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch replaces its kernels, and reads lengths from the device in the middle of a step."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    assert use_graphs("auto", gpu, torch.bfloat16) and use_graphs(True, gpu, torch.float16)
    assert not use_graphs(False, gpu, torch.float64)
    cases = (torch.float64, True, "got torch.float64"), (torch.bfloat16, False, "not installed")
    for dtype, installed, reason in cases:
        monkeypatch.setattr(dispatch, "HAS_TRITON", installed)
        with pytest.warns(UserWarning, match=f"without CUDA graphs.*{reason}") as warned:
            assert not use_graphs("auto", gpu, dtype)
        assert len(warned) == 1
        with pytest.raises(ValueError, match=f"cuda_graphs=True needs the Triton kernels.*{reason}"):
            use_graphs(True, gpu, dtype)


def test_steps_are_captured_on_the_stream_of_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own capture stream has priority 0, and a replay keeps the priority of the capture."""
    stream: Any = SimpleNamespace(device=torch.device("cuda:1"))
    seen: list[Any] = []

    @contextmanager
    def graph(graph: Any, **options: Any) -> Iterator[None]:
        seen.append(options["stream"])
        yield

    captured = SimpleNamespace(pool=lambda: 7, replay=lambda: seen.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    graphs = StepGraphs(stream)
    graphs.capture("key", lambda: None)
    graphs.run("key", lambda: None)
    graphs.clear()
    assert seen == [stream.device, stream, "replay", stream.device], "device and stream are named"


@gpu
def test_a_model_that_triton_does_not_take_decodes_without_graphs() -> None:
    policy, on_cpu = tiny_policy(), tiny_policy()
    policy.model.double().cuda()
    on_cpu.model.double()
    sampling = Sampling(max_completion_length=10, cfg_weight=2.0)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        drawn = rollout(policy, PROMPTS, 2, sampling)
    assert torch.equal(drawn.image_tokens.cpu(), rollout(on_cpu, PROMPTS, 2, sampling).image_tokens)


@gpu
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_graphs_draw_what_eager_steps_draw(policy: Policy, kv_dtype: str) -> None:
    policy.model.cuda()
    sampling = Sampling(max_completion_length=40, cfg_weight=2.0)
    eager, graphed = (
        rollout(policy, PROMPTS, 5, sampling, cuda_graphs=graphs, kv_dtype=kv_dtype) for graphs in (False, True)
    )
    assert_same(eager, graphed)
    engine = engine_of(policy, cuda_graphs=True, kv_dtype=kv_dtype)
    engine.graphs.dependent_launches = True
    assert_same(eager, draw(engine, PROMPTS, 5, sampling))
    if kv_dtype == "auto":
        on_cpu = rollout(tiny_policy(), PROMPTS, 5, sampling)
        assert torch.equal(graphed.image_tokens.cpu(), on_cpu.image_tokens)


@gpu
def test_a_rollout_waits_for_the_device_only_for_its_plans(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy.model.cuda()
    engine = engine_of(policy, max_rows=16)
    sampling, read, tolist = Sampling(max_completion_length=10, cfg_weight=2.0), [], Tensor.tolist
    first = draw(engine, PROMPTS, 4, sampling, seed=1)  # compiles and captures

    def named(tensor: Tensor) -> Any:
        read.append(tuple(tensor.shape) if tensor.is_cuda else ())
        with host_sync_allowed():
            return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", named)
    with no_host_sync():
        chunks = list(engine.generate(PROMPTS, 4, sampling, seed=1))
    monkeypatch.undo()
    assert [shape for shape in read if shape] == [(12, 10)] and len(chunks) == 2
    assert torch.equal(first.image_tokens, RolloutChunk.cat(chunks).image_tokens)
